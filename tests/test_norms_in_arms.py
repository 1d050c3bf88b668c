"""Norms that a flag puts before the branch or behind the sum: fairseq's arms of one method, DETR's two methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rezero_convert as rz

ARMS = """\
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width=8, before=True):
        super().__init__()
        self.before = before
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        skip = x
        if self.before:
            x = self.norm(x)
        x = skip + torch.tanh(self.fc(x))
        if not self.before:
            x = self.norm(x)
        return x
"""
METHODS = """\
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width=8, before=True):
        super().__init__()
        self.before = before
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def norm_last(self, x):
        out = torch.tanh(self.fc(x))
        x = x + out
        return self.norm(x)

    def norm_first(self, x):
        out = torch.tanh(self.fc(self.norm(x)))
        return x + out

    def forward(self, x):
        if self.before:
            return self.norm_first(x)
        return self.norm_last(x)
"""
TEXTS = {"arms": ARMS, "methods": METHODS}
ALPHA = {ARMS: "alpha", METHODS: "alpha_fc"}
CONSTRUCTOR = "nn.LayerNorm(width)"


def layer(text: str, path: Path) -> Any:
    file = path / "layer.py"
    file.write_text(text)
    space: dict[str, Any] = {"__name__": "layer"}
    exec(compile(text, str(file), "exec"), space)
    return space["Layer"]


def norms(result: Any) -> list[tuple[str, str, str, str]]:
    sites = result.plan.sites
    return [(norm.path, norm.position, norm.action, norm.reason) for site in sites for norm in site.norms]


UNSAFE = {
    "another use": (ARMS.replace("return x", "return x, self.norm(skip)"), "it also runs outside a residual block"),
    "a read": (ARMS.replace("return x", "return x * self.norm.eps"), "its attributes are read at"),
    "a batch norm": (ARMS.replace(CONSTRUCTOR, "nn.BatchNorm1d(width)"), "batch-type norms stay"),
    "a subclass": (
        f"{ARMS}\n\nclass Sub(Layer):\n    def head(self, x):\n        return self.norm(x)\n",
        "also used at",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_norm_with_another_use_stays_in_the_file(name: str) -> None:
    text, reason = UNSAFE[name]
    result = rz.convert_source(text)
    assert {action for _, _, action, _ in norms(result.report)} == {"keep"}
    assert all(reason in why for _, _, _, why in norms(result.report))
    assert text.count("self.norm =") == result.text.count("self.norm =")
    assert "Identity" not in result.text


def test_methods_that_run_one_after_the_other_have_gates_of_their_own() -> None:
    result = rz.convert_source(METHODS.replace("return self.norm_first(x)", "x = self.norm_first(x)"))
    alphas = [gate.alpha for site in result.report.plan.sites for gate in site.gates]
    assert sorted(alphas) == ["alpha_fc", "alpha_fc_2"]


def test_a_norm_that_the_other_arm_uses_otherwise_stays_in_memory(tmp_path: Path) -> None:
    text = ARMS.replace("x = self.norm(x)\n        return x", "x = 2 * self.norm(x)\n        return x")
    text = text.replace("            x = 2 * self.norm(x)", "            return torch.sigmoid(self.norm(x) * x)")
    model = layer(text, tmp_path)(before=True)
    assert [(path, action) for path, _, action, _ in norms(rz.audit(model, torch.randn(2, 8)))] == [("norm", "keep")]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_in_memory_it_goes_and_the_block_is_the_identity(text: str, before: bool, tmp_path: Path) -> None:
    cls, x = layer(text, tmp_path), torch.randn(3, 8)
    model = nn.Sequential(cls(before=before), cls(before=before))
    converted = rz.convert(model, x)
    assert torch.equal(converted(x), x)
    assert not [name for name in converted.state_dict() if "norm" in name]
    alpha = ALPHA[text]
    assert [name for name, _ in rz.alphas(converted)] == [f"0.{alpha}", f"1.{alpha}"]
    with pytest.warns(UserWarning, match="2 dropped norms were made anew"):
        back = rz.unconvert(converted)
    assert back.state_dict().keys() == model.state_dict().keys()
    kept = rz.convert(model, x, alpha_init="preserve")
    assert torch.equal(kept(x), model(x))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_arm_that_did_not_run_has_the_gate_too(text: str, before: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    model = rz.convert(layer(text, tmp_path)(before=before), x)
    model.before = not before
    assert torch.equal(model(x), x)
    with torch.no_grad():
        dict(rz.alphas(model))[ALPHA[text]].fill_(0.5)
    assert torch.equal(model(x), x + 0.5 * torch.tanh(model.fc(x)))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_in_a_file_it_goes_in_both_arms(text: str, exact: bool, before: bool, tmp_path: Path) -> None:
    cls, x = layer(text, tmp_path), torch.randn(3, 8)
    given: dict[str, Any] = {"model": cls(before=before), "example_inputs": x} if exact else {}
    result = rz.convert_source(text, file=str(tmp_path / "layer.py"), **given)
    made = layer(result.text, tmp_path)
    for flag in (True, False):
        model = made(before=flag)
        assert torch.equal(model(x), x)
        assert [name for name, _ in model.named_parameters()] == [ALPHA[text], "fc.weight", "fc.bias"]
    assert rz.convert_source(result.text, file=str(tmp_path / "layer.py")).text == result.text


def test_an_instance_with_another_norm_keeps_it_in_the_file(tmp_path: Path) -> None:
    text = ARMS.replace(CONSTRUCTOR, "kind(width)").replace("before=True", "before=True, kind=nn.LayerNorm")
    cls, x = layer(text, tmp_path), torch.randn(3, 8)
    model = nn.Sequential(cls(before=True), cls(before=False, kind=nn.BatchNorm1d))
    result = rz.convert_source(text, file=str(tmp_path / "layer.py"), model=model, example_inputs=x)
    assert "self.norm = kind(width)" in result.text
    assert {action for _, _, action, _ in norms(result.report)} == {"keep"}
