"""More forms of residual block that models of other packages showed, each in the smallest module that has it."""

from __future__ import annotations

import pytest
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


class Scored(nn.Module):
    """Attention that may add the scores of the layer before to its own, or mix that layer's values into its own."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.mixes = mixes

    def forward(self, x: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(x)
        scores, v = self.q(h) @ self.k(h).mT, self.v(h)
        if before is not None and self.mixes:
            v = before.lerp(v, self.q(h).sigmoid())
        elif before is not None:
            scores = scores + before
        return self.out(scores.softmax(-1) @ v), v if self.mixes else scores


class Residually(nn.Module):
    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scored(mixes) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = None
        for layer in self.layers:
            f, before = layer(x, before)
            x = x + f
        return x


@pytest.mark.parametrize("mixes", [False, True])
def test_what_one_layer_hands_the_next_beside_the_stream_is_no_skip(mixes: bool) -> None:
    model, inputs = Residually(mixes), torch.randn(2, 5, 4)
    sites = rz.audit(model, inputs).plan.sites
    assert [(site.verdict, site.text) for site in sites if site.code != "RZ904"] == [("converted", "x = x + f")]
    refused = [site for site in sites if site.code == "RZ904"]
    assert [site.path for site in refused] == ["layers.1", "layers.2"]
    assert all("only through the block at" in site.reason for site in refused)
    assert torch.equal(rz.convert(model, inputs)(inputs), inputs)


class Agreeing(nn.Module):
    """Routing by agreement: the logits are zero at first, and weigh values that have weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        values = torch.einsum("inm,bin->bim", self.weight, u)
        logits = u.new_zeros(u.shape[:2])
        for _ in range(2):
            mean = torch.einsum("bi,bim->bm", logits.softmax(1), values)
            logits = logits + torch.einsum("bm,bim->bi", mean, values)
        return logits.softmax(1)


def test_a_product_with_what_the_skip_itself_became_is_no_weight() -> None:
    sites = rz.audit(Agreeing(), torch.randn(2, 3, 4)).plan.sites
    assert {(site.verdict, site.code) for site in sites} == {("refused", "RZ907"), ("refused", "RZ902")}


class Spoiled(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        nn.init.constant_(self.fc.weight, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_nothing_has_initialized_are_named_as_the_cause(value: float) -> None:
    with pytest.raises(rz.ConversionError, match=r"the branch is not finite, .* \(are all weights initialized\?\)"):
        rz.convert(Spoiled(value), torch.ones(2, 4))


class Overflowing(nn.Module):
    """A branch that is not finite any more when the signs of its weights change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.fc.weight, -2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        return x + torch.exp(h + 12 * h.relu())


def test_a_branch_that_overflows_with_other_weights_is_no_leak() -> None:
    model, inputs = Overflowing(), torch.ones(2, 4)
    check = rz.validate(rz.convert(model, inputs), inputs)
    assert check.ok
    assert "not checked whether gates seal branches: with other weights the outputs are not finite" in check.notes


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def test_a_layers_parametrization_has_run_with_it() -> None:
    assert rz.audit(Normed(), torch.randn(2, 4, 3)).plan.notes == ()


class Reading(nn.Module):
    """A loop whose first pass adds to the stream, and whose second one spans the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer in self.layers:
            x = layer(x).relu()
            x = x + first
        return x


def test_a_loop_whose_passes_span_each_other_is_refused() -> None:
    model, inputs = Reading(), torch.randn(2, 4)
    (site, *others) = rz.audit(model, inputs).plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ911")
    assert [other.verdict for other in others] == ["long-skip"]
    with pytest.warns(rz.NoEffectWarning):
        assert torch.equal(rz.convert(model, inputs)(inputs), model(inputs))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.norm(x))


class Half(nn.Module):
    """An encoder, or a decoder: layers and a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_the_last_norms_of_two_stacks_of_one_layer_stay() -> None:
    model, inputs = nn.Sequential(Half(), Half()), torch.randn(2, 4)
    converted = rz.convert(model, inputs)
    assert {site.form for site in rz.audit(model, inputs).plan.converted} == {"identity skip, pre-norm"}
    assert torch.equal(converted(inputs), model[1].norm(model[0].norm(inputs)))


NAMED_AGAIN = """
from torch import nn

class Layer(nn.Module):
    def __init__(self, width, attention, other):
        super().__init__()
        self.attention = attention
        self.other = other
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x, source=None):
        z = self.norm1(x)
        x = x + self.attention(z)
        if source is not None:
            z = self.norm2(x)
            x = x + self.other(z, source)
        z = self.norm3(x)
        return x + self.fc(z)
"""


def test_a_variable_that_is_set_again_in_one_arm_and_read_in_none_is_no_reader() -> None:
    result = rz.convert_source(NAMED_AGAIN, file="layer.py")
    assert [site.form for site in result.report.plan.converted] == ["identity skip, pre-norm"] * 3
    assert "LayerNorm" not in result.text
    kept = NAMED_AGAIN.replace("self.fc(z)", "self.fc(x) * z.mean()").replace("        z = self.norm3(x)\n", "")
    assert rz.convert_source(kept, file="kept.py").text.count("LayerNorm") == 3


DENORMALIZED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, mix):
        mean = mix.mean(dim=-1, keepdim=True)
        x = self.net((mix - mean) / mix.std())
        return x * mix.std() + mean
"""
POOLED = """
from torch import nn

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        pooled = x.mean(dim=1)
        return pooled + self.fc(pooled)
"""


def test_a_mean_that_is_added_back_is_no_skip_in_a_file() -> None:
    report = rz.audit_source(DENORMALIZED, file="net.py")
    assert {site.verdict for site in report.plan.sites} == {"refused"}
    assert [site.code for site in report.plan.sites if site.text.startswith("return")] == ["RZ906"]
    assert len(rz.audit_source(POOLED, file="head.py").plan.converted) == 1
