"""Every check of `validate` fails on a conversion that is broken on purpose, and passes where nothing is wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from rich.console import Console
from torch import nn
from torch.autograd.graph import GradientEdge

import rezero_convert as rz
from rezero_convert import validation
from rezero_convert.detect import detect
from rezero_convert.plan import Options, Plan
from rezero_convert.validation import measured


class GPTBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        x = x + self.mlp(self.ln_2(x))
        return x


def gpt(depth: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), *(GPTBlock() for _ in range(depth)), nn.LayerNorm(16), nn.Linear(16, 4))


def gpt_inputs() -> torch.Tensor:
    return torch.randn(2, 5, 8)


class PostNorm(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.relu(self.linear(x)))


class Parallel(nn.Module):
    """Two branches of one skip."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.a(x)) + torch.tanh(self.b(x))


def post() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), PostNorm(), PostNorm(), nn.Linear(16, 4))


def resnet() -> nn.Module:
    return zoo.BY_NAME["torchvision resnet18"].make()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32)


def converted(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    return rz.convert(model, inputs, verify=False, **options)


def failed(result: rz.Validation) -> set[str]:
    """The checks that fail, as "name mode"."""
    every = [*result.checks, *(check for block in result.blocks for check in block.checks)]
    return {f"{check.name} {check.mode}" for check in every if not (check.ok or check.choice)}


def of_gate(result: rz.Validation, name: str) -> set[str]:
    """The checks that fail of the block with this gate."""
    (block,) = (block for block in result.blocks if name in block.alphas)
    return {f"{check.name} {check.mode}" for check in block.checks if not check.ok}


def names(result: rz.Validation) -> set[str]:
    return {one.split()[0] for one in failed(result)}


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put a hand-written forward on one instance, over the converted class's."""
    module.forward = MethodType(forward, module)


# Broken on purpose


def test_gate_on_the_skip() -> None:
    model = converted(gpt(), gpt_inputs())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.alpha_attn * x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.alpha_mlp * self.mlp(x)

    replace_forward(model[1], forward)
    result = rz.validate(model, gpt_inputs())
    assert {"read eval", "read train"} <= failed(result)
    assert "1.alpha_attn gates no branch" in "".join(result.failures)
    assert "1.alpha_mlp" not in "".join(result.failures)


def test_gate_on_the_skip_of_a_resnet_block() -> None:
    model = converted(resnet(), image())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.alpha * x + F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    replace_forward(model.layer1[1], forward)
    assert "read eval" in failed(rz.validate(model, image()))


def test_gate_on_the_skip_too() -> None:
    """The gate scales both: it is read, but the block is no identity."""
    model = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))
    replace_forward(model[1], lambda self, x: self.alpha * x + self.alpha * torch.relu(self.linear(x)))
    result = rz.validate(model, torch.randn(2, 8))
    assert failed(result) == {"gated eval", "gated train"}
    assert "a gate scales the skip" in result.failures[0]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_small_constant_beside_the_gate(inplace: bool) -> None:
    """No graph shows it, and the gradients are those of the identity; the sum is not."""
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        branch = self.alpha * torch.relu(self.linear(x.clone()))
        branch.data.add_(1e-4)
        return x.add_(branch) if inplace else x + branch

    replace_forward(made[1], forward)
    assert failed(rz.validate(made, torch.randn(2, 8))) == {"identity eval", "identity train"}


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_left_behind_the_add(inplace: bool) -> None:
    model = converted(resnet(), image())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.alpha * out, inplace=inplace)

    replace_forward(model.layer1[1], forward)
    result = rz.validate(model, image())
    assert failed(result) == {"vjp eval", "vjp train"}
    assert all("layer1.1 " in line for line in result.failures)


def test_a_block_that_fails_in_train_mode_only_fails() -> None:
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + self.alpha * torch.relu(self.linear(x))
        return torch.relu(y) if self.training else y

    replace_forward(made[1], forward)
    result = rz.validate(made, torch.randn(2, 8))
    assert failed(result) == {"vjp train"}
    assert not result.ok
    assert len(result.failures) == 1


