from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html import escape as html_escape
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rezero_convert as rz
from rezero_convert.codes import CODES
from rezero_convert.listing import compact, short, shortened
from rezero_convert.options import options
from rezero_convert.plan import NORM_KINDS, Gate, Norm, Options, Place, Plan, Repair, Site, Span
from rezero_convert.report import Report, grouped

PLACE = Place("net", "Block.forward", "net.py", 10)
README = Path(__file__).parent.parent / "README.md"


def block(path: str, **changes: object) -> Site:
    site = Site(
        verdict="converted",
        code="RZ101",
        reason="",
        path=path,
        cls="Block",
        place=PLACE,
        span=Span("net.py", 12, 8, 12, 40),
        text="        x = x + self.attn(self.ln_1(x))  # [bold]not markup[/bold]\n",
        form="pre-norm",
        gates=(Gate(None, "alpha_attn", "attn", "self.attn(self.ln_1(x))"),),
        norms=(Norm(f"{path}.ln_1", "LayerNorm", "layer", "pre", "bypass", ""),),
    )
    return replace(site, **changes)  # type: ignore[arg-type]


def refusal(path: str, line: int = 40) -> Site:
    span = Span("net.py", line, 4, line, 20)
    return block(
        path, verdict="refused", code="RZ907", reason="adds a parameter", span=span, gates=(), norms=(), form=""
    )


@pytest.fixture
def plan() -> Plan:
    blocks = tuple(block(f"blocks.{index}") for index in range(12))
    return Plan((refusal(""), *blocks), Options(), "static", scalars=3, notes=("a note of the plan",))


# Options: what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param({"drop_norms": "layer"}, "did you mean 'drop_norm'?", id="unknown option"),
        pytest.param({"drop_norm": "layr"}, "did you mean 'layer'?", id="misspelt kind"),
        pytest.param({"drop_norm": "layr"}, "layer, batch, group, instance, none, all", id="valid kinds listed"),
        pytest.param({"drop_norm": "all,batch"}, "'all' stands alone", id="all with another"),
        pytest.param({"drop_norm": ("none", "layer")}, "'none' stands alone", id="none with another"),
        pytest.param({"drop_norm": 3}, "drop_norm must be a string", id="kind of the wrong type"),
        pytest.param({"drop_norm": ""}, "unknown drop_norm ''", id="no kind"),
        pytest.param({"alpha_init": "preserved"}, "a finite number or 'preserve'", id="alpha a word"),
        pytest.param({"alpha_init": float("nan")}, "finite", id="alpha nan"),
        pytest.param({"alpha_init": True}, "finite", id="alpha a bool"),
        pytest.param({"activation": "brnch"}, "did you mean 'branch'?", id="activation"),
        pytest.param({"share": "model"}, "valid: branch, layer", id="share"),
        pytest.param({"method": "fixpu"}, "unknown method 'fixpu' (valid: rezero, ", id="method"),
        pytest.param({"include": [1]}, "include must hold strings", id="pattern of the wrong type"),
        pytest.param({"exclude": "a,,b"}, "exclude: an empty pattern", id="empty pattern"),
        pytest.param({"long_skips": "yes"}, "long_skips must be True or False", id="flag"),
        pytest.param({"norm_types": "MyNorm"}, "norm_types must be a class", id="norm type by name"),
        pytest.param({"norm_types": (1,)}, "norm_types must hold classes", id="norm type no class"),
    ],
)
def test_options_refuses(given: dict[str, object], said: str) -> None:
    with pytest.raises(rz.ConversionError, match=re.escape(said)):
        options(**given)


def test_options_defaults_are_those_of_the_record() -> None:
    assert options() == Options()
    assert options(alpha_init=None, drop_norm=None) == Options()


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ("none", ()),
        ((), ()),
        ("all", NORM_KINDS),
        ("batch,layer", ("layer", "batch")),
        (["batch", "layer", "batch"], ("layer", "batch")),
    ],
)
def test_drop_norm(given: object, kinds: tuple[str, ...]) -> None:
    assert options(drop_norm=given).drop_norm == kinds


def test_preserve_changes_the_defaults_and_explicit_values_win() -> None:
    kept = options(alpha_init="preserve")
    assert (kept.drop_norm, kept.activation, kept.preserve) == ((), "keep", True)
    asked = options(alpha_init="preserve", drop_norm="layer", activation="branch")
    assert (asked.drop_norm, asked.activation) == (("layer",), "branch")


def test_options_from_the_command_line_and_from_python_agree() -> None:
    assert options(alpha_init="0.5", include=["a,b", "c"]) == options(alpha_init=0.5, include=("a", "b", "c"))


