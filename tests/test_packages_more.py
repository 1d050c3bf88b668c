"""More forms of residual block that models of other packages showed, each in the smallest module that has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import rezero_convert as rz


class FunctionalAttention(nn.Module):
    """Attention by torch's function, with projections of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.multi_head_attention_forward(
            x, x, x, x.shape[-1], self.heads, torch.empty(0), torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            None, None, False, 0.0, self.out.weight, self.out.bias, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0]  # fmt: skip


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = FunctionalAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm(x))


def test_the_function_of_multi_head_attention_has_weights() -> None:
    model, inputs = Attending(), torch.randn(5, 2, 8)
    (site,) = rz.audit(model, inputs).plan.sites
    assert (site.verdict, site.form) == ("converted", "identity skip, pre-norm")
    converted = rz.convert(model, inputs)
    assert [name for name, _ in rz.alphas(converted)] == ["alpha"]
    assert torch.equal(converted(inputs), inputs)


class Routed(nn.Module):
    """A block that tells, beside its output, how many rows went which way, counted in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.expert = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.router(x).softmax(-1)
        chosen = scores.argmax(-1)
        counts = x.new_tensor([len(chosen[chosen == n]) for n in range(2)])
        return x + self.expert(x) * scores.max(-1, keepdim=True).values, counts


def test_an_output_that_is_counted_in_python_is_no_leak() -> None:
    model, inputs = Routed(), torch.randn(16, 4)
    converted = rz.convert(model, inputs)
    output, counts = converted(inputs)
    assert torch.equal(output, inputs)
    assert torch.equal(counts, model(inputs)[1])


def test_the_output_beside_it_is_still_looked_at() -> None:
    converted = rz.convert(Routed(), torch.randn(16, 4))
    sealed = [check for check in rz.validate(converted, torch.randn(16, 4)).checks if check.name == "sealed"]
    assert [(check.ok, check.detail) for check in sealed] == [(True, "1 output")]