def test_a_module_that_fails_in_its_second_run_only_fails() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = zoo.Block(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(1 - self.block(1 + torch.relu(x)))

    made = converted(Twice(), torch.randn(2, 16))
    replace_forward(made.block, lambda self, x: torch.relu(x + self.alpha * self.linear(x)))
    assert failed(rz.validate(made, torch.ones(2, 16))) == {"vjp eval", "vjp train"}


def test_an_activation_behind_a_loop_is_not_the_last_blocks_own() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                entry = x
                x = torch.tanh(layer(x))
                x += entry
            return torch.relu(x)

    model, x = Looped(), torch.randn(2, 16)
    made = rz.convert(model, x)
    assert rz.validate(made, x).ok
    assert torch.equal(made(x), torch.relu(x))


def test_double_zero() -> None:
    model = converted(resnet(), image())
    nn.init.zeros_(model.layer2[0].bn2.weight)
    result = rz.validate(model, image())
    assert {"nonzero eval", "alive eval", "nonzero train", "alive train"} <= failed(result)
    assert all("layer2.0 " in line for line in result.failures)


def test_norm_left() -> None:
    model = gpt()
    made = converted(copy.deepcopy(model), gpt_inputs())
    norm = made[2].ln_2 = model[2].ln_2

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + self.alpha_attn * self.attn(x, x, x, need_weights=False)[0]
        return x + self.alpha_mlp * self.mlp(norm(x))

    replace_forward(made[2], forward)
    result = rz.validate(made, gpt_inputs())
    assert failed(result) == {"norm-gone eval", "norm-gone train"}
    assert "2.ln_2 was to go but runs" in result.failures[0]


def test_norm_put_back_into_a_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.branch(x)

    made = converted(nn.Sequential(nn.Linear(8, 16), Listed()), torch.randn(2, 8))
    assert isinstance(made[1].branch[0], nn.Identity)
    made[1].branch[0] = nn.LayerNorm(16)
    assert failed(rz.validate(made, torch.randn(2, 8))) == {"norm-gone eval", "norm-gone train"}


def test_norm_left_after_the_sum() -> None:
    made = converted(post(), torch.randn(3, 8))
    made[2].norm = nn.LayerNorm(16)
    replace_forward(made[2], lambda self, x: self.norm(x + self.alpha * torch.relu(self.linear(x))))
    result = rz.validate(made, torch.randn(3, 8))
    assert {"norm-gone eval", "vjp eval", "norm-gone train", "vjp train"} == failed(result)


def test_one_branch_of_two_ungated() -> None:
    x = torch.randn(2, 8)
    made = converted(nn.Sequential(nn.Linear(8, 16), Parallel()), x)
    replace_forward(made[1], lambda self, x: x + self.alpha_a * torch.tanh(self.a(x)) + torch.tanh(self.b(x)))
    result = rz.validate(made, x)
    assert {"gated eval", "identity eval", "vjp eval", "read eval"} <= failed(result)
    assert "1.alpha_b gates no branch" in "".join(result.failures)


def test_one_branch_of_two_ungated_in_a_model_without_record() -> None:
    class Block(Parallel):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.alpha * torch.tanh(self.a(x)) + torch.tanh(self.b(x))

    result = rz.validate(nn.Sequential(nn.Linear(8, 16), Block()), torch.randn(2, 8))
    assert {"gated eval", "gated train", "identity eval"} <= failed(result)


def test_alpha_not_registered() -> None:
    made = converted(gpt(), gpt_inputs())
    del made[1].alpha_mlp
    made[1].alpha_mlp = torch.zeros(1)
    result = rz.validate(made, gpt_inputs())
    assert "registered structure" in failed(result)
    assert result.failures[0] == "registered (structure): 1.alpha_mlp is not a parameter"


def test_alpha_not_registered_in_a_model_without_record() -> None:
    class Plain(zoo.Block):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.alpha = torch.zeros(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.alpha * torch.relu(self.linear(x))

    result = rz.validate(nn.Sequential(nn.Linear(8, 16), Plain(16), Plain(16)), torch.randn(2, 8))
    assert "registered structure" in failed(result)


def test_alpha_deleted_and_bypassed() -> None:
    made = converted(resnet(), image())
    original = type(made.layer3[1]).__mro__[1].forward
    replace_forward(made.layer3[1], original)
    result = rz.validate(made, image())
    assert failed(result) == {"read eval", "read train"}
    assert "layer3.1.alpha gates no branch" in result.failures[0]
    del made.layer3[1].alpha
    assert "registered structure" in failed(rz.validate(made, image()))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gate_bypassed_in_one_mode(mode: str) -> None:
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16), zoo.Block(16)), torch.randn(2, 8))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        branch = torch.relu(self.linear(x))
        if self.training == (mode == "train"):
            return x + F.dropout(branch, 0.1, self.training)
        return x + self.alpha * branch

    replace_forward(made[1], forward)
    result = rz.validate(made, torch.randn(2, 8))
    assert failed(result) == {f"read {mode}"}


