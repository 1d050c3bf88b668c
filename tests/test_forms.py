"""What is a residual block, form by form: what the plan says, and that carrying the plan out gives just that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Linears, Net, W, images, only, plan, segment, vectors
from torch import Tensor, nn

import rezero_convert as rz
from rezero_convert.plan import Plan, Site


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))


def first(value: Any) -> Tensor:
    return first(value[0]) if isinstance(value, tuple) else value


def check(model: nn.Module, *inputs: Any, blocks: int = 1, **options: Any) -> Plan:
    """The plan of a model, after it was carried out and verified, and preserve mode compared bit by bit."""
    found = plan(model, *inputs, **options)
    said = [(site.verdict, site.code, segment(site), site.reason) for site in found.sites]
    assert sum(len(site.gates) for site in found.converted) == blocks, said
    converted = rz.convert(model, inputs, **options)
    assert len(list(rz.alphas(converted))) == blocks
    preserved = rz.convert(model, inputs, alpha_init="preserve", verify=False)
    for train in (False, True):
        results = []
        for each in (copy.deepcopy(model), copy.deepcopy(preserved)):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(first(each.train(train)(*[value.clone() for value in inputs])))
        assert torch.equal(*results)
    return found


def block(model: nn.Module, *inputs: Any, **options: Any) -> Site:
    """The one block of a model."""
    (site,) = check(model, *inputs, **options).converted
    return site


def norms(site: Site) -> dict[str, str]:
    return {norm.path or norm.type: norm.action for norm in site.norms}


def trained(model: nn.Module, *inputs: Any, **options: Any) -> nn.Module:
    """A converted model in eval mode whose alphas are not zero."""
    converted = rz.convert(model, inputs, **options).eval()
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    return converted


# Sums as they are written


class Sum(Linears):
    def f(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))


class Plain(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Reversed(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x


class Named(Sum):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.f(x)
        x = shortcut + x
        return x


class Augmented(Sum):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return y


class AugmentedSkip(Sum):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.f(x.clone())
        x += y
        return x


class TorchAdd(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x))


class TorchAddKeyword(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x))


class MethodAdd(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.f(x))


class MethodAddOfBranch(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).add(x)


class MethodAddInPlace(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).add_(x)


class OperatorAdd(Sum):
    def forward(self, x: Tensor) -> Tensor:
        import operator

        return operator.add(x, self.f(x))


class Conditional(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) if x.shape[0] else torch.zeros_like(x))


class Parenthesized(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return (
            x  # the skip
            + self.f(
                x,
            )
        )


class Minus(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class AugmentedMinus(Sum):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x -= self.f(x.clone())
        return x


def _plus(m: Any, x: Tensor) -> Tensor:
    return x + m.alpha * torch.relu(m.a(x))


def _minus(m: Any, x: Tensor) -> Tensor:
    return x - m.alpha * torch.relu(m.a(x))


WRITTEN: list[tuple[type[nn.Module], Callable[[Any, Tensor], Tensor]]] = [
    *((cls, _plus) for cls in (
        Plain, Reversed, Named, Augmented, AugmentedSkip, TorchAdd, TorchAddKeyword, MethodAdd, MethodAddOfBranch,
        MethodAddInPlace, OperatorAdd, Conditional, Parenthesized,
    )),
    (Minus, _minus),
    (AugmentedMinus, _minus),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), WRITTEN, ids=[cls.__name__ for cls, _ in WRITTEN])
def test_an_add_is_found_however_it_is_written(make: Any, expected: Any) -> None:
    x = vectors()
    site = block(make(), x)
    assert (site.verdict, site.code, site.skip_kind) == ("converted", "RZ101", "identity")
    assert (site.gates[0].alpha, site.gates[0].child, site.gates[0].shape) == ("alpha", "a", (1,))
    model = trained(make(), x)
    torch.testing.assert_close(model(x.clone()), expected(model, x))


class Skips(Linears):
    def __init__(self) -> None:
        super().__init__(drop=nn.Dropout(0.1), same=nn.Identity())


class SkipThroughDropout(Skips):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return self.drop(x) + y


class SkipReshaped(Skips):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return (x.flatten(0, 1) + y.flatten(0, 1)).view_as(x)


class SkipTransposed(Skips):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        x = x.transpose(1, 2)
        return x + y.mT


class SkipContiguous(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous() + self.b(torch.relu(self.a(x)))


class SkipIdentity(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.same(x) + self.b(torch.relu(self.a(x)))


class BranchReshaped(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


class BranchAutocast(Skips):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(torch.relu(self.a(x)))
        return x + y.to(x.dtype)


class BranchCheckpointed(Skips):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return x + checkpoint(self.a, x, use_reentrant=False).relu()


@pytest.mark.parametrize(
    "make",
    [
        SkipThroughDropout, SkipReshaped, SkipTransposed, SkipContiguous, SkipIdentity, BranchReshaped, BranchAutocast,
        BranchCheckpointed,
    ],
)  # fmt: skip
def test_a_skip_or_branch_through_what_moves_values_is_one(make: Any) -> None:
    x = vectors()
    assert block(make(), x).skip_kind == "identity"
    converted = rz.convert(make(), x).eval()
    assert torch.equal(converted(x).flatten().sort().values, x.flatten().sort().values)


class TupleOutput(Linears):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + torch.relu(self.a(x)), None


class BranchOfTuple(Net):
    def __init__(self) -> None:
        super().__init__(inner=TwoOutputs(a=nn.Linear(W, W)))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.inner(x)
        return x + y


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return torch.relu(y), y


class Attends(Net):
    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W), attn=nn.MultiheadAttention(W, 2, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]


class AttendsUnpacked(Attends):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _weights = self.attn(y, y, y)
        return x + y


def test_a_block_returns_a_tuple() -> None:
    assert block(TupleOutput(), vectors()).gates[0].alpha == "alpha"


def test_a_branch_is_one_element_of_a_tuple() -> None:
    assert block(BranchOfTuple(), vectors()).gates[0].child == "inner"


@pytest.mark.parametrize("make", [Attends, AttendsUnpacked])
def test_multi_head_attention_is_a_branch(make: Any) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    site = block(make(), vectors())
    torch.backends.mha.set_fastpath_enabled(True)
    assert site.gates[0].child == "attn"
    assert norms(site) == {"norm": "bypass"}


# Sums of several branches


class Parallel(Net):
    """GPT-J: one norm for both."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W), attn=mlp(), mlp=mlp())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.attn(y) + self.mlp(y) + x


