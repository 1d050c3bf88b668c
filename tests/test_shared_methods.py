"""One add that several calls share, as in fairseq's `residual_connection`: each call is a block of its own, and its
gate is written there, around the argument that becomes the branch."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F

import rezero_convert as rz
from rezero_convert.capture.live import trace_live
from rezero_convert.detect import detect

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.attn = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 2 * d)
        self.fc2 = nn.Linear(2 * d, d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = nn.Dropout(0.1)
        self.scale = 1.0
        self.shift = nn.Parameter(torch.ones(d))
        self.first = True

    def mlp(self, x):
        return self.fc2(F.relu(self.fc1(x)))

"""

CALLS = """
    def forward(self, x):
        x = self.join(self.attn(self.norm1(x)), x)
        return self.join(self.mlp(self.norm2(x)), x)
"""


def join(*lines: str, head: str = "def join(self, x, residual):") -> str:
    """A method that adds, and a `forward` that calls it twice."""
    return textwrap.indent("\n".join((head, *(f"    {line}" for line in lines))), "    ") + "\n" + CALLS


def method(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    ") + "\n"


_number = itertools.count()


def loaded(text: str, folder: Path) -> Any:
    """The text as a module of its own, from a file."""
    name = f"shared_methods_{next(_number)}"
    file = folder / f"{name}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def made(text: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = loaded(text, folder).Layer().eval()
    return model


def opened(model: nn.Module) -> nn.Module:
    """The model with its gates at values of their own."""
    for number, (_, alpha) in enumerate(rz.alphas(model)):
        nn.init.constant_(alpha, 0.3 + 0.2 * number)
    return model


NOT_ONE = "its operand is not one argument"
REFUSED = {
    "a bias before the add": (join("return residual + self.dropout(x + self.shift)"), NOT_ONE),
    "a nonlinearity before the add": (join("return residual + torch.tanh(x)"), NOT_ONE),
    "a square": (join("return residual + x * x"), NOT_ONE),
    "a norm before the add": (join("return residual + self.norm1(x)"), NOT_ONE),
    "the branch is kept": (join("self.last = x", "return residual + x"), "reads its argument x in line 24, too"),
    "the branch is returned, too": (
        method("""
        def join(self, x, residual):
            return residual + x, x

        def forward(self, x):
            x, a = self.join(self.attn(x), x)
            x, b = self.join(self.mlp(x), x)
            return x
        """),
        "reads its argument x in line 24, too",
    ),
    "the branch is called in the method": (
        method("""
        def join(self, f, x):
            return x + f(x)

        def forward(self, x):
            return self.join(self.mlp, self.join(self.attn, x))
        """),
        NOT_ONE,
    ),
    "arguments in a tuple": (
        method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            x = self.join(*(self.attn(x), x))
            return self.join(*(self.mlp(x), x))
        """),
        "its argument x is not found at the call",
    ),
    "another name for the method": (
        method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            add = self.join
            return add(self.mlp(x), add(self.attn(x), x))
        """),
        "its argument x is not found at the call",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_scaled_argument_is_refused(name: str, tmp_path: Path) -> None:
    body, reason = REFUSED[name]
    model = made(HEAD + body, tmp_path)
    plans = [rz.audit(model, X).plan, rz.audit_source(HEAD + body).plan]
    for plan in plans:
        assert not plan.edited
        (site,) = (site for site in plan.sites if site.code == "RZ911")
        assert site.reason.startswith("one add for the calls in line")
        assert "the add is inside Layer.join, " in site.reason
        assert reason in site.reason
    assert rz.convert_source(HEAD + body).text == HEAD + body


ADDS_A_BIAS = """\
def bias_dropout_add(x, bias, residual, prob, training):
    out = F.dropout(x + bias, p=prob, training=training)
    return residual + out


"""


class Joined(nn.Module):
    """Something between the argument and the add."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.between = between

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.between(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(self.first(x), x)
        return self.join(self.second(x), x)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) / 2


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


@pytest.mark.parametrize("between", [nn.Tanh(), nn.LayerNorm(8), Noise(), Inverse()])
def test_a_module_that_does_not_pass_a_scale_on_is_refused(between: nn.Module) -> None:
    plan = rz.audit(Joined(between), X).plan
    assert not plan.edited
    assert NOT_ONE in plan.sites[0].reason


@pytest.mark.parametrize("between", [nn.Dropout(0.1), nn.Identity(), DropPath(0.1), Halved()])
def test_a_module_that_passes_a_scale_on_is_seen_to(between: nn.Module) -> None:
    model = Joined(between)
    for plan in (rz.audit(model, X).plan, detect(trace_live(model))):
        assert [gate.alpha for site in plan.converted for gate in site.gates] == ["alpha_first", "alpha_second"]
    assert torch.equal(rz.convert(model, X)(X), X)


def test_calls_without_source_text_are_refused() -> None:
    space: dict[str, Any] = {"Joined": Joined}
    once = "class Once(Joined):\n    def forward(self, x):\n        return self.join(self.first(x), x)\n"
    twice = "class Twice(Joined):\n    def forward(self, x):\n        x = self.join(self.first(x), x)\n"
    exec(f"{once}{twice}        return self.join(self.second(x), x)\n", space)
    assert len(rz.audit(space["Once"](nn.Identity()), X).plan.converted) == 1  # in the method
    plan = rz.audit(space["Twice"](nn.Identity()), X).plan
    assert [site.code for site in plan.sites] == ["RZ911"]
    assert "not found at the call" in plan.sites[0].reason


def test_a_function_that_adds_a_bias_is_refused(tmp_path: Path) -> None:
    call = "bias_dropout_add(self.{0}, self.shift, x, 0.1, self.training)"
    text = HEAD.replace("class Layer", f"{ADDS_A_BIAS}class Layer") + method(f"""
        def forward(self, x):
            x = {call.format("attn(x)")}
            return {call.format("mlp(x)")}
    """)
    for plan in (rz.audit(made(text, tmp_path), X).plan, rz.audit_source(text).plan):
        assert not plan.edited
        assert any("inside bias_dropout_add, where its operand is not one argument" in one.reason for one in plan.sites)


FUNCTION = """\
def join(x, residual):
    return residual + x


"""

CONVERTED = {
    "fairseq": method("""
        def residual_connection(self, x, residual):
            return residual + x

        def forward(self, x):
            residual = x
            x = self.norm1(x)
            x = self.attn(x)
            x = self.dropout(x)
            x = self.residual_connection(x, residual)
            residual = x
            x = self.norm2(x)
            x = self.mlp(x)
            x = self.residual_connection(x, residual)
            return x
        """),
    "post-norm, other order, keywords": method("""
        def join(self, a, b):
            return a + b

        def forward(self, x):
            x = self.norm1(self.join(x, self.attn(x)))
            return self.norm2(self.join(b=self.mlp(x), a=x))
        """),
    "static method": join("return residual + x", head="@staticmethod\ndef join(x, residual):"),
    "function": CALLS.replace("self.join", "join"),
    "nested function": method("""
        def forward(self, x):
            def join(x, residual):
                return residual + x

            x = join(self.attn(self.norm1(x)), x)
            return join(self.mlp(self.norm2(x)), x)
        """),
    "nested function that reads self": method("""
        def forward(self, x):
            def join(x, residual):
                return residual + self.dropout(x)

            x = join(self.attn(self.norm1(x)), x)
            return join(self.mlp(self.norm2(x)), x)
        """),
    "lambda": method("""
        def forward(self, x):
            join = lambda x, residual: residual + x
            x = join(self.attn(self.norm1(x)), x)
            return join(self.mlp(self.norm2(x)), x)
        """),
    "dropout": join("return residual + self.dropout(x)"),
    "functional dropout, a variable": join("out = F.dropout(x, 0.1, self.training)", "return residual + out"),
    "the skip is scaled": join("return residual * self.scale + x"),
    "in place": join("x = self.dropout(x)", "x += residual", "return x"),
    "a statement in place": join("x.add_(residual)", "return x"),
    "an option": join(
        "if scale is not None:",
        "    x = x * scale",
        "return residual + x",
        head="def join(self, x, residual, scale=None):",
    ),
    "the call's own class": join("return residual + x").replace("self.join(", "Layer.join(self, "),
    "what is read of the branch is its shape": join("assert x.shape == residual.shape", "return residual + x"),
    "two arms that add": join("if self.training:", "    return residual + self.dropout(x)", "return residual + x"),
    "a method that calls the method": method("""
        def add(self, x, residual):
            return residual + x

        def join(self, x, residual):
            return self.add(self.dropout(x), residual)

        def forward(self, x):
            x = self.join(self.attn(self.norm1(x)), x)
            return self.join(self.mlp(self.norm2(x)), x)
        """),
    "called from several methods": method("""
        def join(self, x, residual):
            return residual + x

        def attend(self, x):
            return self.join(self.attn(self.norm1(x)), x)

        def forward(self, x):
            x = self.attend(x)
            return self.join(self.mlp(self.norm2(x)), x)
        """),
    "both norm orders": method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            residual = x
            if self.first:
                x = self.norm1(x)
            x = self.join(self.attn(x), residual)
            if not self.first:
                x = self.norm1(x)
            residual = x
            if self.first:
                x = self.norm2(x)
            x = self.join(self.mlp(x), residual)
            if not self.first:
                x = self.norm2(x)
            return x
        """),
}


