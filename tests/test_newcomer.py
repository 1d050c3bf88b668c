"""What a first user stumbled over: each once, so that it stays mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import rezero_convert as rz
from rezero_convert import cli, file_plan


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)


class Parallel(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.a(h) + self.b(h)


class Three(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.norm(x)) + self.b(self.norm(x)) + self.c(x)


class PostNorm(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.a(x) + self.b(x))


class TwoStatements(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.a(h)
        x = x + self.b(h)
        return x


@pytest.mark.parametrize(("cls", "gates"), [(Parallel, 2), (Three, 3), (PostNorm, 2), (TwoStatements, 2)])
def test_linear_branches_beside_each_other_get_a_gate_each(cls: type[nn.Module], gates: int) -> None:
    x = torch.randn(2, 3, 8)
    converted = rz.convert(cls(), x)
    assert len(list(rz.alphas(converted))) == gates
    assert torch.equal(converted(x), x)


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.three(x) + self.one(x))


def test_convolutions_made_to_be_merged_are_refused_as_a_whole() -> None:
    (site,) = rz.audit(RepVGG(), torch.randn(2, 4, 8, 8)).plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ903")


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < 0.9:
            return x
        return x + torch.relu(self.linear(x))


def test_a_block_that_is_dropped_at_random_in_train_mode_is_a_note() -> None:
    x = torch.randn(2, 8)
    converted = rz.convert(nn.Sequential(LayerDrop(), LayerDrop()), x)
    assert len(list(rz.alphas(converted))) == 2
    assert any("did not run in train mode" in note for note in rz.validate(converted, x).notes)


def test_a_converted_model_can_be_traced_and_checked_without_inputs() -> None:
    converted = rz.convert(nn.Sequential(Parallel(), Three()))
    check = rz.validate(converted)
    assert check.ok
    assert "only the structure was checked" in check.notes[-1]
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    x = torch.randn(2, 3, 8)
    assert torch.equal(fx.symbolic_trace(converted)(x), converted(x))


SOURCE = """
import torch
from torch import nn


class Twice(nn.Module):
    def __init__(self, d):
        super().__init__()
        pair = self.n, self.f = nn.LayerNorm(d), nn.Linear(d, d)

    def forward(self, x):
        return x + self.f(self.n(x))