class ParallelTwoNorms(Parallel):
    """NeoX: each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x)) + self.mlp(self.norm2(x))


class ParallelStatements(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        a = self.attn(y)
        m = self.mlp(y)
        m = m + a
        m = m + x
        return m


@pytest.mark.parametrize("make", [Parallel, ParallelTwoNorms, ParallelStatements])
def test_parallel_branches_are_one_sum_with_a_gate_each(make: Any) -> None:
    x = vectors()
    (site,) = check(make(), x, blocks=2).converted
    assert {gate.alpha for gate in site.gates} == {"alpha_attn", "alpha_mlp"}
    assert set(norms(site).values()) == {"bypass"}
    assert "2 parallel branches" in site.form
    model = trained(make(), x)
    torch.testing.assert_close(model(x), x + model.alpha_attn * model.attn(x) + model.alpha_mlp * model.mlp(x))


class Decoder(Net):
    """Self-attention, cross-attention and a network."""

    def __init__(self) -> None:
        super().__init__(own=mlp(), cross=nn.MultiheadAttention(W, 2, batch_first=True), mlp=mlp())
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(W) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(self.norm1(x))
        x = x + self.cross(self.norm2(x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm3(x))


def test_a_decoder_layer_has_three_blocks() -> None:
    sites = check(Decoder(), vectors(), vectors(), blocks=3).converted
    assert [site.gates[0].alpha for site in sites] == ["alpha_own", "alpha_cross", "alpha_mlp"]
    assert [norms(site) for site in sites] == [{"norm1": "bypass"}, {"norm2": "bypass"}, {"norm3": "bypass"}]


class SelfOutput(Net):
    """BERT: skip and branch meet in another module's arguments."""

    def __init__(self) -> None:
        super().__init__(dense=nn.Linear(W, W), norm=nn.LayerNorm(W), drop=nn.Dropout(0.1))

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return self.norm(self.drop(self.dense(hidden)) + skip)


class BertLayer(Net):
    def __init__(self) -> None:
        super().__init__(attn=mlp(), output=SelfOutput(), up=nn.Linear(W, W), output2=SelfOutput())

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.attn(x), x)
        return self.output2(torch.relu(self.up(x)), x)


def test_skip_and_branch_meet_in_another_module() -> None:
    x = vectors()
    sites = check(BertLayer(), x, blocks=2).converted
    assert [site.path for site in sites] == ["output", "output2"]
    assert [norms(site) for site in sites] == [{"output.norm": "bypass"}, {"output2.norm": "bypass"}]
    model = trained(BertLayer(), x)
    y = x + model.output.alpha * model.output.dense(model.attn(x))
    expected = y + model.output2.alpha * model.output2.dense(torch.relu(model.up(y)))
    torch.testing.assert_close(model(x), expected)


class Latents(Net):
    """Perceiver, DETR: the stream begins at a parameter."""

    def __init__(self) -> None:
        super().__init__(
            latents=nn.Parameter(torch.randn(3, W)), cross=nn.MultiheadAttention(W, 2, batch_first=True), mlp=mlp()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.latents.expand(x.shape[0], -1, -1)
        y = y + self.cross(y, x, x, need_weights=False)[0]
        return y + self.mlp(y)


def test_a_stream_may_begin_at_a_parameter() -> None:
    sites = check(Latents(), vectors(), blocks=2).converted
    assert [site.gates[0].alpha for site in sites] == ["alpha_cross", "alpha_mlp"]


# Norms


class OddRms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(W))

    def forward(self, v: Tensor) -> Tensor:
        return self.g * v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)


class OddCentred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(W)), nn.Parameter(torch.zeros(W))

    def forward(self, v: Tensor) -> Tensor:
        u = v.mean(-1, keepdim=True)
        s = (v - u).pow(2).mean(-1, keepdim=True)
        return (v - u) / torch.sqrt(s + 1e-6) * self.scale + self.shift


class OddUpcast(OddRms):
    """Llama's."""

    def forward(self, v: Tensor) -> Tensor:
        kind = v.dtype
        v = v.to(torch.float32)
        v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.g * v.to(kind)


class PreNorm(Net):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(thing=norm, mlp=mlp())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.thing(x))