def test_encoder_fast_path_bypasses_the_gate() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    made = converted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 16))
    one = made.layers[0]

    def forward(self: Any, src: torch.Tensor, **options: Any) -> torch.Tensor:
        if not self.training:
            src = src + self.self_attn(src, src, src, need_weights=False)[0]
            return src + self.linear2(torch.relu(self.linear1(src)))
        src = src + self.alpha_self_attn * self.self_attn(src, src, src, need_weights=False)[0]
        return src + self.alpha_linear2 * self.linear2(torch.relu(self.linear1(src)))

    one.forward = lambda src, src_mask=None, is_causal=False, src_key_padding_mask=None: forward(one, src)
    result = rz.validate(made, torch.randn(2, 5, 16))
    assert failed(result) == {"read eval"}
    assert "layers.0.alpha_{" in result.failures[0] or "layers.0.alpha_linear2" in result.failures[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_branch_not_finite(value: float) -> None:
    made = converted(gpt(), gpt_inputs())
    nn.init.constant_(made[1].mlp[2].bias[:1], value)  # one channel
    result = rz.validate(made, gpt_inputs())
    assert {"finite eval", "identity eval", "finite train"} <= failed(result)
    assert "finite eval" in of_gate(result, "1.alpha_mlp")


def test_branch_with_an_infinite_slope() -> None:
    """The values are fine; the gradient is 0 * inf."""
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))
    replace_forward(made[1], lambda self, x: x + self.alpha * (torch.sqrt(0 * self.linear(x)) + 1))
    assert names(rz.validate(made, torch.randn(2, 8))) & {"vjp"}


def test_frozen_alpha() -> None:
    made = converted(gpt(), gpt_inputs())
    made[2].alpha_attn.requires_grad_(False)
    result = rz.validate(made, gpt_inputs())
    assert result.failures == ("trainable (structure): 2.alpha_attn is frozen",)
    assert not made[2].alpha_attn.requires_grad


class TwoGates(nn.Module):
    """One branch has a gate already, whose name the other one's ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a * torch.relu(self.one(x)) + torch.relu(self.two(x))


def test_frozen_alpha_beside_a_gate_that_was_there() -> None:
    made = converted(TwoGates(), torch.randn(2, 8))
    assert [name for name, _ in rz.alphas(made)] == ["a", "alpha"]
    made.alpha.requires_grad_(False)
    assert rz.validate(made, torch.randn(2, 8)).failures == ("trainable (structure): alpha is frozen",)
    made.alpha.requires_grad_(True)
    made.a.requires_grad_(False)
    assert rz.validate(made, torch.randn(2, 8)).ok


def test_alpha_without_gradient() -> None:
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            alpha = self.alpha * 1
        return x + alpha * torch.relu(self.linear(x))

    replace_forward(made[1], forward)
    assert {"alive eval", "alive train"} <= failed(rz.validate(made, torch.randn(2, 8)))


def test_branch_without_gradient() -> None:
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16)), torch.randn(2, 8))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            branch = torch.relu(self.linear(x))
        return x + self.alpha * branch

    replace_forward(made[1], forward)
    assert "branch-alive eval" in failed(rz.validate(made, torch.randn(2, 8)))


def test_branch_leaks_around_its_gate() -> None:
    """By a way that no graph shows."""
    made = converted(nn.Sequential(nn.Linear(8, 16), zoo.Block(16), nn.Linear(16, 4)), torch.randn(2, 8))

    def leak(self: Any, x: torch.Tensor) -> torch.Tensor:
        branch = torch.relu(self.linear(x))
        self.seen = float(branch.detach().sum())
        return x + self.alpha * branch

    replace_forward(made[1], leak)
    replace_forward(made[2], lambda self, x: F.linear(x, self.weight, self.bias) + made[1].seen)
    result = rz.validate(made, torch.randn(2, 8))
    assert failed(result) == {"sealed eval"}


def test_a_model_without_gates_is_an_error() -> None:
    with pytest.raises(rz.ConversionError, match="no gate to validate"):
        rz.validate(gpt(), gpt_inputs())


def test_convert_refuses_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that has the gate on the wrong operand."""

    def swapped(*args: Any) -> Plan:
        plan = detect(*args)
        sites = []
        for site in plan.sites:
            gates = [replace(gate, at=replace(gate.at, index=1 - gate.at.index)) for gate in site.gates]
            sites.append(replace(site, gates=tuple(gates)))
        return replace(plan, sites=tuple(sites))

    monkeypatch.setattr("rezero_convert.api.detect", swapped)
    model = zoo.stack(2)
    before = [type(module) for module in model.modules()]
    with pytest.raises(rz.ConversionError, match=r"does not hold: read \(eval\): \{1,2\}.alpha gates no branch"):
        rz.convert(model, torch.randn(2, 8), inplace=True)
    assert [type(module) for module in model.modules()] == before
    assert not hasattr(model[1], "alpha")


# Nothing wrong

WHOLE = {
    "gpt": (gpt, gpt_inputs, 4),
    "resnet18": (resnet, image, 8),
    "encoder": (lambda: zoo.BY_NAME["encoder post-norm"].make(), lambda: torch.randn(2, 5, 16), 4),
    "post-norm": (post, lambda: torch.randn(3, 8), 2),
}
whole = pytest.mark.parametrize(("make", "inputs", "count"), WHOLE.values(), ids=WHOLE.keys())


