"""Text that serves several uses: helper functions that normalize, adds that are residual in some passes only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def norm_in_single(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.size(-1),)).type_as(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(norm(q), norm(k), v))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = Attention(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(norm(x))
        return x + self.fc(norm(x))


def open_gates(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, gate in rz.alphas(model):
            gate.fill_(0.5)
    return model


@pytest.mark.parametrize("inputs", [X, None])
def test_a_norm_in_a_helper_goes_where_a_branch_calls_it_and_stays_elsewhere(inputs: Any) -> None:
    block = Block()
    converted = open_gates(rz.convert(block, inputs))
    between = X + 0.5 * block.attn(X)  # with its norms of queries and keys
    torch.testing.assert_close(converted(X), between + 0.5 * block.fc(between))
    assert torch.equal(norm(X), F.rms_norm(X, (16,)))


def test_a_helper_that_does_more_than_normalize_stays() -> None:
    class Casting(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(norm_in_single(x))

    (site,) = rz.audit(Casting(), X).plan.converted
    (kept,) = site.norms
    assert (kept.action, kept.reason) == (
        "keep",
        "functional norm inside norm_in_single, which does not just return it",
    )
    model = Casting()
    torch.testing.assert_close(open_gates(rz.convert(model, X))(X), X + 0.5 * model.fc(norm(X)))


def doubled(x: Tensor) -> Tensor:
    x = F.rms_norm(x, (x.size(-1),))
    return x * 2


def test_a_helper_of_more_than_a_norm_keeps_its_call() -> None:
    class Doubling(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(doubled(x))

    model = Doubling()
    torch.testing.assert_close(open_gates(rz.convert(model, X))(X), X + 0.5 * model.fc(2 * norm(X)))


class Method(nn.Module):
    """Its own method normalizes for a branch and, perhaps, for something else."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.fc, self.head, self.also = nn.Linear(16, 16), nn.Linear(16, 16), also

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(self.normed(x))
        return self.head(self.normed(x) if self.also else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("also", [False, True])
def test_a_norm_in_a_method_stays_if_it_also_runs_outside_a_branch(also: bool) -> None:
    model = Method(also=also)
    (site,) = rz.audit(model, X).plan.converted
    assert [one.action for one in site.norms] == ["keep" if also else "bypass"]
    converted = open_gates(rz.convert(model, X))
    stream = X + 0.5 * model.fc(F.layer_norm(X, (16,)) if also else X)
    torch.testing.assert_close(converted(X), model.head(F.layer_norm(stream, (16,)) if also else stream))


class UNet(nn.Module):
    """The sums of its second half add the stream to itself once, then to what lies far back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mixing() for _ in range(4)])
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        entry, skips = x, []
        for i, block in enumerate(self.blocks):
            if i >= 2:
                x = x + self.weights[i - 2] * skips.pop()
            x = block(x, entry)
            if i < 2:
                skips.append(x)
        return x


class Mixing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.1]))

    def forward(self, x: Tensor, entry: Tensor) -> Tensor:  # type: ignore[override]
        x = self.lambdas[0] * x + self.lambdas[1] * entry
        return x + self.fc(norm(x))


def test_blocks_inside_one_that_cannot_be_rewritten_are_blocks() -> None:
    model = UNet()
    plan = rz.audit(model, X).plan
    assert [site.path for site in plan.converted] == [f"blocks.{i}" for i in range(4)]
    assert {site.code for site in plan.sites if site.path == ""} == {"RZ902", "RZ911"}
    preserved = rz.convert(model, X, alpha_init="preserve", drop_norm="none")
    assert torch.equal(preserved(X), model(X))
    assert rz.validate(rz.convert(model, X), X).ok
