"""`method=`: every relative of ReZero against a twin written by hand, and what it promises at the start."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import relatives
import torch
from nets import Parallel, Walked
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz
from rezero_convert.methods import METHODS
from rezero_convert.options import options as make_options

NETS = ("resnet", "pre", "post", "dense")
SUMS = {"resnet": 3, "pre": 4, "post": 4, "dense": 3}
"""Gated sums of each, by its code."""

Join = Callable[[Tensor, int, int, Tensor, Tensor], Tensor]
"""(gate, k from 1, L, skip, branch)"""


def _wide(gate: Tensor, branch: Tensor) -> Tensor:
    """A gate for each channel, beside an image or a sequence."""
    return gate[:, None, None] * branch if branch.dim() == 4 else gate * branch


JOINS: dict[str, Join] = {
    "rezero": lambda a, k, n, x, f: x + a * f,
    "rezero-one": lambda a, k, n, x, f: x + a * f,
    "frozen": lambda a, k, n, x, f: x + a * f,
    "skipinit": lambda a, k, n, x, f: x + a * f,
    "layerscale": lambda a, k, n, x, f: x + _wide(a, f),
    "gated": lambda a, k, n, x, f: x + F.relu(a) * f,
    "gated-authors": lambda a, k, n, x, f: (1 - a) * x + a * f,
    "beta": lambda a, k, n, x, f: x + a * f,
    "rescalenet": lambda a, k, n, x, f: math.sqrt((k + n - 1) / (k + n)) * x + math.sqrt(1 / (k + n)) * a * f,
}
BATCH_NORM = {"rezero", "rezero-one", "frozen", "layerscale", "gated", "gated-authors", "beta"}
"""The methods that keep batch norms."""
LAYER_NORM = {"layerscale", "gated", "gated-authors", "beta"}
RELU_INSIDE = {"rezero", "rezero-one", "frozen", "gated-authors"}
"""Those that move the activation of a sum into the branch."""


class Twin(nn.Module):
    """A network of `relatives` rewritten by hand for one method, with the weights of a converted model."""

    def __init__(self, net: nn.Module, method: str, gates: list[Tensor]) -> None:
        super().__init__()
        self.net = net
        self.gates = nn.ParameterList([nn.Parameter(gate.detach().clone()) for gate in gates])
        self.method = method
        self.k = 0

    def join(self, x: Tensor, f: Tensor) -> Tensor:
        self.k += 1
        return JOINS[self.method](self.gates[self.k - 1], self.k, len(self.gates), x, f)

    def forward(self, x: Tensor) -> Tensor:
        self.k = 0
        net: Any = self.net
        if isinstance(net, relatives.ResNet):
            x = F.relu(net.stem(x))
            for block in net.blocks:
                x = self.basic(block, x)
            return net.head(x.mean((2, 3)))
        x = net.embed(x)
        for block in net.blocks:
            x = self.dense(block, x) if isinstance(block, relatives.Dense) else self.transformer(block, x)
        return net.head(x)

    def basic(self, block: Any, x: Tensor) -> Tensor:
        f = block.conv1(x)
        f = block.conv2(F.relu(block.bn1(f) if self.method in BATCH_NORM else f))
        f = block.bn2(f) if self.method in BATCH_NORM else f
        x = x if block.down is None else block.down(x)
        if self.method in RELU_INSIDE:
            return self.join(x, F.relu(f))
        return F.relu(self.join(x, f))

    def transformer(self, block: Any, x: Tensor) -> Tensor:
        pre = isinstance(block, relatives.Pre)
        one = block.norm1 if self.method in LAYER_NORM else nn.Identity()
        two = block.norm2 if self.method in LAYER_NORM else nn.Identity()
        h = one(x) if pre else x
        x = self.join(x, block.attn(h, h, h, need_weights=False)[0])
        x = x if pre else one(x)
        h = two(x) if pre else x
        x = self.join(x, block.fc2(F.gelu(block.fc1(h))))
        return x if pre else two(x)

    def dense(self, block: Any, x: Tensor) -> Tensor:
        return self.join(x, F.relu(block.fc(x)))


def randomized(model: nn.Module) -> list[Tensor]:
    """The gates of a model, set at random."""
    gates = [gate for _, gate in rz.alphas(model)]
    with torch.no_grad():
        for gate in gates:
            gate.uniform_(-0.2, 0.9)
    return gates


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs in train mode, and the gradients of a fixed function of them."""
    model.train()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# What is refused