class Registered(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.f = nn.Linear(d, d)
        self.register_parameter("alpha", nn.Parameter(torch.ones(1)))

    def forward(self, x):
        return x + torch.relu(self.f(x))
"""


def test_a_norm_that_cannot_go_stops_neither_its_class_nor_the_others() -> None:
    result = rz.convert_source(SOURCE)
    (norm,) = (norm for site in result.report.plan.converted for norm in site.norms)
    assert norm.action == "keep"
    assert "cannot be taken out of this assignment" in norm.reason
    assert "x + self.alpha * self.f(self.n(x))" in result.text
    assert "self.rezero_alpha * torch.relu" in result.text


def test_one_class_that_cannot_be_rewritten_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = file_plan.source.rewrite

    def picky(text: str, plan: rz.Plan, file: str) -> Any:
        if any(site.cls == "Twice" for site in plan.edited):
            raise rz.ConversionError("not this one")
        return rewrite(text, plan, file)

    monkeypatch.setattr(file_plan.source, "rewrite", picky)
    result = rz.convert_source(SOURCE)
    (refused,) = result.report.plan.of("refused")
    assert (refused.cls, refused.code, refused.reason) == ("Twice", "RZ912", "not this one")
    assert "self.rezero_alpha * torch.relu" in result.text


def test_inputs_that_the_model_cannot_take_are_its_own_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "embeds.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.e = nn.Embedding(4, 8)\n        self.f = nn.Linear(8, 8)\n\n"
        "    def forward(self, i):\n        x = self.e(i)\n        return x + torch.relu(self.f(x))\n"
    )
    assert cli.main([str(file), "--model", "Net()", "--inputs", "torch.tensor([9])"]) == 2
    error = capsys.readouterr().err
    assert "the model raised on the example inputs: IndexError" in error
    assert "fresh process" not in error


def test_the_warning_says_what_kept_a_block_from_being_rewritten() -> None:
    names: dict[str, object] = {"nn": nn, "torch": torch}
    exec(  # a class without source text, whose control flow torch.fx cannot trace
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.f = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n        return x + torch.relu(self.f(x)) if x.sum() > -1e9 else x\n",
        names,
    )
    net = names["Net"]
    assert callable(net)
    with pytest.warns(rz.NoEffectWarning, match="no source text for Net.forward"):
        rz.convert(net(), torch.randn(2, 8))


class DyT(nn.Module):
    """A tanh in the place of a norm (Zhu et al., 2025): not scale-invariant, so a norm only by the user's word."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)


class WithDyT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = DyT(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


def test_norm_types_names_norms_that_do_not_look_like_it() -> None:
    x = torch.randn(2, 8)
    assert not any(site.norms for site in rz.audit(WithDyT(), x).plan.sites)
    converted = rz.convert(WithDyT(), x, norm_types=(DyT,))
    assert "norm.scale" not in converted.state_dict()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_decoder_with_masks_is_gated_in_eval_without_gradients(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerDecoder(layer, 2).eval()
    shape, memory_shape = ((2, 5, 16), (2, 7, 16)) if batch_first else ((5, 2, 16), (7, 2, 16))
    inputs = {
        "tgt": torch.randn(shape),
        "memory": torch.randn(memory_shape),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.zeros(2, 7, dtype=torch.bool),
    }
    converted = rz.convert(model, inputs).eval()
    assert len(list(rz.alphas(converted))) == 2 * 3
    with torch.no_grad():
        assert torch.equal(converted(**inputs), inputs["tgt"])
        nn.init.constant_(converted.layers[0].alpha_multihead_attn, 0.5)
        assert not torch.equal(converted(**inputs), inputs["tgt"])


# --- of a second trial ---


class ScaledInTraining(nn.Module):
    """An arm that did not run, with a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if torch.rand(()) < 0.5:
                return x
            x = x + torch.tanh(self.f(x)) * 2
        else:
            x = x + torch.tanh(self.f(x))
        return x


class ScaledByName(ScaledInTraining):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if torch.rand(()) < 0.5:
                return x
            h = torch.tanh(self.f(x))
            return x + h * 2
        return x + torch.tanh(self.f(x))


@pytest.mark.parametrize("make", [ScaledInTraining, ScaledByName])
def test_an_arm_with_a_factor_is_gated_like_the_one_that_ran(make: Any) -> None:
    x = torch.randn(2, 8)
    converted = rz.convert(make(), x)
    assert sorted(site.verdict for site in rz.audit(converted).plan.sites) == ["converted", "not-executed"]
    assert all(torch.equal(converted.train()(x), x) for _ in range(20))


STREAM = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.LayerNorm(8)
        self.f = nn.Linear(8, 8)

    def forward(self, o):
        r = o[0] + o[1]
        return torch.tanh(self.f(self.n(r))), r


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.bs = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        o = (torch.zeros_like(x), x)
        for b in self.bs:
            o = b(o)
        return o[0] + o[1]
"""


@pytest.mark.parametrize("run", [False, True])
def test_a_norm_stays_in_a_file_where_not_all_of_its_blocks_are_gated(run: bool, tmp_path: Path) -> None:
    file = tmp_path / "stream.py"
    file.write_text(STREAM)
    scope: dict[str, Any] = {"__name__": "stream"}
    exec(compile(STREAM, str(file), "exec"), scope)
    exact: dict[str, Any] = {"model": scope["Net"](), "example_inputs": torch.randn(2, 8)} if run else {}
    made = rz.convert_source(STREAM, file=str(file), **exact)
    assert "self.n = nn.LayerNorm(8)" in made.text
    assert "self.f(self.n(r))" in made.text


class Counted(nn.Module):
    """Which of two adds runs depends on the outer loop's count."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            for f in stage:  # type: ignore[attr-defined]
                if i % 2:
                    x = x + torch.tanh(f(x))
                else:
                    x = x + 0.5 * torch.tanh(f(x))
        return x


def test_an_add_of_some_outer_passes_is_refused() -> None:
    sites = rz.audit(Counted(), torch.randn(2, 8)).plan.sites
    assert [site.code for site in sites] == ["RZ911", "RZ911"]
    assert all("not every pass" in site.reason for site in sites)


class FirstNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(8)
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.n(x))


class Towards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, torch.tanh(self.f(x)), 0.4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("make", [FirstNorm, Towards])
@pytest.mark.parametrize("exported", [False, True])
def test_graphs_with_a_norm_of_the_input_and_with_a_number_for_a_weight(make: Any, exported: bool) -> None:
    model, x = make(), torch.randn(2, 8)
    graph = torch.export.export(model, (x,)).module() if exported else torch.fx.symbolic_trace(model)
    converted = rz.convert(graph, x)
    assert torch.equal(converted(x), x)
    assert not hasattr(converted, "n")
    same = rz.convert(graph, x, alpha_init="preserve")
    torch.testing.assert_close(same(x), model(x))


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = FirstNorm()
        self.bs = nn.ModuleList(FirstNorm() for _ in range(4))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, use: bool = False) -> Tensor:
        x = self.a(x) if use else x
        for b in self.bs[:2]:
            x = b(x)
        return x


def test_modules_that_did_not_run_are_named() -> None:
    x = torch.randn(2, 8)
    (note,) = rz.audit(Partly(), x).plan.notes
    assert note.startswith("did not run, and is not judged: a, bs.{2,3};")
    assert not rz.audit(FirstNorm(), x).plan.notes


ZERO_PARAMETERS = """
import torch
from torch import nn


class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(8, 8))
        self.w = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        return x + torch.relu(x @ self.v) @ self.w


class Filled(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(8, 8))
        self.w = nn.Parameter(torch.empty(8, 8))
        nn.init.zeros_(self.w)

    def forward(self, x):
        return x + torch.relu(x @ self.v) @ self.w
"""


@pytest.mark.parametrize("cls", ["Made", "Filled"])
@pytest.mark.parametrize("run", [False, True])
def test_a_zero_parameter_of_a_file_gets_a_start_value_of_its_own(cls: str, run: bool, tmp_path: Path) -> None:
    file = tmp_path / f"zeros_{cls.lower()}.py"
    file.write_text(ZERO_PARAMETERS)
    scope: dict[str, Any] = {"__name__": "zeros"}
    exec(compile(ZERO_PARAMETERS, str(file), "exec"), scope)
    x = torch.randn(2, 8)
    exact: dict[str, Any] = {"model": scope[cls](), "example_inputs": x} if run else {}
    made = rz.convert_source(ZERO_PARAMETERS, file=str(file), **exact)
    exec(made.text, scope)
    model = scope[cls]()
    assert torch.equal(model(x), x)
    model(x).sum().backward()
    assert model.alpha.grad.count_nonzero()
    assert 0 < model.w.abs().max() < 1


def test_a_zero_parameter_that_the_file_fills_later_is_left() -> None:
    text = ZERO_PARAMETERS.replace("torch.empty", "torch.zeros").replace("nn.init.zeros_", "nn.init.xavier_uniform_")
    text = text[: text.index("class Made")] + text[text.index("class Filled") :]
    assert "kaiming" not in rz.convert_source(text).text


ARMS = """
import torch
from torch import nn


def on_a_part(x, f):
    return torch.index_add(x, 0, torch.arange(1), f(x[:1]), alpha=2.0)


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.f = nn.Linear(8, 8)
        self.drop = nn.Dropout(rate)
        self.rate = rate

    def forward(self, x):
        def branch(x):
            return torch.tanh(self.f(self.norm(x)))

        if self.training and self.rate > 0.5:
            x = on_a_part(x, branch)
        elif self.training and self.rate > 0:
            x = x + self.drop(branch(x))
        else:
            x = x + branch(x)
        return x


class Net(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(rate) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x
"""


def test_the_report_of_arms_says_what_is_done(tmp_path: Path) -> None:
    """The norm before both arms also serves a third one, which gets no gate: it stays, in memory and in the file."""
    file = tmp_path / "arms.py"
    file.write_text(ARMS)
    scope: dict[str, Any] = {"__name__": "arms"}
    exec(compile(ARMS, str(file), "exec"), scope)
    model, x = scope["Net"](), torch.randn(3, 8)
    made = rz.convert_source(ARMS, file=str(file), model=model, example_inputs=x)
    for report in (made.report, rz.audit(model, x)):
        assert len(report.plan.converted) == 2
        assert "4 gates" not in str(report)
        assert "2 gates, 0 norms dropped" in str(report)
        assert {site.path for site in report.plan.edited} == {"blocks.0", "blocks.1"}
        assert {norm.action for site in report.plan.edited for norm in site.norms} == {"keep"}
    assert "torch.tanh(self.f(self.norm(x)))" in made.text
    assert "x + self.alpha_f * self.drop(branch(x))" in made.text
    assert "x + self.alpha_f * branch(x)" in made.text
    exec(made.text, scope)
    assert rz.convert(model, x).state_dict().keys() == scope["Net"]().state_dict().keys()


COUNTING = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, n=5):
        super().__init__()
        self.n = n
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(n))

    def forward(self, x):
        x = self.layers[0](x) * 0.5
        for i in {walk}:
            x = x + torch.tanh(self.layers[{at}](x))
        return x
"""


@pytest.mark.parametrize(
    ("walk", "index", "count"),
    [
        ("range(self.n)", "i", 5),
        ("range(1, self.n)", "i - 1", 4),
        ("range(1, len(self.layers))", "i - 1", 4),
        ("reversed(range(1, self.n))", "i - 1", 4),
        ("range(0, self.n, 2)", "i // 2", 3),
        ("range(1, self.n, 3)", "(i - 1) // 3", 2),
        ("range(self.n - 1, -1, -1)", "i", 5),
    ],
)
def test_a_loop_by_number_may_start_and_step_anywhere(walk: str, index: str, count: int, tmp_path: Path) -> None:
    text = COUNTING.replace("{walk}", walk).replace("{at}", "i")
    file = tmp_path / "counting.py"
    file.write_text(text)
    scope: dict[str, Any] = {"__name__": "counting"}
    exec(compile(text, str(file), "exec"), scope)
    model, x = scope["Net"](), torch.randn(2, 8)
    live, preserved = rz.convert(model, x), rz.convert(model, x, alpha_init="preserve")
    assert [name for name, _ in rz.alphas(live)] == [f"alpha.{number}" for number in range(count)]
    assert torch.equal(preserved(x), model(x))
    for made in (rz.convert_source(text), rz.convert_source(text, file=str(file), model=model, example_inputs=x)):
        assert f"x + self.alpha[{index}] * torch.tanh(" in made.text
        exec(made.text, scope)
        twin = scope["Net"]()
        for number, (_, alpha) in enumerate(rz.alphas(live)):
            torch.nn.init.constant_(alpha, 0.1 + number)
        twin.load_state_dict(live.state_dict())
        assert torch.equal(twin(x), live(x))


@pytest.mark.parametrize(
    ("walk", "at"), [("range(1, self.n)", "i - 1"), ("range(self.n - 1, 0, -1)", "i"), ("range(self.n - 2, 5)", "i")]
)
def test_a_loop_by_number_that_is_not_followed_is_refused(walk: str, at: str) -> None:
    text = COUNTING.replace("{walk}", walk).replace("{at}", at)
    made = rz.convert_source(text)
    assert [site.code for site in made.report.plan.sites] == ["RZ911"]
    assert made.text == text


STAGES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))

    def forward(self, x):
        for i in range(1, len(self.stages)):
            for f in self.stages[i]:
                x = x + torch.tanh(f(x))
        return x
"""


def test_an_outer_loop_by_number_may_start_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "stages.py"
    file.write_text(STAGES)
    scope: dict[str, Any] = {"__name__": "stages"}
    exec(compile(STAGES, str(file), "exec"), scope)
    model, x = scope["Net"](), torch.randn(2, 8)
    live = rz.convert(model, x)
    exec(rz.convert_source(STAGES).text, scope)
    assert [name for name, _ in rz.alphas(live)] == ["alpha.0.0", "alpha.0.1", "alpha.1.0", "alpha.1.1"]
    twin = scope["Net"]()
    twin.load_state_dict(live.state_dict())
    assert torch.equal(twin(x), x)


PARAMETER_LISTS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        {walk}
            x = x + {branch}
        return x
"""


@pytest.mark.parametrize(
    ("walk", "branch", "walked", "count"),
    [
        ("for w, layer in zip(self.ws, self.layers):", "torch.tanh(layer(x @ w))", "self.layers", 3),
        ("for w, layer in zip(self.ws, self.layers):", "torch.tanh(layer(x)) @ w", "self.ws", 3),
        ("for w in self.ws:", "torch.tanh(x @ w)", "self.ws", 3),
        ("for w in self.ws[1:]:", "torch.tanh(x @ w)", "self.ws[1:]", 2),
        ("for i in range(3):", "torch.tanh(x @ self.ws[i])", "self.ws", 3),
    ],
)
def test_a_list_of_parameters_is_walked_alike_on_every_route(
    walk: str, branch: str, walked: str, count: int, tmp_path: Path
) -> None:
    text = PARAMETER_LISTS.replace("{walk}", walk).replace("{branch}", branch)
    file = tmp_path / "lists.py"
    file.write_text(text)
    scope: dict[str, Any] = {"__name__": "lists"}
    exec(compile(text, str(file), "exec"), scope)
    model, x = scope["Net"](), torch.randn(2, 8)
    exact: dict[str, Any] = {"file": str(file), "model": model, "example_inputs": x}
    for report in (rz.audit(model, x), rz.audit_source(text), rz.audit_source(text, **exact)):
        ((gate,),) = [site.gates for site in report.plan.converted]
        assert [loop.modules for loop in gate.loops] == [walked]
    live = rz.convert(model, x)
    assert [name for name, _ in rz.alphas(live)] == [f"alpha.{number}" for number in range(count)]
    for made in (rz.convert_source(text), rz.convert_source(text, **exact)):
        exec(made.text, scope)
        twin = scope["Net"]()
        for number, (_, alpha) in enumerate(rz.alphas(live)):
            torch.nn.init.constant_(alpha, 0.1 + number)
        twin.load_state_dict(live.state_dict())
        assert torch.equal(twin(x), live(x))


ZEROS = """\
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)
        self.norm2, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, where):
        y = self.norm1(x)
        x = x + self.self_attn(y + where, y + where, y)[0]
        return x + self.fc(self.norm2(x) + where)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, where):
        x = torch.zeros_like(where)
        for layer in self.layers:
            x = layer(x, where)
        return x
"""


def test_a_gate_that_the_rewritten_model_has_no_branch_for_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decoder.py"
    file.write_text(ZEROS)
    given = ["--model", "Decoder()", "--inputs", "torch.randn(3, 2, 8),"]
    assert cli.main([str(file), *given]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "3 gated blocks were validated" in told
    assert "layers.0.alpha_self_attn gates a branch that the rewritten model has not" in told
    assert cli.main([str(file), *given, "--drop-norm", "none"]) == 0
    assert "that the rewritten model has not" not in capsys.readouterr().err
    space: dict[str, Any] = {"__name__": "decoder"}
    exec(compile(ZEROS, str(file), "exec"), space)
    model, where = space["Decoder"](), torch.randn(3, 2, 8)
    with pytest.raises(rz.ConversionError, match=r"layers\.0\.alpha_self_attn"):
        rz.convert(model, where)
    assert len(list(rz.alphas(rz.convert(model, where, exclude="layers.0")))) == 2