# Codes


def test_codes_are_distinct_and_documented() -> None:
    assert len(set(CODES.values())) == len(CODES)
    assert all(re.fullmatch(r"RZ[19]\d\d", code) for code in CODES)
    table = README.read_text().split("<!-- codes -->")[1].split("<!-- end -->")[0]
    assert table.split("|---|---|\n")[1] == "".join(f"| {code} | {meaning} |\n" for code, meaning in CODES.items())


def test_codes_in_the_package_are_in_the_table() -> None:
    package = Path(rz.__file__).parent
    used = {code for file in package.rglob("*.py") for code in re.findall(r'"(RZ\d+)"', file.read_text())}
    assert used <= set(CODES)


# Grouping


def test_different_reasons_gates_and_norms_are_not_grouped() -> None:
    sites = [
        block("b.0"),
        block("b.1", reason="another"),
        block("b.2", gates=()),
        block("b.3", norms=()),
        block("b.4", form="post-norm"),
        block("b.5", cls="Other"),
        block("b.6", span=Span("net.py", 13, 8, 13, 40)),
        block("b.7", repairs=(Repair("b.7.fc.weight", "reset"),)),
    ]
    assert [one.paths for one in grouped(sites)] == [(f"b.{index}",) for index in range(8)]


def test_reasons_that_differ_in_their_paths_only_are_grouped() -> None:
    sites = [block(f"s.{index}.0", reason=f"the skip is s.{index}.0.down of s.{index - 1}.1.relu") for index in (1, 2)]
    assert [one.paths for one in grouped(sites)] == [("s.1.0", "s.2.0")]


def test_equal_blocks_are_one_group_and_changes_come_first(plan: Plan) -> None:
    first, second = grouped(plan.sites)
    assert first.paths == tuple(f"blocks.{index}" for index in range(12))
    assert second.first.verdict == "refused"


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        ([""], "(the model)"),
        (["blocks.0", "blocks.1"], "blocks.{0,1}"),
        (["blocks.0", "blocks.2"], "blocks.{0,2}"),
        ([f"blocks.{index}" for index in range(12)], "blocks.{0..11}"),
        (["layer1.0", "layer1.1", "layer2.0"], "layer1.{0,1}, layer2.0"),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], "s.{0,1}.b.{0,1}"),
        (["b.01", "b.1"], "b.01, b.1"),
        (["a", "b"], "a, b"),
        (["a", "a"], "a"),
    ],
)
def test_compact(paths: list[str], shown: str) -> None:
    assert compact(paths) == shown


def test_compact_stops_somewhere() -> None:
    names = [letter * 2 for letter in "abcdefghijklmnop"]
    assert compact(names, limit=3) == "aa, bb, cc, and 13 more"


def test_places_in_sentences_are_as_short_as_in_the_first_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"spans the block at {tmp_path}/models/net.py:3:4, as {tmp_path}/other.py does and ./net.py:5"
    assert shortened(text) == f"spans the block at models/net.py:3:4, as {tmp_path}/other.py does and ./net.py:5"


# Text


def test_text_tells_everything_and_fits(plan: Plan) -> None:
    odd = block("deep." * 30 + "end", reason="why " * 60, text="    y = " + "very_long_name + " * 20 + "x\n")
    text = str(Report(replace(plan, sites=(*plan.sites, odd)), title="Net", notes=("noted",)))
    assert "net.py:12:9 RZ101 converted pre-norm: blocks.{0..11} (x 12), Block, alpha_attn" in text
    assert "    x = x + self.attn(self.ln_1(x))" in text
    assert "dropped ln_1 (LayerNorm, pre)" in text
    assert "net.py:40:5 RZ907 refused: Block" in text
    assert "note: a note of the plan" in text
    assert "note: noted" in text
    assert "total: 13 converted, 1 refused; 13 gates, 13 norms dropped; 3 integer or scalar adds" in text
    unbreakable = max(len(word) for word in text.split())
    assert all(len(line) <= max(100, unbreakable + 8) for line in text.splitlines())
    assert "\x1b" not in text


def test_text_of_nothing() -> None:
    assert str(Report(Plan((), route="static"))).endswith("total: no adds of tensors")


def test_files_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short(str(tmp_path / "a" / "net.py")) == "a/net.py"
    assert short(torch.nn.modules.linear.__file__) == "torch/nn/modules/linear.py"
    assert short("/" + "folder/" * 20 + "net.py").startswith("...")


