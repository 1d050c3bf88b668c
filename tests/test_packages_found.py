"""Forms of residual block that models of other packages showed, each in the smallest module that has it."""

from __future__ import annotations

import copy
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import rezero_convert as rz


class Scaled(nn.Module):
    """A branch that ends in a gate."""

    def __init__(self, branch: nn.Module, value: torch.Tensor) -> None:
        super().__init__()
        self.fn = branch
        self.scale = nn.Parameter(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x) * self.scale


class Pairs(nn.Module):
    """A stack that adds in a loop, with a gate in each of its branches."""

    def __init__(self, *gates: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(nn.Linear(4, 4), value) for value in gates)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) + x
        return x


def _same(model: nn.Module, inputs: torch.Tensor) -> None:
    preserved = rz.convert(model, inputs, alpha_init="preserve")
    for train in (False, True):
        outputs = []
        for one in (model, preserved):
            torch.manual_seed(1)
            outputs.append(copy.deepcopy(one).train(train)(inputs.clone()))
        assert torch.equal(*outputs)


def test_the_gates_of_all_passes_of_a_loop_are_taken_over() -> None:
    model, inputs = Pairs(*(torch.full((4,), 0.1 * n) for n in (1, 2, 3))), torch.randn(2, 4)
    _same(model, inputs)
    converted = rz.convert(model, inputs)
    assert [name for name, _ in rz.alphas(converted)] == [f"layers.{n}.scale" for n in range(3)]
    assert all(not alpha.any() for _, alpha in rz.alphas(converted))
    assert torch.equal(converted(inputs), inputs)
    assert converted.state_dict().keys() == model.state_dict().keys()
    (site,) = rz.audit(model, inputs).plan.converted
    assert site.form == "identity skip, existing gate"  # three passes, not three parallel branches


def test_gates_that_only_some_passes_have_are_refused() -> None:
    class Some(Pairs):
        def __init__(self) -> None:
            super().__init__(torch.ones(4), torch.ones(4))
            self.layers.append(nn.Linear(4, 4))

    (site,) = rz.audit(Some(), torch.randn(2, 4)).plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ911")
    assert "in some of its runs only" in site.reason


def test_hand_made_gates_of_all_passes_of_a_loop_are_listed() -> None:
    model, inputs = Pairs(*(torch.full((1,), 1e-3) for _ in range(3))), torch.randn(2, 4)
    with pytest.warns(rz.NoEffectWarning, match="gated already"):
        converted = rz.convert(model, inputs)
    assert [name for name, _ in rz.alphas(converted)] == [f"layers.{n}.scale" for n in range(3)]
    assert all(alpha.item() == pytest.approx(1e-3) for _, alpha in rz.alphas(converted))


FILE = """
import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self, branch, value=0.1):
        super().__init__()
        self.fn = branch
        self.scale = nn.Parameter(value * torch.ones(4))

    def forward(self, x):
        return self.fn(x) * self.scale


class Stack(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([Scaled(nn.Linear(4, 4)), Scaled(nn.Linear(4, 4), 0.2)]))

    def forward(self, x):
        for one, two in self.layers:
            x = one(x) + x
            x = two(x) + x
        return x


class Comprehended(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Scaled(nn.Linear(4, 4)) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + x
        return x


class Unequal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Comprehended(2)
        self.b = Comprehended(3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
"""


