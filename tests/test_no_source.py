"""Classes whose text cannot be had (`exec`, a prompt), and those whose text is not in a file (notebooks)."""

from __future__ import annotations

import linecache
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

import rezero_convert as rz

BLOCK = """
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x, mask=None, scale=1.0):
        if mask is not None:
            x = x * mask
        return x + F.dropout(self.fc(self.norm(x)), 0.1, self.training) * scale
"""


def made(text: str, name: str = "Block", **scope: Any) -> Any:
    """A class whose text is nowhere."""
    scope = {"__name__": __name__, **scope}
    exec(textwrap.dedent(text), scope)
    return scope[name]


def net(block: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(block(8) for _ in range(3)))


X = torch.randn(2, 5, 8)


def one(forward: str, extra: str = "") -> nn.Module:
    text = f"""
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
{textwrap.indent(textwrap.dedent(extra), "        ")}
{textwrap.indent(textwrap.dedent(forward), "    ")}
"""
    block: nn.Module = made(text)()
    return block


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        ("def forward(self, x):\n    if x.sum() > -1e9:\n        return x + self.fc(x)\n    return x", "control flow"),
        (
            "def forward(self, x):\n    if self.training:\n        return x\n    return x + self.fc(x)",
            "something else in train mode",
        ),
        ("def forward(self, x):\n    return x + self.fc(x * torch.arange(8.0))", "depend on no argument"),
        ("def forward(self, x, axes=(1, 2)):\n    return x + self.fc(x)", "argument axes"),
    ],
)
def test_what_cannot_be_traced_is_refused_and_says_why(forward: str, why: str) -> None:
    model = one(forward)
    before = dict(model.__dict__)
    report = rz.audit(model, X)
    assert [site.code for site in report.plan.sites] == ["RZ909"]
    assert any(why in note for note in report.plan.notes), report.plan.notes
    assert model.__dict__ == before


def test_an_argument_that_was_not_traced_with_refuses_the_block_not_the_model() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = made(BLOCK)(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x, mask=torch.ones_like(x))

    report = rz.audit(Root(), X)
    assert [site.code for site in report.plan.sites] == ["RZ909"]
    assert any("traced with None for mask" in note for note in report.plan.notes)


def test_audit_says_so_and_changes_nothing() -> None:
    model = net(made(BLOCK))
    before = [dict(module.__dict__) for module in model.modules()]
    report = rz.audit(model, X)
    assert len(report.plan.converted) == 3
    assert any("no source text" in note and "torch.fx" in note for note in report.plan.notes)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_preserve_is_bit_identical(training: bool) -> None:
    model = net(made(BLOCK)).train(training)
    converted = rz.convert(model, X, alpha_init="preserve")
    torch.manual_seed(1)
    expected = model(X)
    torch.manual_seed(1)
    assert torch.equal(converted(X), expected)
    assert torch.equal(expected, X) is False


def test_the_converted_model_is_the_users_still() -> None:
    block = made(BLOCK)
    model = net(block)
    converted = rz.convert(model, X)
    assert rz.validate(converted, X).ok
    assert [name for name, _ in rz.alphas(converted)] == ["0.alpha", "1.alpha", "2.alpha"]
    assert all(isinstance(module, block) for module in converted.children())
    assert torch.equal(converted.eval()(X), X)
    assert not hasattr(converted[0], "norm")
    with pytest.warns(UserWarning, match="3 dropped norms"):
        back = rz.unconvert(converted)
    assert {type(module) for module in back.children()} == {block}
    assert set(back.state_dict()) == set(model.state_dict())
    with pytest.warns(rz.NoEffectWarning):
        rz.convert(converted, X)
    with pytest.raises(NotImplementedError, match="mask"):
        converted[0](X, X)


def test_it_pickles_where_its_class_does(monkeypatch: pytest.MonkeyPatch) -> None:
    block = made(BLOCK)
    monkeypatch.setattr(sys.modules[__name__], "Block", block, raising=False)
    converted = rz.convert(net(block), X)
    with torch.no_grad():
        for _, alpha in rz.alphas(converted):
            alpha.fill_(0.5)
    again = pickle.loads(pickle.dumps(converted))
    assert torch.equal(again.eval()(X), converted.eval()(X))


def test_loops_and_children_of_lists_are_unrolled() -> None:
    model = one(
        "def forward(self, x):\n    for layer in self.layers:\n        x = x + torch.relu(layer(x))\n    return x",
        "self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])",
    )
    converted = rz.convert(model, X)
    assert len(list(rz.alphas(converted))) == 2
    assert torch.equal(converted.eval()(X), X)


def test_a_class_of_a_notebook_cell_has_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    file = "/ipykernel_4711/1234567890.py"  # as IPython registers its cells
    monkeypatch.setitem(linecache.cache, file, (len(BLOCK), None, BLOCK.splitlines(keepends=True), file))
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(BLOCK, file, "exec"), scope)
    report = rz.audit(net(scope["Block"]), X)
    assert {site.span.file for site in report.plan.converted if site.span} == {file}
    assert not report.plan.notes
    assert rz.validate(rz.convert(net(scope["Block"]), X), X).ok


SCRIPT = (
    BLOCK
    + """
import rezero_convert as rz
x = torch.randn(2, 5, 8)
converted = rz.convert(nn.Sequential(Block(8), Block(8)), x)
print(rz.validate(converted, x).ok, len(list(rz.alphas(converted))), *rz.audit(converted).plan.notes)
"""
)


def test_main_works_by_source_from_a_file_and_by_tracing_from_a_pipe(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    file = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert file.stdout.strip() == "True 2"
    pipe = subprocess.run([sys.executable, "-"], input=SCRIPT, capture_output=True, text=True, check=True)
    assert pipe.stdout.startswith("True 2 Block has no source text")


def test_a_norm_that_another_method_without_text_names_stays() -> None:
    block = made(BLOCK + "\n    def scale(self):\n        return self.norm.weight.mean()\n")
    (site,) = rz.audit(nn.Sequential(block(8)), X).plan.converted
    assert [(norm.action, "whose text cannot be had" in norm.reason) for norm in site.norms] == [("keep", True)]