class Rescaled(nn.Module):
    """A layer that writes to its own parameters where it is trained: rows of length one, a codebook that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.codes = nn.Embedding(4, 8)
        self.codes.weight.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.linear.weight.copy_(F.normalize(self.linear.weight, dim=1))
            self.codes.weight.data.mul_(0.9).add_(x.detach().mean())
            self.shift.data = self.shift.data + 1
            torch.mul(self.scale.data, 2, out=self.scale.data)
        x = x + torch.relu(self.linear(x))
        return x * self.scale + self.codes((x[..., 0] > 0).long()).detach() + self.shift


def test_what_a_model_writes_to_its_parameters_is_undone() -> None:
    model, x = Rescaled(), torch.randn(3, 8)
    made = rz.convert(model, x)
    rz.isometry(made, x)
    rz.trace(made, x)
    assert rz.validate(made, x).ok
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


@whole
def test_everything_holds_and_nothing_changes(make: Any, inputs: Any, count: int) -> None:
    x = inputs()
    made = converted(make(), x)
    for index, (_, alpha) in enumerate(rz.alphas(made)):
        nn.init.constant_(alpha, 0.3 + index / 7)  # trained
    made.train()
    made[1].eval() if isinstance(made, nn.Sequential) else None
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in made.parameters()]
    state = copy.deepcopy(made.state_dict())
    objects = {name: id(value) for name, value in made.named_parameters()}
    flags = [module.training for module in made.modules()]
    rng, python = torch.get_rng_state(), random.getstate()

    result = rz.validate(made, x)

    assert result.ok, result.failures
    assert sum(len(block.alphas) for block in result.blocks) == count
    done = {(check.name, check.mode) for block in result.blocks for check in block.checks}
    assert done == {
        (name, mode)
        for name in ("gated", "identity", "finite", "nonzero", "vjp", "alive", "branch-alive")
        for mode in ("eval", "train")
    }
    assert {check.name for check in result.checks} == {"registered", "trainable", "read", "norm-gone", "sealed"}
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert objects == {name: id(value) for name, value in made.named_parameters()}
    assert all(p.grad is grad and bool((grad == 1).all()) for p, grad in zip(made.parameters(), grads, strict=True))
    assert flags == [module.training for module in made.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert python == random.getstate()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("runs_well", [1, 2, 3])
def test_values_come_back_when_the_model_raises_halfway(runs_well: int) -> None:
    x = gpt_inputs()
    made = converted(gpt(), x)
    for _, alpha in rz.alphas(made):
        nn.init.normal_(alpha)
    runs = []

    def hook(*_: Any) -> None:
        runs.append(1)
        if len(runs) > runs_well:
            raise ValueError("enough")

    made[3].register_forward_pre_hook(hook)
    state = copy.deepcopy(made.state_dict())
    rng = torch.get_rng_state()
    if runs_well < 3:
        with pytest.raises(rz.ConversionError, match="enough"):
            rz.validate(made, x)
    else:  # the last one raises with the branches' weights changed
        assert any("enough" in note for note in rz.validate(made, x).notes)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert torch.equal(rng, torch.get_rng_state())


@whole
def test_preserve_mode(make: Any, inputs: Any, count: int) -> None:
    x = inputs()
    result = rz.validate(converted(make(), x, alpha_init="preserve"), x)
    assert result.ok, result.failures
    kept = {check.status for block in result.blocks for check in block.checks if check.name == "vjp"}
    assert kept == ({"ok"} if make is gpt else {"by choice"})


@pytest.mark.parametrize(
    ("make", "inputs", "options"),
    [(resnet, image, {"activation": "keep"}), (post, lambda: torch.randn(3, 8), {"drop_norm": "none"})],
    ids=["activation kept", "post-norm kept"],
)
def test_by_choice(make: Any, inputs: Any, options: dict[str, Any]) -> None:
    x = inputs()
    result = rz.validate(rz.convert(make(), x, **options), x)
    assert result.ok
    chosen = {(c.name, c.mode) for block in result.blocks for c in block.checks if c.choice}
    assert chosen == {("vjp", "eval"), ("vjp", "train")}
    assert "by choice: vjp" in str(result)


@pytest.mark.parametrize("name", ["timm resnet18", "torchvision resnet50 zero-init", "timm swinv2_tiny"])
def test_a_zero_init_that_preserve_mode_keeps(name: str) -> None:
    case = zoo.BY_NAME[name]
    x = case.inputs()
    made = rz.convert(case.make(), x, alpha_init="preserve")
    result = rz.validate(made, x)
    assert result.ok, result.failures
    assert {"nonzero", "alive"} <= {c.name for block in result.blocks for c in block.checks if c.choice}


class ReZero(zoo.Block):
    """Written by hand, without any record."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__(width)
        self.resweight = nn.Parameter(torch.tensor([start]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.resweight * torch.relu(self.linear(x))


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_handwritten(start: float) -> None:
    model = nn.Sequential(nn.Linear(8, 16), ReZero(16, start), ReZero(16, start), zoo.Block(16))
    result = rz.validate(model, torch.randn(2, 8))
    assert result.ok, result.failures
    assert [block.alphas for block in result.blocks] == [("1.resweight",), ("2.resweight",)]
    assert any("1 residual block without a gate: 3" in note for note in result.notes)
    assert model[1].resweight.item() == pytest.approx(start)


def test_handwritten_and_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 16), ReZero(16, 0.0), ReZero(16, 0.0))
    model[1].resweight.requires_grad_(False)
    assert rz.validate(model, torch.randn(2, 8)).failures == ("trainable (structure): 1.resweight is frozen",)


