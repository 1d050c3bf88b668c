"""Drawings: their structure as XML, and that no text leaves its box."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from nets import Linears, Net, W, vectors
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rezero_convert as rz
from rezero_convert import cli
from rezero_convert.listing import DIGITS
from rezero_convert.pictures.fold import folded
from rezero_convert.pictures.records import Box, Branch, Fold
from rezero_convert.pictures.svg import WIDTH

SVG = "{http://www.w3.org/2000/svg}"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = " \N{RIGHTWARDS ARROW} "
CHARACTER = 6.65
"""Width of a character of DejaVu Sans Mono and its like at size 11, rounded up."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(torch.relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(torch.relu(self.norm2(h)))


class UNet(nn.Module):
    """Three levels, two blocks each; concatenations, and one merge by an add."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.stem = nn.Conv2d(3, w, 3, padding=1)
        self.down1 = nn.Sequential(ResBlock(w, w), ResBlock(w, w))
        self.pool1 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = nn.Sequential(ResBlock(2 * w, 2 * w), ResBlock(2 * w, 2 * w))
        self.pool2 = nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1)
        self.middle = nn.Sequential(ResBlock(4 * w, 4 * w), ResBlock(4 * w, 4 * w))
        self.up2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2)
        self.right2 = nn.Sequential(ResBlock(4 * w, 2 * w), ResBlock(2 * w, 2 * w))
        self.up1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.right1 = nn.Sequential(ResBlock(w, w), ResBlock(w, w))
        self.head = nn.Conv2d(w, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.down1(self.stem(x))
        x = second = self.down2(self.pool1(x))
        x = self.middle(self.pool2(x))
        x = self.right2(torch.cat([self.up2(x), second], 1))
        x = self.right1(self.up1(x) + first)
        return self.head(x)


def draw(model: nn.Module, folder: Path, inputs: Any = None, **options: Any) -> Element:
    return ElementTree.parse(rz.draw(model, folder / "drawn.svg", inputs, **options)).getroot()


def of_class(drawn: Element, kind: str) -> list[Element]:
    return [element for element in drawn.iter() if element.get("class") == kind]


def blocks(drawn: Element) -> list[Element]:
    return [element for element in drawn.iter(f"{SVG}g") if element.get("class", "").startswith("block")]


def texts(drawn: Element, kind: str) -> list[str]:
    """All that is written, per group of a class."""
    return [" ".join("".join(text.itertext()) for text in one.iter(f"{SVG}text")) for one in of_class(drawn, kind)]


def titles(drawn: Element) -> list[str]:
    return [title.text or "" for title in drawn.iter(f"{SVG}title")]


def struck(drawn: Element) -> list[str]:
    """What is struck through, but for the legend."""
    (legend,) = of_class(drawn, "legend")
    known = set(legend.iter())
    spans = drawn.iter(f"{SVG}tspan")
    return [one.text or "" for one in spans if one.get("text-decoration") == "line-through" and one not in known]


def sites(drawn: Element, verdict: str) -> int:
    """The adds that boxes of a verdict stand for."""
    kinds = {f"block {verdict}", f"merge {verdict}"}
    return sum(int(one.get("data-sites", 0)) for one in drawn.iter() if one.get("class") in kinds)


def check(drawn: Element) -> None:
    """Self-contained, within its width, every text within its box."""
    width = float(drawn.get("width", 0))
    assert width <= WIDTH
    assert {element.tag.removeprefix(SVG) for element in drawn.iter()} <= set(
        "svg title style rect g path circle text tspan".split()
    )
    assert not [element for element in drawn.iter() if any("href" in key for key in element.attrib)]
    for text in drawn.iter(f"{SVG}text"):
        assert right_of(text) <= width, "".join(text.itertext())
    for box in drawn.iter(f"{SVG}g"):
        if "box" in box.get("class", "").split():
            rect = box.find(f"{SVG}rect")
            assert rect is not None
            left, edge = float(rect.get("x", 0)), float(rect.get("x", 0)) + float(rect.get("width", 0))
            low = float(rect.get("y", 0)) + float(rect.get("height", 0))
            assert 0 <= left < edge <= width
            for text in box.findall(f"{SVG}text"):
                assert left < float(text.get("x", 0))
                assert right_of(text) <= edge, "".join(text.itertext())
                assert float(rect.get("y", 0)) < float(text.get("y", 0)) < low


def right_of(text: Element) -> float:
    return float(text.get("x", 0)) + CHARACTER * len("".join(text.itertext()))


# What is refused


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(rz.ConversionError, match=r"must be a torch\.nn\.Module"):
        rz.draw("resnet50", tmp_path / "x.svg")  # type: ignore[arg-type]


def test_refuses_an_option(tmp_path: Path) -> None:
    with pytest.raises(rz.ConversionError, match="did you mean 'layer'"):
        rz.draw(Residual(), tmp_path / "x.svg", vectors(), drop_norm="layr")


@pytest.mark.parametrize("name", ["no/such/x.svg", "."])
def test_refuses_a_path_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(rz.ConversionError, match="cannot be written"):
        rz.draw(Residual(), tmp_path / name, vectors())
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x.svg"
    file.write_text("before")
    with pytest.raises(rz.ConversionError):
        rz.draw(Residual(), file, torch.zeros(2, W + 1))
    assert file.read_text() == "before"


def test_a_model_without_adds_is_a_stream_without_blocks(tmp_path: Path) -> None:
    drawn = draw(nn.Sequential(nn.Linear(W, W), nn.Tanh()), tmp_path, vectors())
    assert not blocks(drawn)
    assert texts(drawn, "plain box") == [f"0:Linear{ARROW}1:Tanh"]


@pytest.mark.parametrize("name", ["a<b>&\"'c", "tab\tand\x00control\x1b", "\ud800", "]]>", "x" * 300])
def test_names_are_escaped_and_cut(name: str, tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(W, W))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.get_submodule(name)(x))

    drawn = draw(Named(), tmp_path, vectors())
    check(drawn)
    assert len(blocks(drawn)) == 1
    if name.isprintable():
        assert any(name in title for title in titles(drawn))


def test_boxes_of_other_shapes_are_not_folded() -> None:
    narrow, wide = Box("block", (0,), "converted", shape=(1, 8)), Box("block", (1,), "converted", shape=(1, 16))
    assert folded([narrow, wide]) == (narrow, wide)


# What is drawn


def gpt2() -> tuple[nn.Module, Any]:
    import transformers as tf

    return tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=12, n_embd=32, n_head=2, vocab_size=64)), None


def bart() -> tuple[nn.Module, Any]:
    import transformers as tf

    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(encoder_layers=3, decoder_layers=3, vocab_size=64, **sizes, **heads)
    ), None


def resnet50() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.resnet50(), torch.zeros(1, 3, 64, 64, device="meta")


def unet() -> tuple[nn.Module, Any]:
    return UNet(), torch.zeros(1, 3, 32, 32, device="meta")


@pytest.mark.parametrize(
    ("make", "streams", "folds"),
    [
        pytest.param(resnet50, 1, ["2", "3", "5", "2"], id="resnet50"),
        pytest.param(gpt2, 1, ["12"], id="gpt2"),
        pytest.param(bart, 2, ["3", "3"], id="bart"),
        pytest.param(unet, 1, ["2", "2", "2", "2"], id="unet"),
    ],
)
def test_whole_models(
    make: Callable[[], tuple[nn.Module, Any]], streams: int, folds: list[str], tmp_path: Path
) -> None:
    with torch.device("meta"):
        model, inputs = make()
    plan = rz.audit(model, inputs).plan
    drawn = draw(model, tmp_path, inputs)
    check(drawn)
    assert len(of_class(drawn, "stream")) == streams
    assert [fold.get("data-times") for fold in of_class(drawn, "fold")] == folds
    assert sites(drawn, "converted") == len(plan.converted)
    shown = "\n".join(DIGITS.sub("#", title) for title in titles(drawn))
    assert [site.reason for site in plan.of("refused") if DIGITS.sub("#", site.reason) not in shown] == []
    names = {norm.path.rpartition(".")[2] for site in plan.converted for norm in site.norms if norm.action != "keep"}
    assert {text.rpartition(".")[2] for text in struck(drawn)} == names
    assert all(gate.alpha in "".join(drawn.itertext()) for site in plan.converted for gate in site.gates)


def test_an_encoder_is_read_by_the_decoder(tmp_path: Path) -> None:
    with torch.device("meta"):
        model, inputs = bart()
    drawn = draw(model, tmp_path, inputs)
    reading = [text for text in texts(drawn, "block converted") if "reads model.encoder.layers" in text]
    assert ["encoder_attn.q_proj" in text for text in reading] == [True]
    assert len([path for path in of_class(drawn, "way s-reads") if path.get("stroke-dasharray")]) == 1


def test_a_unet_has_its_skips(tmp_path: Path) -> None:
    drawn = draw(UNet(), tmp_path, torch.zeros(1, 3, 32, 32))
    assert len(of_class(drawn, "long")) == 2
    assert [text.split()[0] for text in texts(drawn, "merge refused")] == ["UNet"]
    assert texts(drawn, "shortcut box") == ["shortcut"]


def test_long_skips_are_drawn_and_gated_on_request(tmp_path: Path) -> None:
    class Long(Linears):
        def forward(self, x: Tensor) -> Tensor:
            h = x + torch.tanh(self.a(x))
            h = h + torch.tanh(self.b(h))
            return x + self.c(h)

    drawn = draw(Long(c=nn.Linear(W, W)), tmp_path, vectors())
    (text,) = texts(drawn, "merge long-skip")
    assert "RZ130 spans the block" in text
    assert len(of_class(drawn, "long")) == 1
    gated = draw(Long(c=nn.Linear(W, W)), tmp_path, vectors(), long_skips=True)
    assert sites(gated, "converted") == 3
    assert "alpha_c = 0" in "".join(texts(gated, "merge converted"))


def test_parallel_branches_are_side_by_side(tmp_path: Path) -> None:
    class Parallel(Linears):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + torch.tanh(self.a(h)) + torch.relu(self.b(h))

    drawn = draw(Parallel(norm=nn.LayerNorm(W)), tmp_path, vectors())
    (block,) = blocks(drawn)
    left, right = (one.find(f"{SVG}rect") for one in block.findall(f"{SVG}g[@class='box']"))
    assert left is not None
    assert right is not None
    assert left.get("y") == right.get("y")
    assert float(left.get("x", 0)) + float(left.get("width", 0)) < float(right.get("x", 0))
    assert struck(drawn) == ["norm", "norm"]


def test_an_excluded_block_is_refused_with_its_reason(tmp_path: Path) -> None:
    drawn = draw(nn.Sequential(Residual(), Residual()), tmp_path, vectors(), exclude="1")
    assert (sites(drawn, "converted"), sites(drawn, "refused")) == (1, 1)
    assert "RZ900 excluded by '1'" in "".join(texts(drawn, "block refused"))


def test_adds_that_lie_on_no_stream_are_listed(tmp_path: Path) -> None:
    class Two(Linears):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + torch.tanh(self.a(x)), self.b(x) + self.a(x)

    drawn = draw(Two(), tmp_path, vectors())
    check(drawn)
    assert sites(drawn, "converted") == 1
    (text,) = texts(drawn, "beside")
    assert "RZ903" in text


def test_a_converted_model_shows_what_was_done_and_todays_alphas(tmp_path: Path) -> None:
    model = rz.convert(nn.Sequential(Normed(), Normed()), vectors())
    for number, (_, alpha) in enumerate(rz.alphas(model)):
        alpha.data.fill_(number / 4)
    drawn = draw(model, tmp_path, vectors())
    assert sites(drawn, "gated") == 2
    assert "alpha = 0 to 0.25" in "".join(texts(drawn, "block gated"))
    assert struck(drawn) == ["norm"]


def test_graph_modules(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(Normed(), Normed()))
    drawn = draw(graph, tmp_path, vectors())
    assert sites(drawn, "converted") == 2
    assert struck(drawn)


def test_an_activation_that_moves_is_drawn_in_the_branch(tmp_path: Path) -> None:
    class Activated(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.b(torch.tanh(self.a(x))))

    drawn = draw(Activated(), tmp_path, vectors())
    assert texts(drawn, "plain box") == []
    assert f"b{ARROW}relu" in "".join(texts(drawn, "block converted"))
    kept = draw(Activated(), tmp_path, vectors(), activation="keep")
    assert texts(kept, "plain box") == ["relu"]
    assert "relu" not in "".join(texts(kept, "block converted"))


def test_flat_graphs_fold_by_the_numbers_of_their_names(tmp_path: Path) -> None:
    graph = make_fx(nn.Sequential(*(Residual() for _ in range(4))))(vectors())
    drawn = draw(graph, tmp_path, vectors())
    assert sites(drawn, "converted") == 4
    assert [fold.get("data-times") for fold in of_class(drawn, "fold")] == ["4"]


def test_norms_behind_the_sum_stay_in_the_drawing_of_a_converted_model(tmp_path: Path) -> None:
    class Post(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + torch.tanh(self.a(x)))

    model = nn.Sequential(Post(norm=nn.LayerNorm(W)), Post(norm=nn.LayerNorm(W)))
    before = draw(model, tmp_path, vectors())
    after = draw(rz.convert(model, vectors()), tmp_path, vectors())
    for drawn in (before, after):
        assert [text.rpartition(".")[2] for text in texts(drawn, "plain box")] == ["norm"]
        assert len(struck(drawn)) == 1


def test_a_block_that_runs_three_times_is_one_box(tmp_path: Path) -> None:
    class Tied(Net):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    drawn = draw(Tied(block=Residual()), tmp_path, vectors())
    assert sites(drawn, "converted") == 1
    assert texts(drawn, "fold") == [f"{TIMES} 3 block"]
    assert any("runs 3 times" in title for title in titles(drawn))


def test_folds_within_folds() -> None:
    def box(cls: str, at: int) -> Box:
        return Box(
            "block", (at,), "converted", (f"{cls}.{at}",), cls, (Branch((), "alpha", (float(at),)),), sites=(at,)
        )

    made = folded([box(cls, at) for at, cls in enumerate("aabaab")])
    assert made == (
        Fold(
            2,
            (
                Fold(
                    2,
                    (
                        Box(
                            "block",
                            (0, 3, 1, 4),
                            "converted",
                            ("a.0", "a.3", "a.1", "a.4"),
                            "a",
                            (Branch((), "alpha", (0.0, 3.0, 1.0, 4.0)),),
                            sites=(0, 3, 1, 4),
                        ),
                    ),
                ),
                Box(
                    "block",
                    (2, 5),
                    "converted",
                    ("b.2", "b.5"),
                    "b",
                    (Branch((), "alpha", (2.0, 5.0)),),
                    sites=(2, 5),
                ),
            ),
        ),
    )


def test_deep_models_fold(tmp_path: Path) -> None:
    drawn = draw(nn.Sequential(*(Residual() for _ in range(200))), tmp_path, vectors())
    assert sites(drawn, "converted") == 200
    assert float(drawn.get("height", 0)) < 400


# The command line


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "drawn_net", raising=False)
    file = tmp_path / "drawn_net.py"
    file.write_text(TEXT)
    return file


TEXT = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drawn_net.py", "other.py", "--svg", "x.svg"], "--svg is for one file, not 2"),
        (["audit", "drawn_net.py", "timm:resnet18", "--svg", "x.svg"], "--svg is for one target, not 2"),
        (["drawn_net.py", "--svg", "no/x.svg"], "no/x.svg: cannot be written: No such file or directory"),
        (["audit", "drawn_net.py", "--svg", "."], ".: cannot be written: it is a folder"),
    ],
)
def test_command_line_refuses(arguments: list[str], said: str, net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net.with_name("other.py").write_text(TEXT)
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(net.parent.glob("*.svg"))


@pytest.mark.parametrize(
    ("arguments", "folds"),
    [
        pytest.param(["drawn_net.py"], [], id="text"),
        pytest.param(["drawn_net.py", "--model", "Model()", "--inputs", "torch.ones(2, 4)"], ["3"], id="run"),
        pytest.param(["audit", "drawn_net.py"], [], id="audit of text"),
        pytest.param(["audit", "drawn_net:Model", "--inputs", "torch.ones(2, 4)"], ["3"], id="audit of a model"),
    ],
)
def test_command_line(arguments: list[str], folds: list[str], net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--svg", "x.svg"]) == 0, capsys.readouterr().err
    drawn = ElementTree.parse("x.svg").getroot()
    check(drawn)
    assert [fold.get("data-times") for fold in of_class(drawn, "fold")] == folds
    assert sites(drawn, "converted") == (3 if folds else 1)
    assert struck(drawn) == ["norm"]
    assert "wrote x.svg" in capsys.readouterr().err