@pytest.mark.parametrize("method", ["rescalenet", "gated-authors", "zero-gamma", "fixup", "highway", "pre-norm"])
def test_preserving_is_refused_where_no_gate_preserves(method: str) -> None:
    model, x = relatives.made("dense")
    with pytest.raises(rz.ConversionError, match="changes what a block computes at any gate"):
        rz.convert(model, x, method=method, alpha_init="preserve")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(self.fc(x))


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x)).reshape(-1, 2, 2).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("net", "options", "said"),
    [
        (Parallel, {"method": "gated-authors"}, "several branches are added to one skip"),
        (Scaled, {"method": "gated"}, "has a gate already, gamma"),
        (Scaled, {"method": "frozen"}, "has a gate already, gamma"),
        (Walked, {"method": "rescalenet"}, "differ from pass to pass"),
        (Reshaped, {"granularity": "channel"}, "reshape between the last weight"),
    ],
)
def test_a_block_without_a_place_for_the_form_is_refused(
    net: type[nn.Module], options: dict[str, str], said: str
) -> None:
    report = rz.audit(net(), torch.randn(2, 4), **options)
    (site,) = report.plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ919")
    assert said in site.reason
    with pytest.warns(rz.NoEffectWarning, match=said):
        rz.convert(net(), torch.randn(2, 4), **options)


def test_validation_notices_another_form() -> None:
    model, x = relatives.made("dense")
    made = rz.convert(model, x, method="gated-authors")
    block = made.blocks[1]
    block.forward = lambda x: x + block.alpha * F.relu(block.fc(x))
    found = rz.validate(made, x)
    assert any("no gate scales the skip" in line for line in found.failures)
    block.forward = lambda x: (1 + block.alpha) * x + block.alpha * F.relu(block.fc(x))
    assert any("not what the method says" in line for line in rz.validate(made, x).failures)
    made = rz.convert(model, x, method="gated")
    block = made.blocks[1]
    block.forward = lambda x: x + block.alpha.tanh() * F.relu(block.fc(x))
    assert any("not what the method says" in line for line in rz.validate(made, x).failures)
    made = rz.convert(model, x, method="rescalenet")
    block = made.blocks[1]
    block.forward = lambda x: 0.9 * x + 0.4 * block.alpha * F.relu(block.fc(x))
    assert any("identity" in line for line in rz.validate(made, x).failures)


def test_the_report_names_the_method() -> None:
    model, x = relatives.made("dense")
    assert "frozen, alpha by depth, norms dropped: layer" in str(rz.audit(model, x, method="frozen"))
    said = str(rz.audit(model, x, method="fixup"))
    assert "fc.weight set to 0" in said
    assert "biases of one number: bias_{1,2}" in said
    assert "zero-initialised" not in said