def text_of(name: str) -> str:
    head = HEAD.replace("class Layer", f"{FUNCTION}class Layer") if name == "function" else HEAD
    return head + CONVERTED[name]


@dataclass(frozen=True)
class Form:
    text: str
    model: nn.Module
    converted: nn.Module
    result: rz.SourceResult


@pytest.fixture(scope="module", params=CONVERTED)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Form:
    text = text_of(request.param)
    model = made(text, tmp_path_factory.mktemp("form"))
    return Form(text, model, rz.convert(model, X), rz.convert_source(text))


class TestEachCallIsABlock:
    def test_with_closed_gates_it_is_the_identity(self, form: Form) -> None:
        assert [name for name, _ in rz.alphas(form.converted)] == ["alpha_attn", "alpha_fc2"]
        assert torch.equal(form.converted(X), X)
        assert not torch.equal(form.model(X), X)

    def test_with_gates_at_one_it_is_the_original_and_comes_back(self, form: Form) -> None:
        preserved = rz.convert(form.model, X, alpha_init="preserve")
        assert len(list(rz.alphas(preserved))) == 2
        assert torch.equal(preserved(X), form.model(X))
        back = rz.unconvert(preserved)
        assert type(back) is type(form.model)
        assert back.state_dict().keys() == form.model.state_dict().keys()
        assert torch.equal(back(X), form.model(X))

    def test_a_second_run_finds_them_gated(self, form: Form) -> None:
        for plan in (
            rz.audit(opened(copy.deepcopy(form.converted)), X).plan,
            rz.audit_source(form.result.text).plan,
        ):
            assert [site.verdict for site in plan.sites] == ["gated", "gated"]
            assert [gate.alpha for site in plan.sites for gate in site.gates] == ["alpha_attn", "alpha_fc2"]
        assert rz.convert_source(form.result.text).text == form.result.text

    def test_the_file_is_the_same_model(self, form: Form, tmp_path: Path) -> None:
        source, live = made(form.result.text, tmp_path), opened(copy.deepcopy(form.converted))
        source.load_state_dict(live.state_dict())
        torch.testing.assert_close(source(X), live(X))
        assert not torch.equal(live(X), X)

    def test_the_file_of_a_model_that_ran_is_the_same(self, form: Form) -> None:
        file = sys.modules[type(form.model).__module__].__file__
        assert file is not None
        result = rz.convert_source(form.text, file=file, model=form.model, example_inputs=X)
        assert result.text == form.result.text