def test_handwritten_relu_left_behind() -> None:
    class Left(ReZero):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.resweight * self.linear(x))

    model = nn.Sequential(nn.Linear(8, 16), Left(16, 0.0))
    assert "vjp eval" in failed(rz.validate(model, torch.randn(2, 8)))
    assert rz.validate(model, torch.randn(2, 8)).ok is False
    assert "by choice" in str(validation.validate(model, torch.randn(9, 8), options=Options(activation="keep")))


def test_converted_file() -> None:
    source = """
import torch
from torch import nn
from torch.autograd.graph import GradientEdge


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))
"""
    text = rz.convert_source(source, file="made.py").text
    namespace: dict[str, Any] = {"__name__": "made"}
    exec(compile(text, "made.py", "exec"), namespace)
    model = nn.Sequential(nn.Linear(8, 16), *(namespace["Block"](16) for _ in range(3)))
    result = rz.validate(model, torch.randn(2, 8))
    assert result.ok, result.failures
    assert len(result.blocks) == 3


def test_meta_device() -> None:
    with torch.device("meta"):
        model = gpt()
        x = gpt_inputs()
    made = converted(model, x)
    result = rz.validate(made, x)
    assert result.ok, result.failures
    assert "only the structure was checked, on meta tensors" in result.notes
    assert {check.name for block in result.blocks for check in block.checks} == {"gated"}
    replace_forward(made[1], lambda self, x: x + self.mlp(x))
    assert names(rz.validate(made, x)) == {"read"}


def test_frozen_weights() -> None:
    made = converted(gpt(), gpt_inputs())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("alpha" in name)
    result = rz.validate(made, gpt_inputs())
    assert result.ok, result.failures
    assert {(c.name, c.mode) for block in result.blocks for c in block.checks if c.name == "vjp"} == {
        ("vjp", "eval"), ("vjp", "train"),
    }  # fmt: skip
    assert [p.requires_grad for n, p in made.named_parameters()] == ["alpha" in n for n, _ in made.named_parameters()]


def test_all_frozen() -> None:
    made = converted(gpt(), gpt_inputs()).requires_grad_(False)
    result = rz.validate(made, gpt_inputs())
    assert result.ok, result.failures
    assert "all parameters are frozen, the gates too" in result.notes


def test_batch_of_one_in_train_mode() -> None:
    made = converted(nn.Sequential(nn.Linear(8, 16), BatchNormed()), torch.randn(2, 8))
    result = rz.validate(made, torch.randn(1, 8))
    assert result.ok, result.failures
    assert any(note.startswith("not checked in train mode") for note in result.notes)
    assert all(check.mode == "eval" for block in result.blocks for check in block.checks)


class BatchNormed(zoo.Block):
    def __init__(self) -> None:
        super().__init__(16)
        self.bn = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.bn(self.linear(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [gpt, post])
def test_half_precision(dtype: torch.dtype, make: Any) -> None:
    x = torch.randn(2, 5, 8, dtype=dtype)
    made = converted(make().to(dtype), x)
    assert rz.validate(made, x).ok


def test_encoder_behind_a_zero_cross_attention_gate() -> None:
    case = zoo.BY_NAME["transformer post-norm"]
    x = case.inputs()
    result = rz.validate(converted(case.make(), x), x)
    assert result.ok, result.failures
    assert len(result.asleep) == 4
    assert all(name.startswith("encoder.") for name in result.asleep)
    assert "asleep until the second step" in str(result)


def test_a_zero_head_puts_nothing_to_sleep() -> None:
    model = gpt()
    nn.init.zeros_(model[-1].weight)
    result = rz.validate(converted(model, gpt_inputs()), gpt_inputs())
    assert result.ok
    assert not result.asleep


def test_stochastic_depth_is_no_failure() -> None:
    case = zoo.BY_NAME["torchvision efficientnet_b0"]
    model = case.make()
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.5
    x = torch.randn(2, 3, 32, 32)
    assert rz.validate(converted(model, x), x).ok


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zoo.Block(16) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand([]) > 0.5:
                x = layer(x)
        return x


def test_layers_dropped_at_random() -> None:
    made = converted(LayerDrop(), torch.randn(2, 16))
    result = rz.validate(made, torch.randn(2, 16))
    assert result.ok, result.failures
    assert any("did not run in train mode" in note for note in result.notes)


def test_tied_weights_are_not_taken_for_a_branchs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = zoo.Block(16), nn.Linear(16, 16)
            self.head.weight = self.block.linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(x))

    made = converted(Tied(), torch.randn(2, 16))
    result = rz.validate(made, torch.randn(2, 16))
    assert result.ok
    assert "sealed" in [check.name for check in result.checks]  # with the branch's own bias