# Twins


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", JOINS)
def test_a_twin_computes_the_same(method: str, name: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(model, x, method=method, alpha_init=None)
    assert len(list(rz.alphas(made))) == SUMS[name]
    twin = Twin(copy.deepcopy(made), method, randomized(made))
    ours, own = gradients(made, x)
    theirs, others = gradients(twin, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    trained = METHODS[method].trainable
    named = [name for name, _ in rz.alphas(made)]
    assert len([name for name in named if name in own]) == (len(named) if trained else 0)
    for index, name in enumerate(named if trained else []):
        torch.testing.assert_close(own[name], others[f"gates.{index}"], rtol=1e-8, atol=1e-10)
    weights = [name for name in own if name not in named]
    assert weights
    for name in weights:
        torch.testing.assert_close(own[name], others[f"net.{name}"], rtol=1e-8, atol=1e-10)


class FixUp(nn.Module):
    """A ResNet or a stack of linear layers after FixUp, by hand; the norms of the ResNet are gone."""

    def __init__(self, net: nn.Module, gates: list[Tensor], shifts: list[list[Tensor]]) -> None:
        super().__init__()
        self.net = net
        self.gates = nn.ParameterList([nn.Parameter(gate.detach().clone()) for gate in gates])
        self.shifts = nn.ModuleList(
            nn.ParameterList([nn.Parameter(one.detach().clone()) for one in some]) for some in shifts
        )

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        image = isinstance(net, relatives.ResNet)
        x = F.relu(net.stem(x)) if image else net.embed(x)
        for block, scale, b in zip(net.blocks, self.gates, self.shifts, strict=True):
            if image:
                f = F.relu(block.conv1(x + b[0]) + b[1])
                f = block.conv2(f + b[2]) * scale
                x = F.relu(f + (x if block.down is None else block.down(x)) + b[3])
            else:
                x = x + scale * F.relu(block.fc(x + b[0]) + b[1])
        return net.head(x.mean((2, 3)) if image else x)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("door", ["model", "symbolic_trace", "export"])
@pytest.mark.parametrize(("name", "biases"), [("resnet", 4), ("dense", 2)])
def test_fixup(name: str, biases: int, door: str) -> None:
    model, x = relatives.made(name)
    original = copy.deepcopy(model)
    made = rz.convert(DOORS[door](model.eval(), x) if door != "model" else model, x, method="fixup")
    blocks = [f"blocks.{number}" for number in range(3)]
    names = [[f"{block}.bias_{number}" for number in range(1, biases + 1)] for block in blocks]
    assert [key for key, _ in rz.alphas(made)] == [f"{block}.alpha" for block in blocks]
    assert {key for key, _ in made.named_parameters()} - {key for key, _ in original.named_parameters()} == {
        key for some in names for key in some
    } | {key for key, _ in rz.alphas(made)}
    # at the start: identity of the blocks, zero classifier, m - 1 of m layers scaled by L^(-1 / (2m - 2))
    assert gate_values(made) == {1.0}
    assert not made(x).any()
    if name == "resnet":
        scaled = made.get_parameter("blocks.0.conv1.weight")
        torch.testing.assert_close(scaled, original.blocks[0].conv1.weight * 3**-0.5)
        assert not made.get_parameter("blocks.0.conv2.weight").any()
    else:
        assert not made.get_parameter("blocks.0.fc.weight").any()
        assert not made.get_parameter("blocks.0.fc.bias").any()
    assert rz.validate(made, x).ok
    # anywhere else: the twin
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    shell = copy.deepcopy(original)
    shell.load_state_dict(made.state_dict(), strict=False)
    twin = FixUp(shell, [gate for _, gate in rz.alphas(made)],
                 [[made.get_parameter(key) for key in some] for some in names])  # fmt: skip
    if door == "export":
        torch.testing.assert_close(made(x), twin(x), rtol=1e-9, atol=1e-9)
        return
    ours, own = gradients(made, x)
    theirs, others = gradients(twin, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for index, some in enumerate(names):
        torch.testing.assert_close(own[f"blocks.{index}.alpha"], others[f"gates.{index}"], rtol=1e-8, atol=1e-9)
        for number, key in enumerate(some):
            torch.testing.assert_close(own[key], others[f"shifts.{index}.{number}"], rtol=1e-8, atol=1e-9)
    if door == "model":
        assert torch.equal(pickle.loads(pickle.dumps(made)).eval()(x), made.eval()(x))
        assert torch.equal(copy.deepcopy(made)(x), made(x))


def test_fixup_on_transformers_and_in_files() -> None:
    for name in ("pre", "post"):
        model, x = relatives.made(name)
        made = rz.convert(model, x, method="fixup")
        assert [key for key, _ in rz.alphas(made)] == ["blocks.0.alpha", "blocks.1.alpha"]
        refused = [site for site in rz.audit(made).plan.of("refused") if site.code == "RZ919"]
        assert len(refused) == 2
        assert all("an attention or recurrent module holds several layers" in site.reason for site in refused)
        with pytest.warns(UserWarning, match="start values that the method set stay"):
            restored = rz.unconvert(made)
        assert restored.state_dict().keys() == model.state_dict().keys()
    model, x = nn.Sequential(InSequence(), nn.Linear(4, 2)), torch.randn(2, 4)
    with pytest.warns(rz.NoEffectWarning, match="Linear is not called in the text of the module that adds"):
        rz.convert(model, x, method="fixup")
    report = rz.audit_source(Path(relatives.__file__).read_text(), method="fixup")
    assert not report.plan.converted
    assert any("fixup' depends on the number of blocks" in site.reason for site in report.plan.sites)


class InSequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_zero_gamma_is_what_torchvision_does() -> None:
    resnet18 = pytest.importorskip("torchvision").models.resnet18
    x = torch.randn(2, 3, 32, 32)
    made = rz.convert(resnet18(), x, method="zero-gamma")
    other = resnet18(zero_init_residual=True)
    zeros = {key for key, value in other.state_dict().items() if key.endswith("weight") and not value.any()}
    assert {key for key, _ in rz.alphas(made)} == zeros
    assert len(zeros) == 8
    other.load_state_dict(made.state_dict())
    assert torch.equal(made.eval()(x), other.eval()(x))
    report = rz.audit(other, x, method="zero-gamma")
    assert (report.counts["gated"], report.counts["converted"]) == (8, 0)


def test_zero_gamma_shuts_a_trained_norm_and_needs_one() -> None:
    model, x = relatives.made("resnet")
    made = rz.convert(model, x, method="zero-gamma")
    block = made.blocks[0]
    h = torch.randn(2, 8, 4, 4, dtype=torch.float64).relu()
    assert torch.equal(block(h), h)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.rand_like(parameter))
    assert rz.validate(made, x).ok
    assert pickle.loads(pickle.dumps(made)).state_dict().keys() == model.state_dict().keys()
    with pytest.warns(UserWarning, match="zero initializations stay undone|keep their present"):
        rz.unconvert(made)
    for name in ("pre", "post", "dense"):
        net, inputs = relatives.made(name)
        with pytest.warns(rz.NoEffectWarning, match="does not end in a norm of its module with a weight"):
            rz.convert(net, inputs, method="zero-gamma")
    with pytest.raises(rz.ConversionError, match="keeps the norms"):
        rz.convert(model, x, method="zero-gamma", drop_norm="batch")


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].placement and name != "highway"])
def test_a_resnet_of_56_layers(method: str) -> None:
    model = relatives.ResNet(9)  # 27 blocks of two convolutions, stem and head
    x = torch.randn(2, 3, 8, 8)
    made = rz.convert(model, x, method=method, verify=method in ("rescalenet", "fixup"))
    sizes = {gate.numel() for _, gate in rz.alphas(made)}
    assert len(list(rz.alphas(made))) == 27
    assert sizes == ({8, 16, 24} if method in ("layerscale", "zero-gamma") else {1})
    (made.train()(x) * torch.linspace(-1, 1, 10).view(2, 5)).sum().backward()
    grads = [gate.grad for _, gate in rz.alphas(made)]
    if method in ("frozen", "beta"):
        assert grads == [None] * 27
    elif method == "fixup":  # behind a zero classifier, before zero layers: awake after the head has moved
        assert not any(grad.any() for grad in grads)
        assert made.head.weight.grad.any()
    else:
        assert all(grad.isfinite().all() for grad in grads)
        assert any(grad.any() for grad in grads)