def test_a_graph_is_rewritten_as_the_model(tmp_path: Path) -> None:
    model = made(text_of("fairseq"), tmp_path)
    graph = rz.convert(fx.symbolic_trace(model), X)
    assert [name for name, _ in rz.alphas(graph)] == ["alpha_attn", "alpha_fc2"]
    live = opened(rz.convert(model, X))
    torch.testing.assert_close(opened(graph)(X), live(X))


def test_the_text_read_with_live_attributes_says_the_same(tmp_path: Path) -> None:
    model = made(text_of("both norm orders"), tmp_path)
    recorded, read = rz.audit(model, X).plan, rz.audit(Untraceable(model)).plan
    assert read.route.startswith("static")
    assert [site.span for site in read.converted] == [site.span for site in recorded.converted]
    assert [site.gates[0].at for site in read.converted] == [site.gates[0].at for site in recorded.converted]


class Untraceable(nn.Module):
    """What cannot be traced symbolically."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.layer(x)


def test_one_graph_compiles_it_as_before(tmp_path: Path) -> None:
    converted = opened(rz.convert(made(text_of("fairseq"), tmp_path), X))
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), converted(X))


def test_a_branch_that_two_calls_add_has_a_gate_at_each(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            x = self.join(self.mlp(x), x)
            return self.join(self.mlp(x), x)
    """)
    converted = rz.convert(made(text, tmp_path), X)
    assert [name for name, _ in rz.alphas(converted)] == ["alpha_fc2", "alpha_fc2_2"]
    result = rz.convert_source(text)
    inline = rz.convert_source(text.replace("self.join(self.mlp(x), x)", "x + self.mlp(x)"))
    gates = [[site.gates[0].alpha for site in one.report.plan.converted] for one in (result, inline)]
    assert gates == [["alpha_fc2", "alpha_fc2_2"]] * 2