def test_outputs_from_inside_a_branch_are_not_sealed() -> None:
    class Cache(zoo.Block):
        def forward(self, x: torch.Tensor) -> Any:
            inner = torch.relu(self.linear(x))
            return x + inner, inner

    made = converted(Cache(16), torch.randn(2, 16))
    result = rz.validate(made, torch.randn(2, 16))
    assert result.ok, result.failures
    assert [check.detail for check in result.checks if check.name == "sealed"] == ["1 output"]


def test_a_converted_part_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(zoo.Block(16), PostNorm()), PostNorm())
    model[1] = converted(model[1], torch.randn(2, 16))
    result = rz.validate(model, torch.randn(2, 8))
    assert result.ok, result.failures
    assert [block.path for block in result.blocks] == ["1.0", "1.1"]
    assert all("<rezero" not in block.where for block in result.blocks)


def test_under_no_grad_and_inference_mode() -> None:
    made = converted(gpt(), gpt_inputs())
    with torch.no_grad():
        assert rz.validate(made, gpt_inputs()).ok
    x = gpt_inputs()
    with torch.inference_mode():
        assert rz.validate(made, x).ok


# The other oracles


@whole
def test_equality(make: Any, inputs: Any, count: int) -> None:
    model, x = make(), inputs()
    before = copy.deepcopy(model.state_dict())
    checks = validation.equality(model, converted(model, x, alpha_init="preserve"), x)
    assert [(check.name, check.mode) for check in checks] == [
        ("outputs", "eval"), ("gradients", "eval"), ("outputs", "train"), ("gradients", "train"),
    ]  # fmt: skip
    assert all(check.ok for check in checks), checks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    json.dumps([check.to_dict() for check in checks])


def test_equality_fails() -> None:
    model, x = gpt(), gpt_inputs()
    other = converted(model, x)
    assert [check.ok for check in validation.equality(model, other, x)] == [False, False]
    preserved = converted(model, x, alpha_init="preserve")
    nn.init.constant_(preserved[1].alpha_mlp, 1 + 1e-6)
    assert not validation.equality(model, preserved, x)[0].ok


def test_equality_in_one_mode_only() -> None:
    model, x = zoo.stack(2), torch.randn(2, 8)
    preserved = converted(model, x, alpha_init="preserve")
    replace_forward(preserved[1], lambda self, x: x + (self.alpha - 0.5 * self.training) * torch.relu(self.linear(x)))
    found = {(check.name, check.mode): check.ok for check in validation.equality(model, preserved, x)}
    assert found == {("outputs", "eval"): True, ("gradients", "eval"): True, ("outputs", "train"): False}


def test_equal_outputs_with_other_gradients() -> None:
    model, x = zoo.stack(2), torch.randn(2, 8)
    preserved = converted(model, x, alpha_init="preserve")
    replace_forward(preserved[1], lambda self, x: x + self.alpha * torch.relu(self.linear(x)).detach())
    found = validation.equality(model, preserved, x)
    assert [(check.name, check.ok) for check in found[:2]] == [("outputs", True), ("gradients", False)]


def test_gradients_that_are_a_hundredth_apart() -> None:
    model, x = zoo.stack(2), torch.randn(2, 8)
    preserved = converted(model, x, alpha_init="preserve")
    preserved[1].linear.weight.register_hook(lambda grad: 1.01 * grad)
    found = validation.equality(model, preserved, x)
    assert [(check.name, check.ok) for check in found[:2]] == [("outputs", True), ("gradients", False)]


def test_a_parameter_that_is_missing_is_named() -> None:
    model, x = zoo.stack(2), torch.randn(2, 8)
    preserved = converted(model, x, alpha_init="preserve")
    model.extra = nn.Parameter(torch.zeros(1))
    found = validation.equality(model, preserved, x)
    assert [(check.name, check.ok) for check in found[:2]] == [("outputs", True), ("gradients", False)]
    assert "extra is missing" in found[1].detail


