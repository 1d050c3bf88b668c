"""Models whose code does more than call torch: transforms of torch.func, operators that take functions, closures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import rezero_convert as rz

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.fc = nn.Linear(16, 16)

    def attention(self, x: Tensor, **how: Any) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v, **how).transpose(1, 2).flatten(2)  # type: ignore[union-attr]


# What the input goes through unseen


class ThroughNumpy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.tanh(self.fc(x).detach().numpy()))


def tripled(x: Tensor) -> Tensor:
    return x * 3


class ThroughScript(Block):
    def __init__(self) -> None:
        super().__init__()
        self.tripled = torch.jit.script(tripled)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.tripled(x))  # type: ignore[no-any-return]


class Attribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.table)


class InAList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.ones(4, 16)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.tables[0])


@pytest.mark.parametrize(
    ("make", "code"),
    [(ThroughNumpy, "RZ920"), (ThroughScript, "RZ920"), (Attribute, "RZ907"), (InAList, "RZ907")],
)
def test_a_value_from_out_of_sight_is_not_said_to_be_independent_of_the_input(make: type[nn.Module], code: str) -> None:
    (site,) = rz.audit(make(), torch.randn(3, 4, 16)).plan.sites
    assert (site.verdict, site.code) == ("refused", code)


# What is followed


class Mapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.vmap(lambda one: torch.tanh(self.fc(one)))(x)


class MappedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.vmap(torch.vmap(self.fc))(x)


class MappedAround(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: one + self.fc(one))(x)


class Energy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.func.grad(lambda y: self.fc(y).square().sum())(x)


class Tangent(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.func.jvp(self.fc, (x,), (x,))[1]


class Called(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.func.functional_call(self.fc, dict(self.fc.named_parameters()), (x,))


class Flexible(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Causal(Block):
    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        return x + self.fc(self.attention(x, block_mask=mask))


class Reentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.fc, x, use_reentrant=True)


class Holding(Block):
    """A function of the constructor's, which a plain copy would leave with the original's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = torch.compile(lambda x: torch.tanh(self.fc(x)), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


FOLLOWED = [
    Mapped,
    MappedTwice,
    MappedAround,
    Energy,
    Tangent,
    Called,
    Flexible,
    Causal,
    Reentrant,
    Holding,
]


@pytest.mark.parametrize("make", FOLLOWED)
def test_it_is_converted_and_checked(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), make()).eval()
    x = torch.randn(3, 128, 16)
    with torch.no_grad():
        expected = model(x)
        converted = rz.convert(model, x)
        assert [name for name, _ in rz.alphas(converted)] == ["0.alpha", "1.alpha"]
        assert torch.equal(converted(x), x)
        assert torch.equal(rz.convert(model, x, alpha_init="preserve")(x), expected)
        assert torch.equal(model(x), expected)


def test_gradients_that_a_device_has_not_are_not_said_to_be_checked() -> None:
    x = torch.randn(3, 128, 16)
    check = rz.validate(rz.convert(Flexible(), x), x)
    assert check.ok
    assert any("no gradients were checked" in note and "backward on CPU" in note for note in check.notes)
    names = {one.name for block in check.blocks for one in block.checks}
    assert "identity" in names
    assert not names & {"alive", "vjp", "branch-alive"}


def test_a_copy_does_not_run_the_originals_layers() -> None:
    model, x = Holding(), torch.randn(3, 4, 16)
    converted = rz.convert(model, x, alpha_init=1.0, drop_norm="none")
    with torch.no_grad():
        expected = model(x)
        converted.fc.weight.zero_()
        converted.fc.bias.zero_()
        assert torch.equal(converted(x), x)
        assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
