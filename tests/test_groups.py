"""Parameter groups with torch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo import stack

import rezero_convert as rz


def model() -> nn.Module:
    torch.manual_seed(0)
    return rz.convert(stack(depth=4), torch.randn(2, 8))


def test_a_model_without_gates_is_refused() -> None:
    with pytest.raises(rz.ConversionError, match="no trainable gate"):
        rz.param_groups(stack(depth=2), lr=0.1)
    frozen = model().requires_grad_(False)
    with pytest.raises(rz.ConversionError, match="no trainable gate"):
        rz.param_groups(frozen)


@pytest.mark.parametrize("name", ["lr", "alpha_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(rz.ConversionError, match=f"^{name} must be"):
        rz.param_groups(model(), **{name: value})


def test_every_trainable_parameter_is_in_one_group() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    weights, gates = rz.param_groups(net, lr=0.1, weight_decay=0.3)
    assert [id(p) for p in gates["params"]] == [id(p) for _, p in rz.alphas(net)]
    assert (gates["lr"], gates["weight_decay"]) == (0.1, 0.0)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.3)
    everything = {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in (*weights["params"], *gates["params"])} == everything
    assert len(weights["params"]) + len(gates["params"]) == len(everything)


def test_what_is_not_given_is_left_to_the_optimizer() -> None:
    weights, gates = rz.param_groups(model())
    assert set(weights) == {"params"}
    assert set(gates) == {"params", "weight_decay"}
    optimizer = torch.optim.AdamW([weights, gates], lr=0.5, weight_decay=0.25)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW, torch.optim.Adafactor],
    ids=lambda make: str(make.__name__),
)
def test_gates_without_gradient_are_not_decayed_and_others_are(make: Callable[..., torch.optim.Optimizer]) -> None:
    net = model()
    with torch.no_grad():
        for _, alpha in rz.alphas(net):
            alpha.fill_(1.0)
    optimizer = make(rz.param_groups(net, lr=0.1, weight_decay=0.5))
    before = net[0].weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(alpha.item() == 1.0 for _, alpha in rz.alphas(net))
    assert not torch.equal(net[0].weight, before)


def test_the_gates_have_a_rate_of_their_own() -> None:
    net = model()
    optimizer = torch.optim.SGD(rz.param_groups(net, lr=0.0, alpha_lr=0.1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.randn(8, 8)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in rz.alphas(net)}


@pytest.mark.parametrize(
    ("name", "times"), [("SGD", 1), ("Adagrad", 1), ("Adam", 10), ("AdamW", 10), ("RMSprop", 10), ("Adafactor", 30)]
)
def test_the_gates_rate_follows_the_family_unless_it_is_given(name: str, times: float) -> None:
    net, family = model(), getattr(torch.optim, name)
    assert rz.param_groups(net, lr=0.5, optimizer=family)[1]["lr"] == 0.5 * times
    assert rz.param_groups(net, lr=0.5, alpha_lr=0.25, optimizer=family)[1]["lr"] == 0.25
    assert "lr" not in rz.param_groups(net, optimizer=family)[1]


def test_adafactor_hardly_moves_a_gate_at_the_weights_rate() -> None:
    moved = []
    for times in (1, 30):
        net = model()
        optimizer = torch.optim.Adafactor(rz.param_groups(net, lr=0.01, alpha_lr=0.01 * times))
        net(torch.ones(8, 8)).square().sum().backward()
        optimizer.step()
        moved.append(max(abs(alpha.item()) for _, alpha in rz.alphas(net)))
    assert 0 < moved[0] < 2e-5
    assert moved[1] == pytest.approx(30 * moved[0], rel=1e-3)


def test_muon_takes_the_matrices_and_another_optimizer_the_gates() -> None:
    net = model()
    weights, gates = rz.param_groups(net, lr=0.01, alpha_lr=0.1)
    muon: Any = torch.optim.Muon
    with pytest.raises(ValueError, match="2D"):
        muon([gates])
    matrices = [p for p in weights["params"] if p.dim() == 2]
    rest = {**gates, "params": [*gates["params"], *(p for p in weights["params"] if p.dim() != 2)]}
    first, second = muon(matrices, lr=0.01), torch.optim.AdamW([rest])
    for _ in range(2):  # the weights of a branch wake at the second step
        net.zero_grad()
        net(torch.randn(8, 8)).square().sum().backward()
        first.step()
        second.step()
    assert all(alpha.item() for _, alpha in rz.alphas(net))