def test_equality_leaves_inputs_that_a_model_overwrites() -> None:
    class Doubling(zoo.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x + torch.relu(self.linear(x))

    x = torch.ones(2, 16)
    model = Doubling(16)
    checks = validation.equality(model, converted(model, x, alpha_init="preserve"), x)
    assert all(check.ok for check in checks), checks
    assert torch.equal(x, torch.ones(2, 16))


@whole
def test_idempotence(make: Any, inputs: Any, count: int) -> None:
    x = inputs()
    for options in ({}, {"alpha_init": "preserve"}, {"exclude": ("1*", "layer1*", "*layers.0*")}):
        check = validation.idempotence(converted(make(), x, **options), x)
        assert check.ok, check
    json.dumps(check.to_dict())


def test_idempotence_fails() -> None:
    made = converted(gpt(), gpt_inputs())
    made[1] = GPTBlock()
    check = validation.idempotence(made, gpt_inputs())
    assert not check.ok
    assert "would be converted" in check.detail


# What is shown


def test_places_are_the_users_own() -> None:
    result = rz.validate(converted(gpt(), gpt_inputs()), gpt_inputs())
    assert all(block.where.startswith(f"{__file__}:") for block in result.blocks)
    lines = Path(__file__).read_text().splitlines()
    assert {lines[int(block.where.split(":")[-2]) - 1].strip() for block in result.blocks} == {
        "x = x + self.attn(h, h, h, need_weights=False)[0]",
        "x = x + self.mlp(self.ln_2(x))",
    }


@pytest.mark.parametrize("width", [80, 110])
def test_many_equal_blocks_take_one_row(width: int) -> None:
    made = converted(zoo.stack(120), torch.randn(2, 8))
    replace_forward(made[7], lambda self, x: torch.relu(x + self.alpha * self.linear(x)))
    result = rz.validate(made, torch.randn(2, 8))
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(result)
    shown = captured.get()
    assert len(shown.splitlines()) < 30
    assert max(map(len, shown.splitlines())) <= width
    assert "x 119" in shown
    assert "FAILED: vjp" in shown.replace("\n", " ")
    assert shown.index("FAILED: vjp") < shown.index("x 119")


def test_colours() -> None:
    made = converted(zoo.stack(2), torch.randn(2, 8))
    console = Console(width=110, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(rz.validate(made, torch.randn(2, 8)))
    assert "\x1b[32mok\x1b[0m" in captured.get()
    replace_forward(made[1], lambda self, x: torch.relu(x + self.alpha * self.linear(x)))
    with console.capture() as captured:
        console.print(rz.validate(made, torch.randn(2, 8)))
    assert "\x1b[1;31mFAILED: vjp\x1b[0m" in captured.get()


def test_json() -> None:
    result = rz.validate(converted(gpt(), gpt_inputs()), gpt_inputs())
    found = json.loads(json.dumps(result.to_dict()))
    assert found["ok"] is True
    assert found["version"] == 1
    assert [block["path"] for block in found["blocks"]] == ["1", "1", "2", "2"]
    assert found["blocks"][0]["checks"][0] == {
        "name": "gated", "mode": "eval", "ok": True, "detail": "", "choice": False,
    }  # fmt: skip


class Fading(nn.Module):
    """Batch norm that has seen no data does not scale: in eval mode the branch fades to an exact zero."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        layers = []
        for _ in range(14):
            conv = nn.Conv2d(4, 4, 1, bias=False)
            nn.init.eye_(conv.weight[:, :, 0, 0])
            with torch.no_grad():
                conv.weight.mul_(1e-4)
            layers += [conv, nn.BatchNorm2d(4) if batch_norm else nn.Identity()]
        self.branch = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def test_a_branch_that_fades_without_batch_norm_is_dead() -> None:
    check = rz.validate(rz.convert(Fading(False), torch.randn(2, 4, 8, 8), verify=False), torch.randn(2, 4, 8, 8))
    assert not check.ok
    assert any("the branch is zero" in failure for failure in check.failures)


def test_a_branch_that_is_zero_in_eval_mode_only_is_a_note() -> None:
    check = rz.validate(rz.convert(Fading(True), torch.randn(2, 4, 8, 8)), torch.randn(2, 4, 8, 8))
    assert check.ok, check.failures
    assert any("alive in train mode" in note for note in check.notes)


class RootAtZero(nn.Module):
    """Its gradient is not a number, converted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.fc(x))
        return x * torch.sqrt(0.0 * x)


def test_gradients_that_are_no_numbers_are_compared_as_such() -> None:
    model, x = RootAtZero(), torch.randn(2, 4)
    checks = validation.equality(model, rz.convert(model, x, alpha_init="preserve"), x)
    assert all(check.ok for check in checks), checks
    other = copy.deepcopy(model)
    nn.init.constant_(other.fc.weight, torch.inf)  # saturates: the gradients of the branch are zero times infinity
    assert not all(check.ok for check in validation.equality(model, other, x))


class Overwrites(nn.Module):
    """Keeps a state that it overwrites although a gradient needs it (RWKV's, in eval mode)."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.fc, self.always = nn.Linear(4, 4), always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.fc(x).exp()
        branch = torch.tanh(state)
        if self.always or not self.training:
            state[:, 0] = 1.0
        return x + branch


def test_what_cannot_be_differentiated_in_eval_mode_is_measured_in_train_mode() -> None:
    model, x = Overwrites(), torch.randn(2, 4)
    check = rz.validate(rz.convert(model, x), x)
    assert check.ok, check.failures
    assert any("cannot be differentiated" in note for note in check.notes)
    done = {(one.name, one.mode) for one in check.blocks[0].checks}
    assert {("identity", "eval"), ("identity", "train"), ("vjp", "train"), ("alive", "train")} <= done
    assert ("vjp", "eval") not in done
    checks = validation.equality(model, rz.convert(model, x, alpha_init="preserve"), x)
    assert all(check.ok for check in checks), checks
    assert any("neither model can be differentiated" in check.detail for check in checks)


def test_what_can_never_be_differentiated_is_no_success() -> None:
    model, x = Overwrites(always=True), torch.randn(2, 4)
    with pytest.raises(rz.ConversionError, match="cannot be differentiated in any mode"):
        rz.validate(rz.convert(model, x, verify=False), x)


def test_a_model_that_alone_cannot_be_differentiated_is_another_model() -> None:
    model, x = Overwrites(), torch.randn(2, 4)
    other = copy.deepcopy(model)
    other.always = True
    checks = {(check.name, check.mode): check for check in validation.equality(model, other, x)}
    assert not checks["gradients", "train"].ok
    assert "only one model" in checks["gradients", "train"].detail


class DeadInside(nn.Module):
    """A branch of a bias alone: its ReLU lets nothing through, so that its weights get gradients of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.constant_(self.up.bias, -100.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_a_branch_whose_weights_get_gradients_of_zeros() -> None:
    x = torch.randn(2, 4)
    failures = rz.validate(rz.convert(DeadInside(), x, verify=False), x).failures
    assert len(failures) == 2
    assert all("branch-alive" in failure for failure in failures)


class Expert(nn.Module):
    """Multiplies by its matrices in one grouped product, as mixtures of experts do, one of them turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 16, 16)), nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([3, 8], dtype=torch.int32)
        hidden = F.grouped_mm(x, self.up, offs=ends)
        return x + F.grouped_mm(torch.relu(hidden), self.down.transpose(-2, -1), offs=ends)


def test_grouped_products_have_weights() -> None:
    x = torch.randn(8, 16)
    converted = rz.convert(Expert(), x)
    assert [name for name, _ in rz.alphas(converted)] == ["alpha"]
    with torch.no_grad():
        converted.down.zero_()
    assert any("branch-alive" in failure or "zero" in failure for failure in rz.validate(converted, x).failures)


@pytest.mark.parametrize("block", [GPTBlock, PostNorm])
def test_the_walks_for_gradients_do_not_grow_with_the_depth(
    block: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check's graph is its own block's: n blocks cost n, not n * n."""
    assert _longest_walk(block, 8, monkeypatch) == _longest_walk(block, 4, monkeypatch)


def _longest_walk(block: type[nn.Module], depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many nodes of autograd's graph the largest gradient of a validation could reach."""
    model = rz.convert(nn.Sequential(*(block() for _ in range(depth))), torch.randn(2, 5, 16), verify=False)
    sizes: list[int] = []
    grads = measured._grads

    def counted(edge: GradientEdge, *others: Any) -> Any:
        seen, stack = {edge.node}, [edge.node]
        while stack:
            found = {node for node, _ in stack.pop().next_functions if node is not None} - seen
            seen |= found
            stack += found
        sizes.append(len(seen))
        return grads(edge, *others)

    with monkeypatch.context() as patched:
        patched.setattr(measured, "_grads", counted)
        assert rz.validate(model, torch.randn(2, 5, 16)).ok
    assert len(sizes) > depth
    return max(sizes)


class Recomputed(torch.autograd.Function):
    """A checkpoint by hand: without gradients forwards, again with them backwards."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.weights = run, weights
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(out, [x, *ctx.weights], grads, allow_unused=True)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Recomputed.apply(self.inner, x, *self.parameters())

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        return (flat + torch.relu(self.fc(flat))).reshape(x.shape)


def test_a_skip_that_is_a_view_in_an_autograd_function_has_no_gradient_to_ask_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), ByHand(), ByHand())
    converted = rz.convert(model, torch.randn(2, 3, 8))
    check = rz.validate(converted, torch.randn(2, 3, 8))
    assert check.ok
    assert len(check.blocks) == 2
    converted(torch.randn(2, 3, 8)).sum().backward()
    assert all(alpha.grad is not None and bool(alpha.grad.any()) for _, alpha in rz.alphas(converted))