# What every method keeps


@pytest.mark.parametrize(
    ("method", "name"), [*((method, "resnet") for method in JOINS), ("gated", "post"), ("beta", "post")]
)
def test_copies_pickles_audits_and_the_way_back(method: str, name: str) -> None:
    model, x = relatives.made(name)
    before = model(x)
    made = rz.convert(model, x, method=method)
    randomized(made)
    made.eval()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
    again = rz.audit(made, x, method=method)
    assert not again.plan.converted
    assert again.counts["gated"] == SUMS[name]
    assert rz.validate(made, x).ok
    dropped = any(norm.action != "keep" for site in rz.audit(made).plan.converted for norm in site.norms)
    if dropped:
        with pytest.warns(UserWarning, match="made anew"):
            rz.unconvert(made)
    else:
        restored = rz.unconvert(made)
        assert torch.equal(restored.train()(x), before) if name == "post" else True
        assert list(restored.state_dict()) == list(model.state_dict())


# What each promises at the start


def gate_values(model: nn.Module) -> set[float]:
    return {round(float(value), 9) for _, gate in rz.alphas(model) for value in gate.detach().flatten()}


@pytest.mark.parametrize(
    ("method", "value"),
    [("rezero", 0), ("rezero-one", 1), ("frozen", 1 / 4), ("skipinit", 0), ("layerscale", 0.1), ("gated", 1),
     ("gated-authors", 0), ("beta", 0.1), ("rescalenet", 1)],
)  # fmt: skip
def test_start_values(method: str, value: float) -> None:
    model, x = relatives.made("pre")
    assert gate_values(rz.convert(model, x, method=method)) == {round(value, 9)}
    if method not in ("rescalenet", "gated"):
        assert gate_values(rz.convert(model, x, method=method, alpha_init=0.25)) == {0.25}


