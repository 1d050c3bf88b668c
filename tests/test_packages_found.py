"""Forms of residual block that models of other packages showed, each in the smallest module that has it."""

from __future__ import annotations

import copy
import re

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