LAYER_NORMS = [
    lambda: nn.LayerNorm(W), lambda: nn.LayerNorm(W, elementwise_affine=False), lambda: nn.RMSNorm(W), OddRms,
    OddCentred, OddUpcast,
]  # fmt: skip
NORM_IDS = ["LayerNorm", "LayerNorm without weights", "RMSNorm", "hand-written RMS", "hand-written", "Llama's RMS"]


@pytest.mark.parametrize("norm", LAYER_NORMS, ids=NORM_IDS)
def test_a_pre_norm_goes(norm: Any) -> None:
    x = vectors()
    site = block(PreNorm(norm()), x)
    assert "pre-norm" in site.form
    assert [(n.path, n.kind, n.position, n.action) for n in site.norms] == [("thing", "layer", "pre", "bypass")]
    model = trained(PreNorm(norm()), x)
    assert not any(name.startswith("thing") for name in model.state_dict())
    torch.testing.assert_close(model(x), x + model.alpha * model.mlp(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.thing(x + self.mlp(x))


class EndNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.thing(self.mlp(x))


@pytest.mark.parametrize(("make", "position"), [(PostNorm, "post"), (EndNorm, "end")])
@pytest.mark.parametrize("norm", LAYER_NORMS, ids=NORM_IDS)
def test_a_norm_after_the_block_or_at_its_end_goes(norm: Any, make: Any, position: str) -> None:
    x = vectors()
    site = block(make(norm()), x)
    assert [(n.path, n.kind, n.position, n.action) for n in site.norms] == [("thing", "layer", position, "bypass")]
    model = trained(make(norm()), x)
    torch.testing.assert_close(model(x), x + model.alpha * model.mlp(x))


class FunctionalNorm(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.a(F.layer_norm(x, (W,))))


class FunctionalNormOfParameters(Linears):
    def __init__(self) -> None:
        super().__init__(scale=nn.Parameter(torch.ones(W)))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.a(F.layer_norm(x, (W,), self.scale)))


def test_a_functional_norm_without_weights_goes() -> None:
    x = vectors()
    assert norms(block(FunctionalNorm(), x)) == {"layer_norm": "bypass"}
    model = trained(FunctionalNorm(), x)
    torch.testing.assert_close(model(x), x + model.alpha * torch.relu(model.a(x)))


def test_a_functional_norm_with_weights_stays_and_says_so() -> None:
    site = block(FunctionalNormOfParameters(), vectors())
    assert norms(site) == {"layer_norm": "keep"}
    assert "parameters" in site.norms[0].reason


class Sandwich(Net):
    def __init__(self) -> None:
        super().__init__(before=nn.LayerNorm(W), mlp=mlp(), behind=nn.LayerNorm(W))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.behind(self.mlp(self.before(x)))


def test_both_norms_of_a_sandwich_go() -> None:
    x = vectors()
    site = block(Sandwich(), x)
    assert {n.path: (n.position, n.action) for n in site.norms} == {
        "before": ("pre", "bypass"), "behind": ("end", "bypass"),
    }  # fmt: skip
    model = trained(Sandwich(), x)
    torch.testing.assert_close(model(x), x + model.alpha * model.mlp(x))


class QueryNorm(Net):
    def __init__(self) -> None:
        super().__init__(
            norm=nn.LayerNorm(W), q=nn.Linear(W, W), k=nn.Linear(W, W), v=nn.Linear(W, W), out=nn.Linear(W, W),
            q_norm=nn.LayerNorm(W), k_norm=nn.RMSNorm(W),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k = self.q_norm(self.q(y)), self.k_norm(self.k(y))
        return x + self.out(F.scaled_dot_product_attention(q, k, self.v(y)))


def test_query_and_key_norms_stay() -> None:
    site = block(QueryNorm(), vectors())
    assert norms(site) == {"norm": "bypass"}
    assert {"q_norm.weight", "k_norm.weight"} <= set(rz.convert(QueryNorm(), vectors()).state_dict())


class Stream(Net):
    def __init__(self, depth: int) -> None:
        super().__init__(
            stem=nn.Linear(W, W), stem_norm=nn.LayerNorm(W), norm=nn.LayerNorm(W), head=nn.Linear(W, 2),
            blocks=nn.Sequential(*(PreNorm(nn.LayerNorm(W)) for _ in range(depth))),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        return self.head(self.norm(self.blocks(x)))


@pytest.mark.parametrize("depth", [1, 3])
def test_stem_and_head_norms_stay(depth: int) -> None:
    found = check(Stream(depth), vectors(), blocks=depth)
    gone = {norm.path for site in found.converted for norm in site.norms if norm.action != "keep"}
    assert gone == {f"blocks.{i}.thing" for i in range(depth)}
    kept = rz.convert(Stream(depth), vectors())
    assert isinstance(kept.norm, nn.LayerNorm)
    assert isinstance(kept.stem_norm, nn.LayerNorm)


class Bare(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(x))


def test_a_norm_behind_blocks_without_norms_is_that_of_the_head() -> None:
    model = nn.Sequential(Bare(fc=nn.Linear(W, W)), Bare(fc=nn.Linear(W, W)), nn.LayerNorm(W))
    assert [site.norms for site in rz.audit(model, vectors()).plan.converted] == [(), ()]
    assert isinstance(rz.convert(model, vectors())[2], nn.LayerNorm)


class Walked(Net):
    """vit-pytorch: adds and head norm in one module."""

    def __init__(self, depth: int) -> None:
        super().__init__(norm=nn.LayerNorm(W), layers=nn.ModuleList())
        for _ in range(depth):
            layer = [nn.Sequential(nn.LayerNorm(W), mlp()), nn.Sequential(nn.LayerNorm(W), mlp())]
            self.layers.append(nn.ModuleList(layer))

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class TestLoops:
    @pytest.mark.parametrize("depth", [1, 3])
    def test_the_head_norm_in_the_owner_of_the_adds_stays(self, depth: int) -> None:
        found = plan(Walked(depth), vectors())
        gone = {norm.path for site in found.converted for norm in site.norms if norm.action != "keep"}
        assert "norm" not in gone
        assert {site.verdict for site in found.sites} == {"converted"}
        assert isinstance(rz.convert(Walked(depth), vectors()).norm, nn.LayerNorm)


class ReadOutside(Net):
    """The skip is not the normalized value, but something else reads that."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W), mlp=mlp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return x + self.mlp(y), y


class AttributeRead(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.thing.weight.dtype)
        return x + self.mlp(self.thing(x))


class CalledTwice(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.thing(x + self.mlp(self.thing(x))))


class SkipFromNorm(PreNorm):
    """A norm before skip and branch belongs to neither."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.thing(x)
        return x + self.mlp(x)


@pytest.mark.parametrize(("make", "path", "word"), [(ReadOutside, "norm", "read outside")])
def test_a_norm_read_outside_the_branch_stays(make: Any, path: str, word: str) -> None:
    site = block(make(), vectors())
    assert norms(site) == {path: "keep"}
    assert word in site.norms[0].reason


def test_a_norm_whose_attribute_is_read_elsewhere_stays_and_says_where() -> None:
    site = block(AttributeRead(nn.LayerNorm(W)), vectors())
    assert norms(site) == {"thing": "keep"}
    assert "attributes are read at" in site.norms[0].reason
    assert "test_forms.py:" in site.norms[0].reason


class AsksBase(PreNorm):
    """Overrides, and calls what it overrides."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 5:
            return super().forward(x)
        return x + self.thing(self.mlp(x))


def test_a_norm_that_the_overridden_method_calls_stays_only_if_that_is_called() -> None:
    kept = block(AsksBase(nn.LayerNorm(W)), vectors())
    assert norms(kept) == {"thing": "keep"}
    assert "also called at" in kept.norms[0].reason
    assert norms(block(EndNorm(nn.LayerNorm(W)), vectors())) == {"thing": "bypass"}


def test_a_norm_before_skip_and_branch_is_not_of_the_block() -> None:
    assert block(SkipFromNorm(nn.LayerNorm(W)), vectors()).norms == ()


class Sequence(Net):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(branch=nn.Sequential(norm, nn.Linear(W, W), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_norm_in_a_sequential_leaves_an_identity_in_its_slot() -> None:
    x = vectors()
    assert norms(block(Sequence(nn.LayerNorm(W)), x)) == {"branch.0": "slot"}
    model = trained(Sequence(nn.LayerNorm(W)), x)
    assert isinstance(model.branch[0], nn.Identity)
    assert isinstance(model.branch[1], nn.Linear)
    torch.testing.assert_close(model(x), x + model.alpha * torch.relu(model.branch[1](x)))


class ConvNorm(Net):
    def __init__(self, norm: nn.Module, bias: bool = False) -> None:
        super().__init__(conv=nn.Conv2d(W, W, 3, padding=1, bias=bias), norm=norm, last=nn.Conv2d(W, W, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.norm(self.conv(x))))


KINDS = [
    ("batch", lambda: nn.BatchNorm2d(W)), ("group", lambda: nn.GroupNorm(2, W)),
    ("instance", lambda: nn.InstanceNorm2d(W, affine=True)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "norm"), KINDS, ids=[kind for kind, _ in KINDS])
def test_other_kinds_of_norm_stay_unless_asked_for(kind: str, norm: Any) -> None:
    stays = block(ConvNorm(norm()), images())
    assert norms(stays) == {"norm": "keep"}
    assert f"{kind}-type norms stay" in stays.norms[0].reason
    for asked in (kind, "all"):
        site = block(ConvNorm(norm()), images(), drop_norm=asked)
        assert norms(site) == {"norm": "bypass"}
        assert site.norms[0].bias == "conv"
    others = ",".join(other for other in ("layer", "batch", "group", "instance") if other != kind)
    assert norms(block(ConvNorm(norm()), images(), drop_norm=others)) == {"norm": "keep"}


def test_no_norm_goes_when_none_is_asked_for() -> None:
    site = block(PreNorm(nn.LayerNorm(W)), vectors(), drop_norm="none")
    assert norms(site) == {"thing": "keep"}


@pytest.mark.parametrize(("bias", "given"), [(False, "conv"), (True, "")])
def test_a_layer_without_bias_gets_the_one_its_norm_had(bias: bool, given: str) -> None:
    x = images()
    model = ConvNorm(nn.BatchNorm2d(W), bias)
    site = block(model, x, drop_norm="batch")
    assert site.norms[0].bias == given
    converted = rz.convert(model, x, drop_norm="batch")
    assert converted.conv.bias is not None
    if given:
        assert not converted.conv.bias.any()


class EndNormOfLinear(Net):
    def __init__(self) -> None:
        super().__init__(lin=nn.Linear(W, W, bias=False), norm=nn.LayerNorm(W))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.lin(torch.relu(x)))


def test_so_it_does_at_the_end_of_the_branch() -> None:
    site = block(EndNormOfLinear(), vectors())
    assert [(norm.position, norm.bias) for norm in site.norms] == [("end", "lin")]
    assert rz.convert(EndNormOfLinear(), vectors()).lin.bias is not None


def test_a_norm_without_bias_leaves_none() -> None:
    site = block(ConvNorm(nn.BatchNorm2d(W, affine=False)), images(), drop_norm="batch")
    assert site.norms[0].bias == ""


class FusedChain(Net):
    def __init__(self) -> None:
        from timm.layers import BatchNormAct2d

        super().__init__(conv=nn.Conv2d(W, W, 3, padding=1, bias=False), bn=BatchNormAct2d(W), last=nn.Conv2d(W, W, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.bn(self.conv(x)))


def test_a_fused_norm_loses_the_norm_and_keeps_the_activation() -> None:
    x = images()
    assert norms(block(FusedChain(), x)) == {"bn": "keep"}
    site = block(FusedChain(), x, drop_norm="batch")
    assert norms(site) == {"bn": "unfuse"}
    model = trained(FusedChain(), x, drop_norm="batch")
    expected = x + model.alpha * model.last(torch.relu(model.conv(x)))
    torch.testing.assert_close(model(x), expected)


# Activation after the add


class Act(Net):
    def __init__(self) -> None:
        super().__init__(conv=nn.Linear(W, W), act=nn.ReLU(), act_inplace=nn.ReLU(inplace=True), gelu=nn.GELU())


class ActModule(Act):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv(x))


class ActModuleStatement(Act):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        out = self.act_inplace(out)
        return out


class ActFunctional(Act):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class ActFunctionalInPlace(Act):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x), inplace=True)


class ActKeyword(Act):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(input=x + self.conv(x))


class ActMethod(Act):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


class ActMethodInPlace(Act):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv(x)
        return out.relu_()


class ActTorch(Act):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv(x)
        return torch.relu_(out)


@pytest.mark.parametrize(
    "make",
    [
        ActModule, ActModuleStatement, ActFunctional, ActFunctionalInPlace, ActKeyword, ActMethod, ActMethodInPlace,
        ActTorch,
    ],
)  # fmt: skip
def test_the_activation_of_the_sum_moves_into_the_branch(make: Any) -> None:
    x = vectors()
    site = block(make(), x)
    assert site.activation is not None
    assert site.activation.action == "move"
    assert "activation after the add" in site.form
    model = trained(make(), x)
    torch.testing.assert_close(model(x.clone()), x + model.alpha * torch.relu(model.conv(x)))


class Swish(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return v * torch.sigmoid(v)


class ActWritten(Act):
    def __init__(self) -> None:
        super().__init__()
        self.thing = Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.thing(x + self.conv(x))


def test_a_hand_written_activation_module_moves_too() -> None:
    x = vectors()
    site = block(ActWritten(), x)
    assert site.activation is not None
    assert (site.activation.type, site.activation.action) == ("Swish", "move")
    model = trained(ActWritten(), x)
    torch.testing.assert_close(model(x), x + model.alpha * F.silu(model.conv(x)))


@pytest.mark.parametrize("make", [ActModule, ActFunctional, ActMethod])
def test_the_activation_stays_by_choice(make: Any) -> None:
    x = vectors()
    site = plan(make(), x, activation="keep").converted[0]
    assert site.activation is not None
    assert site.activation.action == "keep"
    model = trained(make(), x, activation="keep")
    torch.testing.assert_close(model(x), torch.relu(x + model.alpha * model.conv(x)))


class SumReadElsewhere(Act):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.conv(x)
        return self.act(out) * out.mean()


class SumReturned(Act):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = x + self.conv(x)
        return self.act(out), out


class SumSquashed(Act):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x + self.conv(x))


class SumSoftmax(Act):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).softmax(dim=-1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (SumReadElsewhere, "read elsewhere"), (SumReturned, "read elsewhere"), (SumSquashed, "sigmoid"),
        (SumSoftmax, "softmax"),
    ],
)  # fmt: skip
def test_an_activation_that_is_not_the_branchs_stays(make: Any, word: str) -> None:
    site = block(make(), vectors())
    assert site.activation is not None
    assert site.activation.action == "keep"
    assert word in site.activation.reason


class PreActivation(Net):
    def __init__(self) -> None:
        super().__init__(bn=nn.BatchNorm2d(W), act=nn.ReLU(), conv=nn.Conv2d(W, W, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.bn(x)))


class ActFirst(Net):
    """All of a block reads the activated value; the block's own input is used by nothing else."""

    def __init__(self) -> None:
        super().__init__(act=nn.ReLU(), conv=nn.Conv2d(W, W, 3, padding=1), second=nn.Conv2d(W, W, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(x)
        return out + self.second(self.act(self.conv(out)))


@pytest.mark.parametrize("make", [PreActivation, ActFirst])
def test_the_activation_of_the_next_block_is_not_moved(make: Any) -> None:
    found = check(nn.Sequential(make(), make()), images(), blocks=2)
    assert [site.activation for site in found.converted] == [None, None]


# Shortcuts


class Projected(Net):
    def __init__(self) -> None:
        super().__init__(
            conv1=nn.Conv2d(W, W, 3, 2, 1), conv2=nn.Conv2d(W, 2 * W, 3, 1, 1), act=nn.ReLU(),
            short=nn.Sequential(nn.Conv2d(W, 2 * W, 1, 2, bias=False), nn.BatchNorm2d(2 * W)), pool=nn.AvgPool2d(2),
        )  # fmt: skip

    def f(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


class ShortcutConv(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.f(x)


class ShortcutConvAct(Projected):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += self.short(x)
        return self.act(out)


class ShortcutPoolZeros(Projected):
    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x)
        return torch.cat((pooled, torch.zeros_like(pooled)), dim=1) + self.f(x)


class ShortcutPoolPad(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, W)) + self.f(x)


class ShortcutStride(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.f(x)


class ShortcutChosen(Projected):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.f(x)
        if self.short is not None:
            identity = self.short(x)
        return identity + out


@pytest.mark.parametrize(
    "make", [ShortcutConv, ShortcutConvAct, ShortcutPoolZeros, ShortcutPoolPad, ShortcutStride, ShortcutChosen]
)
def test_a_projection_shortcut_is_a_skip(make: Any) -> None:
    x = images()
    site = block(make(), x)
    assert (site.code, site.skip_kind) == ("RZ102", "projection")
    assert "projection shortcut" in site.form
    assert site.gates[0].child == "conv2"
    assert norms(site) == {}
    model = rz.convert(make(), x).eval()
    nn.init.normal_(model.conv2.weight)
    assert model(x).shape == (2, 2 * W, 4, 4)
    before = model(x)
    nn.init.normal_(model.conv1.weight)
    assert torch.equal(model(x), before)


class ClassAttention(Net):
    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W), attn=nn.MultiheadAttention(W, 2, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x[:, :1] + self.attn(y[:, :1], y, y, need_weights=False)[0]


def test_a_skip_through_a_slice_is_one() -> None:
    site = block(ClassAttention(), vectors())
    assert (site.code, site.skip_kind) == ("RZ103", "slice")
    assert norms(site) == {"norm": "bypass"}


# Constants and gates that were there


class ConstantBranch(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.b(torch.relu(self.a(x)))


class ConstantSkip(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.b(torch.relu(self.a(x)))


def test_a_constant_on_the_branch_is_kept() -> None:
    x = vectors()
    assert block(ConstantBranch(), x).skip_kind == "identity"
    model = trained(ConstantBranch(), x)
    torch.testing.assert_close(model(x), x + model.alpha * (0.1 * model.b(torch.relu(model.a(x)))))


def test_a_constant_on_the_skip_is_kept() -> None:
    x = vectors()
    assert block(ConstantSkip(), x).skip_kind == "identity"
    model = trained(ConstantSkip(), x)
    torch.testing.assert_close(model(x), 0.5 * x + model.alpha * model.b(torch.relu(model.a(x))))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((W,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ScaledByModule(Linears):
    def __init__(self) -> None:
        super().__init__(ls=LayerScale(), drop=nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.ls(self.b(torch.relu(self.a(x)))))


class ScaledByParameter(Linears):
    def __init__(self) -> None:
        super().__init__(gamma=nn.Parameter(torch.full((W,), 1e-5)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(("make", "name"), [(ScaledByModule, "ls.gamma"), (ScaledByParameter, "gamma")])
def test_a_layer_scale_becomes_the_gate(make: Any, name: str) -> None:
    x = vectors()
    site = block(make(), x)
    (gate,) = site.gates
    assert (gate.existing, gate.alpha, gate.shape, gate.at) == (True, name, (W,), None)
    assert "existing gate" in site.form
    converted = rz.convert(make(), x)
    assert [key for key, _ in rz.alphas(converted)] == [name]
    assert set(converted.state_dict()) == set(make().state_dict())
    assert not converted.get_parameter(name).any()
    assert torch.equal(rz.convert(make(), x, alpha_init="preserve").get_parameter(name), make().get_parameter(name))


# Zero-initialised layers


class LastNorm(Net):
    def __init__(self) -> None:
        super().__init__(conv=nn.Conv2d(W, W, 3, padding=1), bn=nn.BatchNorm2d(W))
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


class LastLinear(Linears):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Gained(nn.Conv2d):
    """NF-ResNet's convolution: the weight is made from a gain."""

    def __init__(self) -> None:
        super().__init__(W, W, 1)
        self.gain = nn.Parameter(torch.zeros(W, 1, 1, 1))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias)


class LastGain(Net):
    def __init__(self) -> None:
        super().__init__(first=nn.Conv2d(W, W, 1), last=Gained())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.first(x)))


class NormAndActivation(nn.BatchNorm2d):
    """timm's `BatchNormAct2d`: a norm that applies an activation, which is zero at zero."""

    def __init__(self) -> None:
        super().__init__(W)
        self.act = nn.SiLU()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class LastFused(Net):
    def __init__(self) -> None:
        super().__init__(conv=nn.Conv2d(W, W, 1), bn=NormAndActivation())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x))


class ZeroFactor(Net):
    """A gated linear unit whose gate is zero, as xLSTM's is in transformers: no gradient would ever pass it."""

    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(W, W, bias=False), up=nn.Linear(W, W), down=nn.Linear(W, W, bias=False))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    ("make", "x", "parameter", "how"),
    [
        (ZeroFactor, vectors(), "gate.weight", "reset"),
        (LastNorm, images(), "bn.weight", "ones"), (LastFused, images(), "bn.weight", "ones"),
        (LastLinear, vectors(), "b.weight", "reset"),
        (LastGain, images(), "last.gain", "ones"),
    ],
    ids=["gate of a linear unit", "norm weight", "norm with activation", "linear", "gain"],
)  # fmt: skip
def test_a_zero_initialised_last_layer_is_repaired(make: Any, x: Tensor, parameter: str, how: str) -> None:
    site = block(make(), x)
    assert [(repair.parameter, repair.how) for repair in site.repairs] == [(parameter, how)]
    assert "zero-initialised" in site.form
    assert rz.convert(make(), x).get_parameter(parameter).any()
    assert plan(make(), x, alpha_init="preserve").converted[0].repairs == ()


class ZeroProduct(Net):
    """A branch that ends in a product with a bare parameter, or a buffer, which is zero."""

    def __init__(self, forward: Any, weight: Tensor) -> None:
        super().__init__(a=nn.Linear(W, W), gate=nn.Linear(W, W))
        self.b, self.last = nn.Parameter(torch.zeros(W)), weight
        if not isinstance(weight, nn.Parameter):
            del self.last
            self.register_buffer("last", weight)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self, torch.relu(self.a(x)))


PRODUCTS: dict[str, Any] = {
    "matmul": lambda net, h: h @ net.last,
    "transposed": lambda net, h: h @ net.last.t(),
    "functional": lambda net, h: F.linear(h, net.last, net.b),
    "functional, transposed": lambda net, h: F.linear(h, net.last.t()),
    "einsum": lambda net, h: torch.einsum("...i,io->...o", h, net.last),
    "addmm": lambda net, h: torch.addmm(net.b, h, net.last),
    "bias behind": lambda net, h: h @ net.last + net.b,
    "gated": lambda net, h: torch.sigmoid(net.gate(h)) * (h @ net.last),
    "activated": lambda net, h: torch.relu(h @ net.last),
}


@pytest.mark.parametrize("forward", PRODUCTS.values(), ids=PRODUCTS)
def test_a_zero_parameter_that_the_branch_is_multiplied_by_is_repaired(forward: Any) -> None:
    model, x = nn.Sequential(Plain(), ZeroProduct(forward, nn.Parameter(torch.zeros(W, W)))), torch.randn(3, W)
    converted = rz.convert(model, x)
    assert len(list(rz.alphas(converted))) == 2
    last = converted.get_parameter("1.last")
    assert last.any()
    assert not torch.equal(last, torch.ones(W, W))
    assert not model.get_parameter("1.last").any()


@pytest.mark.parametrize("forward", PRODUCTS.values(), ids=PRODUCTS)
def test_a_zero_buffer_that_the_branch_is_multiplied_by_leaves_that_block_alone(forward: Any) -> None:
    model, x = nn.Sequential(Plain(), ZeroProduct(forward, torch.zeros(W, W))), torch.randn(3, W)
    left = next(site for site in plan(model, x).sites if site.path == "1")
    assert (left.verdict, left.code, left.gates) == ("refused", "RZ913", ())
    assert "1.last" in left.reason
    assert [name for name, _ in rz.alphas(rz.convert(model, x))] == ["0.alpha"]


def test_a_zero_part_of_a_weight_that_is_not_zero_is_left() -> None:
    delta = nn.Parameter(torch.zeros(W, W))
    for forward in (
        lambda net, h: F.linear(h, net.gate.weight + net.last),
        lambda net, h: h @ (net.gate.weight + net.last),
    ):
        (site,) = plan(ZeroProduct(forward, delta), torch.randn(3, W)).converted
        assert site.repairs == ()


def test_a_zero_layer_beside_the_branch_is_not_touched() -> None:
    model = nn.Sequential(Plain(), nn.Linear(W, W))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    (site,) = plan(model, vectors()).converted
    assert site.repairs == ()


class ZeroBeside(Net):
    """A path of the branch goes through a layer that is zero, another one does not."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(W, W), gate=nn.Linear(W, W), b=nn.Linear(W, W))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)) * torch.sigmoid(self.gate(x)))


def test_a_zero_layer_on_one_path_of_the_branch_is_not_touched() -> None:
    assert block(ZeroBeside(), vectors()).repairs == ()
    assert not rz.convert(ZeroBeside(), vectors()).gate.weight.any()


def test_a_zero_bias_or_a_zero_weight_with_a_bias_is_not_touched() -> None:
    model = LastLinear()
    nn.init.ones_(model.b.bias)
    (site,) = plan(model, vectors()).converted
    assert site.repairs == ()


# Names


class Taken(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.b(torch.relu(self.a(x)))


class TwoSameChild(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.a(x))
        return x + torch.tanh(self.a(x))


class TwoChildren(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.a(x))
        return x + torch.tanh(self.b(x))


class ArmsAssigned(nn.Module):
    """What can be read in the text, where an arm does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.b = nn.Linear(W, W)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = x + self.drop(self.b(torch.relu(self.a(x))))
        else:
            y = x + self.b(torch.relu(self.a(x)))
        return y


class Arms(nn.Module):
    """Exclusive arms on one child."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W)
        self.b = nn.Linear(W, W)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.drop(self.b(torch.relu(self.a(x))))
        return x + self.b(torch.relu(self.a(x)))


def test_a_name_that_is_taken_gets_a_prefix() -> None:
    assert block(Taken(), vectors()).gates[0].alpha == "rezero_alpha"
    assert rz.convert(Taken(), vectors()).alpha == 0.2


def test_adds_on_different_children_are_named_after_them() -> None:
    found = check(TwoChildren(), vectors(), blocks=2)
    assert [site.gates[0].alpha for site in found.converted] == ["alpha_a", "alpha_b"]


def test_adds_on_one_child_are_numbered() -> None:
    found = check(TwoSameChild(), vectors(), blocks=2)
    assert [site.gates[0].alpha for site in found.converted] == ["alpha_a", "alpha_a_2"]


def test_one_alpha_for_all_branches_of_a_module() -> None:
    found = plan(TwoChildren(), vectors(), share="layer")
    assert [site.gates[0].alpha for site in found.converted] == ["alpha", "alpha"]
    assert [name for name, _ in rz.alphas(rz.convert(TwoChildren(), vectors(), share="layer"))] == ["alpha"]


@pytest.mark.parametrize("make", [Arms, ArmsAssigned])
def test_exclusive_arms_on_one_child_share_the_alpha(make: Any) -> None:
    x = vectors()
    found = plan(make(), x)
    assert {site.verdict for site in found.sites} == {"converted", "not-executed"}
    assert {site.gates[0].alpha for site in found.edited} == {"alpha_b"}
    assert len(found.edited) == 2
    model = rz.convert(make(), x)
    assert [name for name, _ in rz.alphas(model)] == ["alpha_b"]
    assert torch.equal(model.train()(x), x)
    assert torch.equal(model.eval()(x), x)


class Shared(Net):
    def __init__(self) -> None:
        super().__init__(block=Plain())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_module_called_twice_is_one_site() -> None:
    site = block(Shared(), vectors())
    assert (site.path, site.calls) == ("block", 2)


def test_instances_of_one_class_are_sites_of_one_span() -> None:
    found = check(nn.Sequential(Plain(), Plain(), Plain()), vectors(), blocks=3)
    assert [site.path for site in found.converted] == ["0", "1", "2"]
    assert len({site.span for site in found.converted}) == 1
    assert {site.cls for site in found.converted} == {"Plain"}


def test_the_site_names_its_place() -> None:
    site = only(plan(Plain(), vectors()))
    assert site.place is not None
    assert site.place.qualname == "Plain.forward"
    assert site.text.strip() == "return x + self.f(x)"
    assert (site.skip, site.gates[0].branch) == ("x", "self.f(x)")


class Product(Net):
    """What is added to a branch is a product of the input."""

    def __init__(self, product: Any) -> None:
        super().__init__(a=nn.Linear(W, W), b=nn.Linear(W, 6))
        self.w, self.square = nn.Parameter(torch.randn(W, 6)), nn.Parameter(torch.randn(W, W))
        self.cube = nn.Parameter(torch.randn(W, W, 6))
        self.product = product

    def forward(self, x: Tensor, *y: Tensor) -> Tensor:
        return self.product(self, x, *y) + self.b(torch.relu(self.a(x)))


PROJECTIONS: dict[str, Any] = {
    "matmul": lambda net, x: x @ net.w,
    "einsum": lambda net, x: torch.einsum("bi,io->bo", x, net.w),
    "functional": lambda net, x: F.linear(x, net.w.t()),
    "tensordot": lambda net, x: torch.tensordot(x, net.w, 1),
    "convolution": lambda net, x: F.conv1d(x[:, :, None], net.w.t()[:, :, None])[:, :, 0],
}


@pytest.mark.parametrize("product", PROJECTIONS.values(), ids=PROJECTIONS)
def test_a_product_with_a_parameter_is_a_projection_shortcut(product: Any) -> None:
    model, x = Product(product), torch.randn(3, W)
    site = block(model, x)
    assert (site.code, site.skip_kind) == ("RZ102", "projection")
    assert torch.equal(rz.convert(model, x)(x), product(model, x))


@pytest.mark.parametrize(
    ("product", "inputs"),
    [
        (lambda net, x, y: x @ y, (torch.randn(3, W), torch.randn(W, 6))),
        (lambda net, x: torch.einsum("bi,bj,ijo->bo", x, x, net.cube), (torch.randn(3, W),)),
        (lambda net, x: (x @ net.square) @ (x.t() @ x)[:, :6], (torch.randn(3, W),)),
    ],
    ids=["input", "square", "scores"],
)
def test_a_product_with_anything_else_is_no_skip(product: Any, inputs: tuple[Tensor, ...]) -> None:
    model = Product(product)
    (site,) = [one for one in plan(model, *inputs).sites if one.path == ""]
    assert (site.verdict, site.code) == ("refused", "RZ901")


def test_a_product_of_the_same_shape_is_a_parallel_path() -> None:
    class Square(Product):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the one input
            return x @ self.square + torch.relu(self.a(x))

    (site,) = plan(Square(None), torch.randn(3, W)).sites
    assert (site.verdict, site.code) == ("refused", "RZ903")


class RelativeScores(Net):
    """The scores of an attention, with those of learned positions."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(W, W), k=nn.Linear(W, W))
        self.positions = nn.Parameter(torch.randn(W, 3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return q @ self.positions + q @ self.k(x).t()


def test_scores_of_positions_are_no_skip() -> None:
    (site,) = plan(RelativeScores(), torch.randn(3, W)).sites
    assert site.verdict == "refused"