@pytest.mark.parametrize("method", ["rezero", "skipinit", "gated-authors"])
def test_blocks_are_the_identity(method: str) -> None:
    model, x = relatives.made("pre")
    made = rz.convert(model, x, method=method)
    h = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(made.blocks(h), h)


def test_layer_scale_starts_by_depth() -> None:
    for depth, value in ((18, 0.1), (19, 1e-5), (25, 1e-6)):
        model = relatives.Stack(relatives.Pre, depth)
        made = rz.convert(model, torch.randn(1, 2, 4), method="layerscale", verify=False)
        assert {float(gate.detach()[0]) for _, gate in rz.alphas(made)} == {torch.tensor(value).item()}


class Sine(nn.Module):
    """sin(z) has the variance (1 - exp(-2)) / 2 where z has the variance 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.fc(x)) / math.sqrt((1 - math.exp(-2)) / 2)


def test_rescalenet_keeps_the_variance_of_the_stream() -> None:
    """With branches of variance 1."""
    torch.manual_seed(0)

    @torch.no_grad()
    def spread(made: Any) -> list[float]:
        x = torch.randn(512, 64)
        found = [float(x.var())]
        for block in made.blocks:
            x = block(x)
            found.append(float(x.var()))
        return found

    model = relatives.Stack(Sine, 64, 64)
    plain = spread(model)
    held = spread(rz.convert(model, torch.randn(2, 4), method="rescalenet", verify=False))
    assert len(held) == 65
    assert plain[-1] > 20
    assert max(held) < 1.1
    assert min(held) > 0.9


def test_frozen_gates_are_constants() -> None:
    model, x = relatives.made("dense")
    made = rz.convert(model, x, method="frozen")
    assert not any(gate.requires_grad for _, gate in rz.alphas(made))
    with pytest.raises(rz.ConversionError, match="no trainable gate"):
        rz.param_groups(made)
    assert gate_values(made) == {round(1 / 3, 9)}


def test_one_gate_for_each_channel_beside_images_and_sequences() -> None:
    for name, sizes in (("resnet", {(8,), (16,), (24,)}), ("pre", {(8,)})):
        model, x = relatives.made(name)
        made = rz.convert(model, x, granularity="channel")
        assert {tuple(gate.shape) for _, gate in rz.alphas(made)} == sizes
        assert rz.validate(made, x).ok
    bare = rz.convert(model, granularity="channel")  # no inputs: the layers tell the numbers
    assert {tuple(gate.shape) for _, gate in rz.alphas(bare)} == {(8,)}
    assert bare(x).shape == model(x).shape
    share = rz.convert(model, x, granularity="channel", share="layer")
    assert len(list(rz.alphas(share))) == 2


@pytest.mark.parametrize("method", ["gated", "gated-authors", "rescalenet", "layerscale", "frozen"])
def test_half_precision_stays(method: str) -> None:
    model = relatives.Stack(relatives.Dense, 2)
    made = rz.convert(model, torch.randn(2, 4), method=method)
    made.to(torch.bfloat16)
    for _, gate in rz.alphas(made):
        gate.data = gate.data.float()
    assert made(torch.randn(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


# Routes


DOORS = {
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(copy.deepcopy(model)),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize(
    ("method", "door", "name"),
    [(method, "symbolic_trace", name) for method in JOINS for name in ["resnet"]]
    + [(method, "symbolic_trace", "pre") for method in ("gated-authors", "rescalenet")]
    + [(method, "export", "resnet") for method in ("gated", "gated-authors", "layerscale", "rescalenet")],
)
def test_a_graph_computes_what_the_model_computes(method: str, door: str, name: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(model, x, method=method)
    other = rz.convert(DOORS[door](model.eval(), x), x, method=method)
    randomized(made)
    assert [name for name, _ in rz.alphas(other)] == [name for name, _ in rz.alphas(made)]
    with torch.no_grad():
        for (_, gate), (_, source) in zip(rz.alphas(other), rz.alphas(made), strict=True):
            assert gate.requires_grad == source.requires_grad
            gate.copy_(source)
    torch.testing.assert_close(other(x), made.eval()(x), rtol=1e-9, atol=1e-9)


def from_text(text: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "rewritten"}
    exec(compile(text, "rewritten.py", "exec"), space)
    return space


@pytest.mark.parametrize("method", [name for name in JOINS if name != "rescalenet"])
def test_a_rewritten_file_computes_what_the_model_computes(method: str) -> None:
    file = Path(relatives.__file__)
    for name in NETS:
        model, x = relatives.made(name)
        found = rz.convert_source(file.read_text(), file=str(file), model=model, example_inputs=x, method=method)
        made = rz.convert(model, x, method=method)
        other = from_text(found.text)["made"](name)[0]
        assert {key: value.shape for key, value in other.state_dict().items()} == {
            key: value.shape for key, value in made.state_dict().items()
        }
        if name != "post":
            assert rz.validate(other, x, options=make_options(method=method)).ok
        starts = [other.get_parameter(name) for name, _ in rz.alphas(made)]
        randomized(made)
        for gate, start in zip(rz.alphas(made), starts, strict=True):
            assert start.requires_grad == gate[1].requires_grad
        other.load_state_dict(made.state_dict())
        assert torch.equal(other.eval()(x), made.eval()(x))


def test_a_file_by_itself_does_not_tell_the_depth() -> None:
    text = Path(relatives.__file__).read_text()
    for method in ("frozen", "rescalenet", "layerscale"):
        report = rz.audit_source(text, method=method)
        assert not report.plan.converted
        assert {site.code for site in report.plan.of("refused") if "blocks" in site.reason} == {"RZ915"}
    assert (
        "torch.full((1,), 0.25), requires_grad=False" in rz.convert_source(text, method="frozen", alpha_init=0.25).text
    )


def test_files_say_the_form() -> None:
    text = Path(relatives.__file__).read_text()
    assert "return x + self.alpha.relu() * F.relu(self.fc(x))" in rz.convert_source(text, method="gated").text
    authors = rz.convert_source(text, method="gated-authors").text
    assert "return (1 - self.alpha) * x + self.alpha * F.relu(self.fc(x))" in authors
    scale = rz.convert_source(text, method="layerscale", alpha_init=0.1).text
    assert "self.alpha = nn.Parameter(0.1 * torch.ones(self.conv2.out_channels))" in scale
    assert "self.alpha.view(-1, 1, 1) * " in scale


# Start values in files


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """The networks in a file where no code sets start values later, imported."""
    text = Path(relatives.__file__).read_text()
    start, end = text.index("    for parameter in model.parameters()"), text.index("    return model, torch.randn")
    file = tmp_path / "plain_nets.py"
    file.write_text(text[:start] + text[end:])
    spec = importlib.util.spec_from_file_location("plain_nets", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_nets"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plain_nets"]


@pytest.mark.parametrize(
    ("method", "name"), [("zero-gamma", "resnet"), ("fixup", "resnet"), ("fixup", "pre"), ("fixup", "dense")]
)
def test_a_file_sets_the_start_values_that_the_model_gets(plain: Any, method: str, name: str) -> None:
    text = Path(plain.__file__).read_text()
    model, x = plain.made(name)
    found = rz.convert_source(text, file=plain.__file__, model=model, example_inputs=x, method=method)
    other = from_text(found.text)["made"](name)[0]
    made = rz.convert(model, x, method=method)
    ours, theirs = made.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-6, atol=1e-6)
    assert rz.validate(other, x, options=make_options(method=method)).ok
    if method == "fixup":
        assert not other(x).any()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(x), made.eval()(x))


def test_zero_gamma_by_the_text_alone(plain: Any) -> None:
    text = Path(plain.__file__).read_text()
    found = rz.convert_source(text, method="zero-gamma")
    assert found.text.count("zeros_") == found.text.count("nn.init.zeros_(self.bn2.weight)\n") == 1
    assert rz.convert_source(found.text, method="zero-gamma").text == found.text


AGAIN = {
    "a loop over modules": (
        "        self.head = nn.Linear(24, 5)\n",
        "        for m in self.modules():\n            if isinstance(m, nn.BatchNorm2d):\n"
        "                nn.init.ones_(m.weight)\n",
    ),
    "a loop over parameters": (
        "        self.head = nn.Linear(24, 5)\n",
        "        for p in self.parameters():\n            nn.init.normal_(p)\n",
    ),
    "a method of its own": (
        "        self.bn2 = nn.BatchNorm2d(outputs)\n",
        "        self.reset()\n\n    def reset(self) -> None:\n        nn.init.ones_(self.bn2.weight)\n\n"
        "    def more(self, inputs, outputs, stride) -> None:\n",
    ),
    "a condition": (
        "        self.bn2 = nn.BatchNorm2d(outputs)\n",
        "        self.bn2 = None if stride > 9 else self.bn2\n",
    ),
}


@pytest.mark.parametrize("how", AGAIN)
def test_start_values_that_code_sets_later_stay(plain: Any, how: str) -> None:
    behind, added = AGAIN[how]
    text = Path(plain.__file__).read_text()
    assert behind in text
    text = text.replace(behind, behind + added)
    report = rz.audit_source(text, method="zero-gamma")
    result = rz.convert_source(text, method="zero-gamma")
    assert result.text == text
    (site,) = (site for site in result.report.plan.sites if site.cls == "Basic")
    assert (site.verdict, site.code) == ("refused", "RZ912"), report
    assert "sets it later" in site.reason or "under a condition" in site.reason or "constructor" in site.reason