def test_calls_that_are_no_blocks_stay_as_they_are(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            x = self.join(self.fc2(self.fc1(x)), self.attn(x))
            x = self.join(self.attn(self.norm1(x)), x)
            return self.join(self.mlp(self.norm2(x)), x)
    """)
    for plan in (rz.audit(made(text, tmp_path), X).plan, rz.audit_source(text).plan):
        assert [site.verdict for site in plan.sites] == ["refused", "converted", "converted"]
    after = rz.convert_source(text).text
    assert "self.join(self.fc2(self.fc1(x)), self.attn(x))" in after
    assert "self.join(self.alpha_attn * self.attn(x), x)" in after
    assert "self.join(self.alpha_fc2 * self.mlp(x), x)" in after


def test_a_method_called_from_one_place_keeps_the_gate(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + torch.tanh(x)

        def forward(self, x):
            return self.join(self.attn(x), x)
    """)
    assert "residual + self.alpha * torch.tanh(x)" in rz.convert_source(text).text
    (site,) = rz.audit(made(text, tmp_path), X).plan.converted
    assert site.place is not None
    assert site.place.name == "join"


def test_two_ways_to_run_a_model_keep_the_gate(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            return self.join(self.mlp(x), x)

        def forward_with_branch(self, x):
            h = self.mlp(x)
            return self.join(h, x), h
    """)
    model = rz.convert(made(text, tmp_path), X)
    assert torch.equal(model.forward_with_branch(X)[0], X)
    assert "return residual + self.alpha * x" in rz.convert_source(text).text


def test_arms_that_exclude_each_other_keep_the_gate(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            if self.first:
                return self.join(self.mlp(self.norm2(x)), x)
            return self.norm2(self.join(self.mlp(x), x))
    """)
    model = rz.convert(made(text, tmp_path), X)
    assert [name for name, _ in rz.alphas(model)] == ["alpha"]
    assert "return residual + self.alpha * x" in rz.convert_source(text).text


@pytest.mark.parametrize("only", [("A", "B", "C"), ("B", "C"), ("B",)])
def test_classes_that_share_the_method_agree(only: tuple[str, ...], tmp_path: Path) -> None:
    text = HEAD.replace("class Layer", "class Base") + method("""
        def join(self, x, residual):
            return residual + x
    """)
    once = "    def forward(self, x):\n        return self.join(F.relu(self.attn(x)), x)\n"
    twice = once.replace("        return", "        x = self.join(self.mlp(x), x)\n        return")
    text += "".join(f"\n\nclass {name}(Base):\n{body}" for name, body in (("A", twice), ("B", once), ("C", once)))
    result = rz.convert_source(text)
    source, module = loaded(result.text, tmp_path), loaded(text, tmp_path)
    assert "return residual + x" in result.text
    assert rz.convert_source(result.text).text == result.text
    live = opened(rz.convert(nn.Sequential(*[getattr(module, name)() for name in only]), X))
    made_of_files = nn.Sequential(*[getattr(source, name)() for name in only])
    made_of_files.load_state_dict(live.state_dict())
    torch.testing.assert_close(made_of_files.eval()(X), live.eval()(X))


def test_a_tied_branch_keeps_its_one_alpha(tmp_path: Path) -> None:
    text = HEAD + method("""
        def step(self, x):
            return x + self.mlp(x)

        def forward(self, x):
            return self.step(self.step(x))
    """)
    converted = rz.convert(made(text, tmp_path), X)
    assert [name for name, _ in rz.alphas(converted)] == ["alpha"]
    assert "return x + self.alpha * self.mlp(x)" in rz.convert_source(text).text