def _imported(text: str, path: Path) -> types.ModuleType:
    path.write_text(text)
    module = types.ModuleType(path.stem)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", ["Stack", "Comprehended", "Unequal"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_gates_of_all_passes_of_a_loop_start_at_zero_in_the_file(name: str, exact: bool, tmp_path: Path) -> None:
    inputs, path = torch.randn(2, 4), tmp_path / "gates_in_loops.py"
    model = getattr(_imported(FILE, path), name)()
    more = {"model": model, "example_inputs": inputs} if exact else {}
    result = rz.convert_source(FILE, file=str(path), **more)
    twin = getattr(_imported(result.text, tmp_path / "rewritten.py"), name)()
    live = rz.convert(model, inputs)
    assert twin.state_dict().keys() == live.state_dict().keys()
    for key, _ in rz.alphas(live):
        assert not twin.get_parameter(key).any()
        nn.init.normal_(live.get_parameter(key))
    twin.load_state_dict(live.state_dict())
    torch.testing.assert_close(twin(inputs), live(inputs))
    assert rz.convert_source(result.text, file=str(tmp_path / "rewritten.py")).text == result.text


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "for layer in self.layers:\n            x = layer",
            "x = self.layers[0](x)\n        for layer in self.layers[1:]:\n            x = layer",
            "only walked",
        ),
        (
            "ModuleList(Scaled(nn.Linear(4, 4)) for _ in range(depth))",
            "ModuleList(made(depth))",
            "no argument that sets the start value",
        ),
    ],
)
def test_gates_of_a_loop_that_the_file_does_not_make_for_it_are_refused(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    made = "\n\ndef made(depth):\n    return [Scaled(nn.Linear(4, 4)) for _ in range(depth)]\n"
    text, path = FILE.replace(old, new) + made, tmp_path / "gates_in_loops.py"
    model = _imported(text, path).Comprehended()
    result = rz.convert_source(text, file=str(path), model=model, example_inputs=torch.randn(2, 4))
    (site,) = (site for site in result.report.plan.sites if site.cls == "Comprehended")
    assert (site.verdict, site.code) == ("refused", "RZ912")
    assert reason in site.reason


class Reduced(nn.Module):
    """A layer that starts at zero and has no skip, before a block: the stream is zero there until it is trained."""

    def __init__(self, *, zero: bool) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4, bias=False)
        self.fn = nn.Linear(4, 4, bias=False)
        if zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return x + torch.tanh(self.fn(x))


def test_a_stream_that_is_zero_before_the_block_tells_nothing_of_its_liveness() -> None:
    inputs = torch.randn(3, 4)
    converted = rz.convert(Reduced(zero=True), inputs)  # verified
    (note,) = (note for note in rz.validate(converted, inputs).notes if "liveness" in note)
    assert "zero before the block" in note
    awake = rz.convert(Reduced(zero=False), inputs)
    assert not any("liveness" in note for note in rz.validate(awake, inputs).notes)


def test_a_dead_branch_on_a_live_stream_still_fails() -> None:
    converted = rz.convert(Reduced(zero=False), torch.randn(3, 4))
    nn.init.zeros_(converted.fn.weight)
    check = rz.validate(converted, torch.randn(3, 4))
    assert not check.ok
    assert any("the branch is zero" in str(failure) for failure in check.failures)


class Twice(nn.Module):
    """An activation at the end of the branch, and one of the sum: V-Net."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.fn = nn.Sequential(nn.Linear(4, 4), nn.ELU())
        self.act = nn.ELU(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(torch.add(self.fn(x), x))


@pytest.mark.parametrize(("inplace", "action"), [(True, "keep"), (False, "move")])
def test_an_activation_in_place_is_not_moved_onto_another_ones_output(inplace: bool, action: str) -> None:
    model, inputs = Twice(inplace=inplace), torch.randn(2, 4)
    _same(model, inputs)
    (site,) = rz.audit(model, inputs).plan.converted
    assert site.activation is not None
    assert site.activation.action == action
    assert bool(re.search("in place", site.activation.reason)) is inplace
    converted = rz.convert(model, inputs)  # verified, with gradients
    converted(inputs).sum().backward()
    assert converted.alpha.grad is not None
    assert converted.alpha.grad.any()


class Rescaled(nn.Module):
    """A projection shortcut whose sum is divided: the ResNet block of diffusion U-Nets."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(3, 4, 1)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(torch.relu(x))
        return (self.conv_shortcut(x) + hidden) / self.factor


def test_a_sum_with_an_output_factor_is_a_projection_block() -> None:
    model, inputs = Rescaled(1.5), torch.randn(2, 3, 4, 4)
    _same(model, inputs)
    (site,) = rz.audit(model, inputs).plan.sites
    assert (site.verdict, site.code) == ("converted", "RZ102")
    assert torch.equal(rz.convert(model, inputs)(inputs), model.conv_shortcut(inputs) / 1.5)