@pytest.mark.parametrize("width", [40, 80, 160])
def test_rich_keeps_brackets_and_every_gate(plan: Plan, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Report(plan, title="Net[3]"))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert "Net[3]" in text
    if width == 160:
        assert "[bold]not markup[/bold]" in text
        assert "x 12" in text
        assert "alpha_attn" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_places_are_not_broken_off_on_a_narrow_screen(plan: Plan, width: int) -> None:
    file = "package/models/vision_transformer.py"
    sites = tuple(replace(site, span=Span(file, 1234, 8, 1234, 20)) for site in plan.sites)
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(Report(replace(plan, sites=sites), title="Net"))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert any(f"{file}:1234:9" in line for line in lines)
    assert any("alpha_attn" in line for line in lines)


def test_a_name_wider_than_the_screen_is_parted_after_a_separator(plan: Plan) -> None:
    file = "/".join(["folder"] * 5 + ["vision_transformer.py"])
    site = replace(plan.sites[0], span=Span(file, 1, 0, 1, 5), reason="")
    console = Console(width=30, file=io.StringIO(), record=True)
    console.print(Report(replace(plan, sites=(site,)), title="Net"))
    assert "\nfolder/folder/folder/folder/\nfolder/\nvision_transformer.py:1:1\n" in console.export_text()


def test_html(plan: Plan) -> None:
    html = Report(plan)._repr_html_()
    assert html.startswith("<p><b>model: audit")
    assert "<td>alpha_attn</td>" in html
    for site in plan.sites:
        assert html_escape(site.text.strip()) in html
        assert html_escape(site.form or site.reason) in html


class Looped(torch.nn.Module):
    """Four branches behind one add; and a norm that two branches read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        self.norm, self.a, self.b = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        x = x + torch.relu(self.a(self.norm(x)))
        return x + torch.relu(self.b(self.norm(x)))


def test_the_total_counts_gates_and_norms_of_the_model() -> None:
    model, x = Looped(), torch.randn(2, 8)
    line = str(rz.audit(model, x)).splitlines()[-1]
    assert f"{len(list(rz.alphas(rz.convert(model, x))))} gates, 1 norm dropped" in line


def test_the_short_form_is_one_line(plan: Plan) -> None:
    assert repr(Report(plan, title="Net")).startswith("<Report on Net, total: ")
    assert "\n" not in repr(Report(plan))


# JSON


def test_json_round_trip(plan: Plan) -> None:
    report = Report(plan, title="Net", alphas={"a": torch.tensor([float("nan")]), "b": torch.ones(3)})
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["version"] == 1
    assert found["counts"] == {
        "converted": 12,
        "gated": 0,
        "refused": 1,
        "long-skip": 0,
        "interior": 0,
        "not-executed": 0,
        "hidden": 0,
        "folded": 0,
    }
    assert len(found["sites"]) == 13
    assert [group["count"] for group in found["groups"]] == [12, 1]
    assert found["groups"][0]["paths"][11] == "blocks.11"
    assert found["groups"][0]["remarks"][-1].startswith("dropped ")
    assert found["alphas"] == {"a": ["nan"], "b": [1.0, 1.0, 1.0]}
    assert found["scalars"] == 3
    assert found["options"]["drop_norm"] == ["layer"]
    assert found["changes"] is True


# Today's alphas


def test_alphas_are_read_once() -> None:
    alpha = torch.nn.Parameter(torch.zeros(1))
    report = Report(Plan(()), alphas={"alpha": alpha})
    with torch.no_grad():
        alpha.fill_(7.0)
    assert "alpha 0: alpha" in str(report)


def test_alphas_of_channels_and_meta() -> None:
    alphas = {
        "ls.gamma": torch.tensor([1.0, -2.0]),
        "m.alpha": torch.zeros(1, device="meta"),
        "blocks.0.alpha": 0.25,
        "blocks.1.alpha": 0.25,
    }
    text = str(Report(Plan(()), alphas=alphas))
    assert "mean|alpha| 1.5, -2 to 1 (2 channels): ls.gamma" in text
    assert "without a value (meta): m.alpha" in text
    assert "alpha 0.25: blocks.{0,1}.alpha" in text


def test_changes(plan: Plan) -> None:
    assert Report(plan).changes
    assert not Report(plan, converted=True).changes
    assert not Report(replace(plan, sites=(refusal(""),))).changes


# The package


def test_submodules_do_not_hide_public_functions() -> None:
    import rezero_convert.api
    import rezero_convert.validation  # noqa: F401

    for name in rz.__all__:
        assert callable(getattr(rz, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rz.nonsense  # noqa: B018