def test_a_loop_around_the_call_walks_a_list_of_alphas(tmp_path: Path) -> None:
    head = HEAD.replace("self.first = True", "self.parts = nn.ModuleList(nn.Linear(d, d) for _ in range(2))")
    text = head + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            for part in self.parts:
                x = self.join(F.relu(part(x)), x)
            return x
    """)
    result = rz.convert_source(text)
    assert "x = self.join(alpha * F.relu(part(x)), x)" in result.text
    live = opened(rz.convert(made(text, tmp_path), X))
    assert [name for name, _ in rz.alphas(live)] == ["alpha.0", "alpha.1"]
    source = made(result.text, tmp_path)
    source.load_state_dict(live.state_dict())
    torch.testing.assert_close(source(X), live(X))
    assert [site.verdict for site in rz.audit(live, X).plan.sites] == ["gated"]


def test_a_comment_at_a_call_leaves_it_out(tmp_path: Path) -> None:
    text = HEAD + join("return residual + x").replace("norm1(x)), x)", "norm1(x)), x)  # rezero: skip")
    for plan in (rz.audit(made(text, tmp_path), X).plan, rz.audit_source(text).plan):
        assert [site.code for site in plan.sites] == ["RZ900", "RZ101"]
        assert [gate.alpha for site in plan.converted for gate in site.gates] == ["alpha"]


def test_an_arm_that_did_not_run_has_the_gates_of_its_twin(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            if self.first:
                x = self.join(self.attn(self.norm1(x)), x)
                return self.join(self.mlp(self.norm2(x)), x)
            x = self.norm1(self.join(self.attn(x), x))
            return self.norm2(self.join(self.mlp(x), x))
    """)
    model = made(text, tmp_path)
    plan = rz.audit(model, X).plan
    assert [site.verdict for site in plan.sites] == ["converted", "converted", "not-executed", "not-executed"]
    assert [gate.alpha for site in plan.edited for gate in site.gates] == ["alpha_attn", "alpha_fc2"] * 2
    converted = rz.convert(model, X)
    converted.first = False
    assert torch.equal(converted(X), X)


def test_instances_that_ran_other_calls_agree(tmp_path: Path) -> None:
    text = HEAD + method("""
        def join(self, x, residual):
            return residual + x

        def forward(self, x):
            x = self.join(self.attn(x), x)
            if self.first:
                x = self.join(self.mlp(x), x)
            return x
    """)
    module = loaded(text, tmp_path)
    model = nn.Sequential(module.Layer(), module.Layer())
    model[1].first = False
    converted = rz.convert(model, X)
    assert [name for name, _ in rz.alphas(converted)] == ["0.alpha_attn", "0.alpha_fc2", "1.alpha_attn"]
    assert torch.equal(converted(X), X)


def inline(text: str) -> str:
    """The text with the adds written where the method is called."""
    text = text.replace("self.join(x, self.attn(x))", "x + self.attn(x)")
    text = text.replace("self.join(b=self.mlp(x), a=x)", "x + self.mlp(x)")
    text = text.replace("self.join(self.attn(x), residual)", "residual + self.attn(x)")
    return text.replace("self.join(self.mlp(x), residual)", "residual + self.mlp(x)")


@pytest.mark.parametrize("first", [True, False])
def test_norms_are_those_of_adds_in_place(first: bool, tmp_path: Path) -> None:
    text = text_of("both norm orders")
    found = []
    for one in (text, inline(text)):
        model = made(one, tmp_path)
        model.first = first
        sites = rz.audit(model, X).plan.converted
        found.append([(site.form, [(norm.path, norm.position, norm.action) for norm in site.norms]) for site in sites])
    assert found[0] == found[1]
    assert [len(norms) for _, norms in found[0]] == [1, 1]


@pytest.mark.parametrize("name", ["skipinit", "frozen", "rescalenet", "beta", "gated"])
def test_other_methods_gate_the_calls_too(name: str, tmp_path: Path) -> None:
    text = text_of("post-norm, other order, keywords")
    ours, theirs = (rz.convert(made(one, tmp_path), X, method=name) for one in (text, inline(text)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(X), theirs(X))


def test_converted_models_are_pickled_copied_and_trained(tmp_path: Path) -> None:
    converted = opened(rz.convert(made(text_of("fairseq"), tmp_path), X))
    for other in (pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        assert torch.equal(other(X), converted(X))
    converted(X).sum().backward()
    assert all(alpha.grad is not None and alpha.grad.any() for _, alpha in rz.alphas(converted))
    assert rz.validate(rz.convert(made(text_of("fairseq"), tmp_path), X), X).ok
