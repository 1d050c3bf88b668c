"""What is not a residual block, and why: every kind of add that looks like one, refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Linears, Net, W, images, only, plan, segment, vectors
from torch import Tensor, nn

import rezero_convert as rz

# Adds that look residual


class RotaryInputs(Linears):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.a(x)
        left, right = q.chunk(2, dim=-1)
        return q * cos + torch.cat((-right, left), dim=-1) * sin


class RotaryBuffers(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", torch.rand(3, W))
        self.register_buffer("sin", torch.rand(3, W))

    def forward(self, x: Tensor) -> Tensor:
        q = self.a(x)
        left, right = q.chunk(2, dim=-1)
        return q * self.cos + torch.cat((-right, left), dim=-1) * self.sin


class PolynomialGelu(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.tanh(x + 0.0447 * x**3)


class ScoresAndTable(Linears):
    def __init__(self) -> None:
        super().__init__(table=nn.Parameter(torch.randn(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(x).mT + self.table
        return scores.softmax(-1) @ x


class ScoresAndMask(Linears):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(x).mT + mask
        return scores.softmax(-1) @ x


class Disentangled(Linears):
    """Content-to-content plus content-to-position scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x), self.b(x)
        scores = q @ k.mT + q @ torch.tanh(k).mT
        return scores.softmax(-1) @ x


class TokenAndPosition(Net):
    def __init__(self) -> None:
        super().__init__(token=nn.Embedding(9, W), position=nn.Embedding(9, W), lin=nn.Linear(W, W))

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)))


class TokenAndType(Net):
    def __init__(self) -> None:
        super().__init__(token=nn.Embedding(9, W), kind=nn.Embedding(9, W), lin=nn.Linear(W, W))

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        return self.lin(self.token(ids) + self.kind(kinds))


class Experts(Net):
    def __init__(self) -> None:
        super().__init__(
            gate=nn.Linear(W, 2),
            first=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)),
            second=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)),
            shared=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        routed = weights[..., :1] * self.first(x) + weights[..., 1:] * self.second(x)
        return routed + self.shared(x)


class ExpertsAndLinear(Net):
    def __init__(self) -> None:
        super().__init__(routed=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)), shared=nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


class RepVgg(Net):
    def __init__(self) -> None:
        super().__init__(
            three=nn.Conv2d(W, W, 3, padding=1), one=nn.Conv2d(W, W, 1), norm=nn.BatchNorm2d(W), act=nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.three(x) + self.one(x)))


class RepVggStride(Net):
    def __init__(self) -> None:
        super().__init__(three=nn.Conv2d(W, W, 3, 2, padding=1), one=nn.Conv2d(W, W, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(x) + self.one(x)


class Pyramid(Net):
    def __init__(self) -> None:
        super().__init__(down=nn.Conv2d(W, W, 3, 2, padding=1), lateral=nn.Conv2d(W, W, 1), top=nn.Conv2d(W, W, 1))

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(torch.relu(self.down(x)))
        return self.lateral(x) + F.interpolate(top, scale_factor=2.0)


class Hourglass(Net):
    def __init__(self) -> None:
        super().__init__(
            down=nn.Sequential(nn.Conv2d(W, W, 3, 2, padding=1), nn.ReLU()), up=nn.ConvTranspose2d(W, W, 2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class UpsampleModule(Net):
    def __init__(self) -> None:
        super().__init__(
            down=nn.Sequential(nn.Conv2d(W, W, 3, 2, padding=1), nn.ReLU()), up=nn.Upsample(scale_factor=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class Distilled(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x[:, 0]) + self.b(x[:, 1])) / 2


class DistilledAfterMlp(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return (self.a(x[:, 0]) + self.b(torch.relu(x[:, 1]))) / 2


class Res2Net(Net):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), two=nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        spx = x.split(4, dim=-1)
        sp = torch.relu(self.one(spx[0]))
        sp = sp + spx[1]
        return torch.cat((sp, torch.relu(self.two(sp))), dim=-1)


class Snake(Linears):
    def __init__(self) -> None:
        super().__init__(freq=nn.Parameter(torch.ones(W)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + torch.sin(self.freq * x) ** 2 / self.freq


class StraightThrough(Linears):
    def forward(self, x: Tensor) -> Tensor:
        q = self.b(self.a(x)).round()
        return x + (q - x).detach()


class GlobalResponse(Net):
    def __init__(self) -> None:
        super().__init__(first=nn.Linear(W, W), gamma=nn.Parameter(torch.ones(W)), beta=nn.Parameter(torch.zeros(W)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        g = x.norm(p=2, dim=1, keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * n) + self.beta + x


class TwoPools(Net):
    """Channel attention of CBAM: one small network on two pools."""

    def __init__(self) -> None:
        super().__init__(mlp=nn.Sequential(nn.Conv2d(W, 2, 1), nn.ReLU(), nn.Conv2d(2, W, 1)))

    def forward(self, x: Tensor) -> Tensor:
        s = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        return x * s.sigmoid()


class BroadcastSkip(Linears):
    def forward(self, x: Tensor) -> Tensor:
        s = x.mean(dim=1, keepdim=True)
        return s + self.a(s).expand(-1, 3, -1)


class Doubled(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + x)


class AddsBuffer(Linears):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.randn(W))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + self.place)


class AddsParameter(Linears):
    def __init__(self) -> None:
        super().__init__(place=nn.Parameter(torch.randn(3, W)))

    def forward(self, x: Tensor) -> Tensor:
        return self.place + self.a(x)


class Highway(Linears):
    def forward(self, x: Tensor) -> Tensor:
        t = self.a(x).sigmoid()
        return t * torch.relu(self.b(x)) + (1 - t) * x


class GruUpdate(Linears):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = self.a(x).sigmoid()
        n = torch.tanh(self.b(x))
        return (1 - z) * n + z * h


class StateSpace(Linears):
    def __init__(self) -> None:
        super().__init__(decay=nn.Parameter(torch.rand(W)))

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        h = x.new_zeros(x.shape[0], W)
        kept = []
        for t in range(x.shape[1]):
            h = self.decay * h + torch.tanh(self.b(u[:, t]))
            kept.append(h)
        return torch.stack(kept, dim=1)


class Recurrent(Linears):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x[:, 0]))
        for t in range(1, x.shape[1]):
            h = torch.tanh(self.a(h) + self.b(x[:, t]))
        return h


class RecurrentInput(Linears):
    """Adds the input at each step, as an Elman network with an identity input matrix does."""

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(1, x.shape[1]):
            h = torch.tanh(self.a(h)) + x[:, t]
        return h


class RecurrentWhole(Linears):
    """Looks at all of the input at each step: only the last sum is what the module returns."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x.mean(dim=1)))
        for t in range(x.shape[1]):
            h = torch.relu(self.a(h)) * x.mean() + self.b(x[:, t])
        return h


class TwoStreams(Linears):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + torch.relu(self.b(y))


class MaskFromSkip(Linears):
    """The other operand depends on the skip through a mask alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.a(y).masked_fill(x > 0, 0.0)


class ShapeFromSkip(Linears):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.a(y).view_as(x)


class IndexFromSkip(Linears):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.gather(self.a(y), -1, x.argsort(dim=-1))


class Noise(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + 0.1 * torch.randn_like(x))


class CrossScale(Net):
    """HRNet's exchange between resolutions, and what it does with its own."""

    def __init__(self) -> None:
        super().__init__(high=nn.Conv2d(W, W, 3, padding=1), low=nn.Conv2d(W, W, 3, 2, padding=1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = torch.relu(self.high(x)), torch.relu(y)
        return x, y + torch.relu(self.low(x))


class CellsOfSearch(Linears):
    """NASNet-like: several states, summed in pairs and concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        one = F.avg_pool1d(x, 3, 1, 1) + torch.relu(self.a(x))
        two = F.avg_pool1d(one, 3, 1, 1) + torch.relu(self.b(x))
        return torch.cat((one, two), dim=-1)


class Coupling(Net):
    """RevNet: one half of the channels plus a function of the other."""

    def __init__(self) -> None:
        super().__init__(lin=nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return left + torch.relu(self.lin(right))


class PositionedLayer(Linears):
    """A layer of DETR: positions are added again in each, to the query only."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        q = x + place
        return self.norm(x + self.b(torch.relu(self.a(q))))


class Positioned(Net):
    def __init__(self) -> None:
        super().__init__(one=PositionedLayer(), two=PositionedLayer(), three=PositionedLayer(), end=nn.Linear(W, W))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        x = self.three(self.two(self.one(x, place), place), place)
        return self.end(x + place)


class PositionedFirst(Positioned):
    """The positions are older than the stream."""

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        place = self.end(place)
        return super().forward(torch.tanh(self.one.a(x)), place)


class PositionedQueries(Positioned):
    """The stream begins at zeros, the positions are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, W))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        query = self.query.expand(x.shape[0], -1, -1)
        return super().forward(torch.zeros_like(query), query) @ x.mT @ place


class PositionedStream(Net):
    """Positions added to the stream itself before each layer."""

    def __init__(self) -> None:
        super().__init__(one=Block(), two=Block())

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        x = self.one(x + place)
        x = self.two(x + place)
        return x + place


class TimedLayer(Linears):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(t))


class Timed(Net):
    def __init__(self) -> None:
        super().__init__(one=TimedLayer(), two=TimedLayer(), three=TimedLayer())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.three(self.two(self.one(x, t), t), t)


NO_WEIGHT = "no linear or convolution weight"


def one() -> tuple[Tensor, ...]:
    return (vectors(),)


def two() -> tuple[Tensor, ...]:
    return vectors(), vectors()


def image() -> tuple[Tensor, ...]:
    return (images(),)


def three() -> tuple[Tensor, ...]:
    return vectors(), vectors(), vectors()


def masked() -> tuple[Tensor, ...]:
    return vectors(), torch.zeros(3, 3)


def scales() -> tuple[Tensor, ...]:
    return images(), torch.randn(2, W, 4, 4)


def tokens() -> Tensor:
    return torch.randint(9, (2, 3))


NEGATIVES: list[tuple[str, type[nn.Module], Any, str, str, str]] = [
    ("rotary embedding with given angles", RotaryInputs, three, "q * cos", "RZ901", "independent"),
    ("rotary embedding with angles in buffers", RotaryBuffers, one, "q * self.cos", "RZ902", NO_WEIGHT),
    ("the polynomial inside an approximate GELU", PolynomialGelu, one, "0.0447", "RZ902", NO_WEIGHT),
    ("attention scores plus a table of biases", ScoresAndTable, one, "self.table", "RZ907", "table"),
    ("attention scores plus a mask", ScoresAndMask, masked, "+ mask", "RZ901", "independent"),
    ("two kinds of attention scores", Disentangled, one, "q @ k.mT +", "RZ901", "independent"),
    ("token plus position embeddings", TokenAndPosition, lambda: (tokens(),), "self.position", "RZ907", "position"),
    ("token plus type embeddings", TokenAndType, lambda: (tokens(), tokens()), "self.kind", "RZ901", "independent"),
    ("routed plus shared experts", Experts, one, "routed +", "RZ901", "independent"),
    ("a mixture of experts", Experts, one, "weights[", "RZ901", "independent"),
    ("routed experts plus a shared linear one", ExpertsAndLinear, one, "self.shared(x)", "RZ903", "shared"),
    ("parallel convolutions of a RepVGG block", RepVgg, image, "self.three", "RZ903", "three"),
    ("parallel strided convolutions", RepVggStride, image, "self.three", "RZ903", "three"),
    ("a feature pyramid's merge", Pyramid, image, "self.lateral", "RZ905", "upsampling"),
    ("a merge after a transposed convolution", Hourglass, image, "self.up", "RZ905", "upsampling"),
    ("a merge after an upsampling module", UpsampleModule, image, "self.up", "RZ905", "upsampling"),
    ("the mean of two distillation heads", Distilled, one, "self.a(x[:, 0])", "RZ903", "a"),
    ("Res2Net adds the next split", Res2Net, one, "sp + spx[1]", "RZ901", "other elements of split"),
    ("a reversible coupling", Coupling, one, "left +", "RZ901", "other elements of chunk"),
    ("the Snake activation", Snake, one, "torch.sin", "RZ902", NO_WEIGHT),
    ("a straight-through estimator", StraightThrough, one, "x +", "RZ914", "detach"),
    ("global response normalization", GlobalResponse, one, "+ x", "RZ902", NO_WEIGHT),
    ("one network on two pools", TwoPools, image, "self.mlp", "RZ901", "independent"),
    ("a skip that is broadcast", BroadcastSkip, one, "s +", "RZ906", "broadcast"),
    ("a tensor added to itself", Doubled, one, "x + x", "RZ910", "itself"),
    ("a buffer", AddsBuffer, one, "self.place", "RZ907", "place"),
    ("a parameter", AddsParameter, one, "self.place", "RZ907", "place"),
    ("a highway gate", Highway, one, "(1 - t) * x", "RZ901", "independent"),
    ("a GRU's update", GruUpdate, two, "z * h", "RZ901", "independent"),
    ("two streams of their own", TwoStreams, two, "self.a(x)", "RZ901", "independent"),
    ("dependence through a mask", MaskFromSkip, two, "x +", "RZ914", "mask"),
    ("dependence through a shape", ShapeFromSkip, two, "x +", "RZ914", "shape"),
    ("dependence through indices", IndexFromSkip, two, "x +", "RZ914", "indices"),
    ("noise", Noise, one, "randn_like", "RZ914", "shapes"),
    ("an exchange between scales", CrossScale, scales, "y +", "RZ901", "independent"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "text", "code", "word"), [case[1:] for case in NEGATIVES],
                         ids=[case[0] for case in NEGATIVES])  # fmt: skip
def test_is_no_residual_block(make: Any, inputs: Any, text: str, code: str, word: str) -> None:
    found = plan(make(), *inputs())
    assert not found.converted, [(segment(site), site.form) for site in found.converted]
    site = only(found, text)
    assert (site.verdict, site.code) == ("refused", code), site.reason
    assert word in site.reason
    assert "\n" not in site.reason
    assert not site.gates
    assert not site.norms


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (StateSpace, "self.decay * h"),
        (Recurrent, "self.a(h)"),
        (RecurrentInput, "x[:, t]"),
        (RecurrentWhole, "self.a(h)"),
    ],
    ids=[
        "a state space",
        "an Elman network",
        "a recurrence that adds its input",
        "a recurrence that looks at everything",
    ],
)
def test_steps_of_a_recurrence_are_refused(make: Any, text: str) -> None:
    found = plan(make(), vectors())
    sites = [site for site in found.sites if text in segment(site)]
    assert sites
    assert {site.verdict for site in sites} == {"refused"}, [(site.verdict, site.code, site.reason) for site in sites]


@pytest.mark.parametrize("make", [Positioned, PositionedFirst, PositionedQueries, PositionedStream])
def test_positions_added_again_in_each_layer_are_no_skip_and_hide_no_block(make: Any) -> None:
    found = plan(make(), vectors(), vectors())
    given = [site for site in found.sites if "x + place" in segment(site)]
    assert {site.verdict for site in given} == {"refused"}
    assert {site.code for site in given} <= {"RZ901", "RZ904", "RZ907", "RZ914"}
    layers = len([name for name, module in make().named_modules() if isinstance(module, (Block, PositionedLayer))])
    assert len(found.converted) == layers
    assert len(list(rz.alphas(rz.convert(make(), (vectors(), vectors()))))) == layers


def test_a_projection_of_another_input_is_no_shortcut() -> None:
    found = plan(Timed(), vectors(), vectors(2, 1))
    assert [site.verdict for site in found.sites] == ["refused"] * 3
    assert {site.code for site in found.sites} == {"RZ901", "RZ904"}


def test_distillation_heads_behind_a_network_are_refused() -> None:
    assert only(plan(DistilledAfterMlp(), vectors())).verdict == "refused"


def test_cells_found_by_search_are_refused() -> None:
    assert {site.verdict for site in plan(CellsOfSearch(), vectors()).sites} == {"refused"}


def test_a_model_without_blocks_says_so() -> None:
    model = Highway()
    with pytest.warns(rz.NoEffectWarning, match="no residual block among 1 add "):
        rz.convert(model, vectors())


# Adds that are only counted


class Scalars(Linears):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = 1 + self.a(x)
        y = y + 2
        y += 0.5
        ids = ids + 1
        return y[:, ids + ids]


def test_adds_of_numbers_and_integers_are_counted_not_listed() -> None:
    found = plan(Scalars(), vectors(), torch.zeros(2, dtype=torch.long))
    assert found.sites == ()
    assert found.scalars == 5


class Excited(Net):
    def __init__(self) -> None:
        super().__init__(squeeze=nn.Conv2d(W, 2, 1), excite=nn.Conv2d(2, W, 1))

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(s))))


def test_squeeze_and_excite_has_no_adds() -> None:
    assert plan(Excited(), images()).sites == ()


# Blocks around and inside blocks


class Block(Net):
    def __init__(self, width: int = W) -> None:
        super().__init__(lin=nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.lin(x))


class LongSkip(Net):
    def __init__(self) -> None:
        super().__init__(blocks=nn.Sequential(Block(), Block()), end=nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.blocks(x))


class LongSkipBare(Net):
    def __init__(self) -> None:
        super().__init__(blocks=nn.Sequential(Block(), Block()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


class Interior(Linears):
    """MViT: a residual sum on the query inside the attention branch."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        q = q + torch.relu(self.a(q))
        return x + self.b(torch.relu(q))


class PreNormInterior(Linears):
    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        n = n + torch.relu(self.a(n))
        return x + self.b(n)


class ConvBlock(Net):
    def __init__(self) -> None:
        super().__init__(conv=nn.Conv2d(W, W, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


class UNet(Net):
    def __init__(self) -> None:
        super().__init__(
            top=ConvBlock(),
            down=nn.Conv2d(W, W, 2, 2),
            low=ConvBlock(),
            up=nn.ConvTranspose2d(W, W, 2, 2),
            end=ConvBlock(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.top(x)
        y = self.up(self.low(self.down(x)))
        return self.end(x + y)


@pytest.mark.parametrize(("make", "text"), [(LongSkip, "self.end"), (LongSkipBare, "self.blocks")])
def test_a_skip_around_blocks_of_its_own_stream_is_a_long_skip(make: Any, text: str) -> None:
    found = plan(make(), vectors())
    site = only(found, text)
    assert (site.verdict, site.code) == ("long-skip", "RZ130")
    assert "spans the block at" in site.reason
    assert [site.path for site in found.converted] == ["blocks.0", "blocks.1"]
    assert len(list(rz.alphas(rz.convert(make(), vectors())))) == 2


def test_long_skips_are_gated_on_request() -> None:
    found = plan(LongSkip(), vectors(), long_skips=True)
    assert sorted(site.path for site in found.converted) == ["", "blocks.0", "blocks.1"]
    assert len(list(rz.alphas(rz.convert(LongSkip(), vectors(), long_skips=True)))) == 3


@pytest.mark.parametrize(("make", "text"), [(Interior, "q +"), (PreNormInterior, "n +")])
def test_a_residual_sum_on_another_stream_inside_a_branch_is_interior(make: Any, text: str) -> None:
    found = plan(make(), vectors())
    site = only(found, text)
    assert (site.verdict, site.code) == ("interior", "RZ131")
    assert "inside the branch of the block at" in site.reason
    assert [segment(site)[:3] for site in found.converted] == ["x +"]
    assert len(list(rz.alphas(rz.convert(make(), vectors())))) == 1


def test_a_unet_keeps_its_merge_and_loses_no_block() -> None:
    found = plan(UNet(), images())
    assert only(found, "x + y").code == "RZ905"
    assert sorted(site.path for site in found.converted) == ["end", "low", "top"]
    assert len(list(rz.alphas(rz.convert(UNet(), images())))) == 3


@pytest.mark.parametrize(
    ("make", "inputs", "text", "reason"),
    [
        (TwoStreams, two, "self.a(x)", "they come from different inputs"),
        (Experts, one, "routed +", "all are computed from the input x, none from another"),
        (Highway, one, "(1 - t) * x", "a mean of two values, with sigmoid(...) and its complement"),
    ],
)
def test_it_is_told_how_independent_operands_are_related(make: Any, inputs: Any, text: str, reason: str) -> None:
    assert only(plan(make(), *inputs()), text).reason == f"the operands are independent: {reason}"


# Lower resolutions within a block


class ConvStem(Net):
    """A block of its own module in a larger model."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(stem=nn.Conv2d(W, W, 1), block=block)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class UpsampledGate(Net):
    """The branch is scaled by a map of a lower resolution, as in GhostNet V2."""

    def __init__(self) -> None:
        super().__init__(lin=nn.Conv2d(W, W, 1), gate=nn.Conv2d(W, W, 3, 2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(x) * F.interpolate(torch.sigmoid(self.gate(x)), x.shape[-2:])


class Decoder(Net):
    """Merges what another module made of a lower resolution."""

    def __init__(self) -> None:
        super().__init__(up=nn.ConvTranspose2d(W, W, 2, 2))

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        return x + self.up(low)


class EncoderDecoder(Net):
    def __init__(self) -> None:
        super().__init__(low=nn.Sequential(nn.Conv2d(W, W, 2, 2), nn.ReLU()), merge=Decoder())

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.low(x))


class AroundUNet(Net):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Conv2d(W, W, 2, 2), ConvBlock(), nn.ConvTranspose2d(W, W, 2, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


@pytest.mark.parametrize(
    ("make", "owner"), [(EncoderDecoder, "merge"), (lambda: ConvStem(AroundUNet()), "block"), (AroundUNet, "")]
)
def test_a_merge_of_resolutions_is_no_block(make: Any, owner: str) -> None:
    found = plan(make(), images())
    refused = [site.path for site in found.sites if site.code == "RZ905"]
    assert refused == [owner]
    assert all(site.cls == "ConvBlock" for site in found.converted)


@pytest.mark.parametrize("make", [UpsampledGate, lambda: ConvStem(UpsampledGate()), lambda: ConvStem(Hourglass())])
def test_a_branch_may_work_at_a_lower_resolution_inside(make: Any) -> None:
    model = make()
    site = only(plan(model, images()), "x +")
    assert (site.verdict, site.skip_kind) == ("converted", "identity")
    assert len(list(rz.alphas(rz.convert(model, images())))) == 1


# A sum that is not yet the output of its module


class PooledFirst(Net):
    """As in MViT and CoAtNet: attention with a pooled skip, then a perceptron with an identity."""

    def __init__(self) -> None:
        super().__init__(
            narrow=nn.Conv2d(W, 2 * W, 1), one=nn.Conv2d(W, 2 * W, 3, 2, padding=1), two=nn.Conv2d(2 * W, 2 * W, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.narrow(x), 2) + torch.relu(self.one(x))
        return 0.5 * x + torch.relu(self.two(x))


class WrittenPool(Linears):
    """As in Hiera: the pool of the shortcut is the maximum over a dimension; a class token is set aside."""

    def forward(self, x: Tensor) -> Tensor:
        token, grid = x[:, :1], x[:, 1:]
        pooled = torch.cat((token, grid.unflatten(1, (-1, 2)).amax(2)), 1)
        return pooled + torch.relu(self.a(x))[:, ::2]


class DualPath(Linears):
    """A part of the stream is added to, the rest goes beside it."""

    def forward(self, x: Tensor) -> Tensor:
        f = torch.relu(self.a(x))
        return torch.cat((x[..., :4] + f[..., :4], x[..., 4:], f[..., 4:]), -1)


class Cell(Net):
    """As in NASNet: sums of two operations on one input are joined."""

    def __init__(self) -> None:
        super().__init__(one=nn.Conv2d(W, W, 3, 2, padding=1), two=nn.Conv2d(W, W, 3, 2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.max_pool2d(x, 2) + torch.relu(self.one(x)), torch.relu(self.two(x))), 1)


class ProjectedInside(Linears):
    """The sum goes through another layer before it leaves."""

    def __init__(self) -> None:
        super().__init__(end=nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x[..., :4] + torch.relu(self.a(x))[..., :4])


@pytest.mark.parametrize(("make", "inputs"), [(Cell, images), (ProjectedInside, vectors)])
def test_a_projected_sum_inside_a_larger_structure_is_refused(make: Any, inputs: Any) -> None:
    assert only(plan(make(), inputs()), "torch.relu").code == "RZ916"


@pytest.mark.parametrize(
    ("make", "inputs", "blocks"),
    [(PooledFirst, images, 2), (WrittenPool, lambda: vectors(2, 5), 1), (DualPath, vectors, 1)],
)
def test_a_projected_sum_that_the_stream_goes_on_with_is_a_block(make: Any, inputs: Any, blocks: int) -> None:
    model = make()
    found = plan(model, inputs())
    assert [site.verdict for site in found.sites] == ["converted"] * blocks
    assert found.sites[0].skip_kind in ("projection", "slice")
    assert len(list(rz.alphas(rz.convert(model, inputs())))) == blocks


# Patterns


class Stages(Net):
    def __init__(self) -> None:
        super().__init__(encoder=nn.Sequential(Block(), Block()), decoder=nn.Sequential(Block()))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude": "encoder.*"}, ["decoder.0"]),
        ({"exclude": "encoder.1"}, ["encoder.0", "decoder.0"]),
        ({"exclude": ("*.0",)}, ["encoder.1"]),
        ({"include": "encoder.*"}, ["encoder.0", "encoder.1"]),
        ({"include": "encoder.*", "exclude": "*.1"}, ["encoder.0"]),
        ({"exclude": "Nothing"}, ["encoder.0", "encoder.1", "decoder.0"]),
        ({"include": "Block"}, ["encoder.0", "encoder.1", "decoder.0"]),
        ({"include": "Block.forward"}, ["encoder.0", "encoder.1", "decoder.0"]),
    ],
    ids=str,
)
def test_blocks_are_left_out_by_pattern(options: dict[str, Any], left: list[str]) -> None:
    found = plan(Stages(), vectors(), **options)
    assert sorted(site.path for site in found.converted) == sorted(left)
    out = [site for site in found.sites if site.verdict == "refused"]
    assert len(out) == 3 - len(left)
    assert {site.code for site in out} <= {"RZ900"}
    assert all("excluded by" in site.reason or "not among the included" in site.reason for site in out)
    converted = rz.convert(Stages(), vectors(), **options)
    assert {name.rpartition(".")[0] for name, _ in rz.alphas(converted)} == set(left)


def test_a_pattern_that_leaves_nothing_says_so() -> None:
    assert {site.code for site in plan(Stages(), vectors(), exclude="Block").sites} == {"RZ900"}


# Gated already


class AdaptiveZero(Linears):
    """A block of DiT."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W, elementwise_affine=False), modulation=nn.Linear(W, 3 * W))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, dim=-1)
        return x + gate * self.b(torch.relu(self.a(self.norm(x) * (1 + scale) + shift)))


class Scaled(Linears):
    def __init__(self, gate: Tensor) -> None:
        super().__init__(gate=nn.Parameter(gate))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.b(torch.relu(self.a(x)))


class TanhGate(Linears):
    def __init__(self, value: float) -> None:
        super().__init__(gate=nn.Parameter(torch.full((1,), value)))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.gate) * self.b(torch.relu(self.a(x)))


def test_an_adaptive_gate_at_zero_is_left_alone() -> None:
    site = only(plan(AdaptiveZero(), vectors(), vectors()), "x + gate")
    assert (site.verdict, site.code) == ("gated", "RZ908")
    assert "modulation" in site.reason


def test_an_adaptive_gate_that_is_not_zero_gets_an_alpha() -> None:
    model = AdaptiveZero()
    nn.init.normal_(model.modulation.weight)
    assert only(plan(model, vectors(), vectors()), "x + gate").verdict == "converted"
    assert len(list(rz.alphas(rz.convert(model, (vectors(), vectors()))))) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scaled(torch.zeros(1)), lambda: Scaled(torch.zeros(())), lambda: Scaled(torch.full((1,), 0.3)),
        lambda: Scaled(torch.zeros(W)), lambda: TanhGate(0.0), lambda: TanhGate(0.5),
    ],
    ids=["zero", "zero without dimensions", "trained", "zero per channel", "tanh of zero", "tanh, trained"],
)  # fmt: skip
def test_a_gate_that_was_there_is_left_alone(make: Any) -> None:
    model = make()
    site = only(plan(model, vectors()), "self.gate")
    assert (site.verdict, site.code) == ("gated", "RZ120")
    assert "gate" in site.reason
    with pytest.warns(rz.NoEffectWarning, match="gated already"):
        assert torch.equal(rz.convert(model, vectors()).gate, model.gate)


# Sums in other places


def plus(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def mixed(x: Tensor, y: Tensor) -> Tensor:
    y = y * y.sigmoid()
    return x + y


class Helped(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return plus(x, self.b(torch.relu(self.a(x))))


class HelpedMixed(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(x, self.b(torch.relu(self.a(x))))


class Summed(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, torch.relu(self.a(x))])


def test_a_sum_by_the_builtin_is_refused_at_its_place() -> None:
    site = only(plan(Summed(), vectors()))
    assert site.verdict == "refused"
    assert site.reason
    assert segment(site).startswith("sum([")


def test_a_helper_that_computes_with_its_argument_is_refused_by_name() -> None:
    site = only(plan(HelpedMixed(), vectors()), "x + y")
    assert (site.verdict, site.code) == ("refused", "RZ912")
    assert "mixed" in site.reason


def test_a_helper_that_only_adds_is_gated_at_its_call() -> None:
    found = plan(Helped(), vectors())
    (site,) = found.converted
    assert segment(site).startswith("plus(x,")
    assert len(list(rz.alphas(rz.convert(Helped(), vectors())))) == 1


class Walk(Net):
    """One add for all layers."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(layers=nn.ModuleList(nn.Linear(W, W) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


class WalkNumbered(Walk):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + torch.relu(layer(x))
            if i == 7:
                break
        return x


class WalkRange(Walk):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.layers)):
            x = x + torch.relu(self.layers[i](x))
        return x


class WalkPairs(Net):
    def __init__(self) -> None:
        super().__init__(
            norms=nn.ModuleList(nn.LayerNorm(W) for _ in range(3)),
            layers=nn.ModuleList(nn.Linear(W, W) for _ in range(3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return x


class WalkSlice(Walk):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layers[0](x))
        for layer in self.layers[1:]:
            x = x + torch.relu(layer(x))
        return x


class WalkBackwards(Walk):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = x + torch.relu(layer(x))
        return x


class WalkSome(Walk):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + torch.relu(layer(x)) if i != 1 else torch.relu(layer(x))
        return x


class WalkWhile(Walk):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < 3:
            x = x + torch.relu(self.layers[i](x))
            i += 1
        return x


class Iterated(Linears):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.relu(self.a(x))
        return x


LOOPS = [(Walk, 3), (WalkNumbered, 3), (WalkRange, 3), (WalkPairs, 3), (WalkSlice, 2), (WalkBackwards, 3)]


class TestLoops:
    @pytest.mark.parametrize("make", [WalkSome, WalkWhile])
    def test_other_loops_are_refused_with_a_reason(self, make: Any) -> None:
        found = plan(make(), vectors())
        assert not found.converted
        site = only(found, "x +")
        assert (site.verdict, site.code) == ("refused", "RZ911")
        assert site.reason

    @pytest.mark.parametrize(
        ("make", "depth"),
        [(Walk, 3), (WalkNumbered, 3), (WalkRange, 3), (WalkPairs, 3), (WalkSlice, 2), (WalkBackwards, 3)],
    )
    def test_a_loop_over_a_list_has_a_list_of_alphas(self, make: Any, depth: int) -> None:
        model = make()
        (site,) = plan(model, vectors()).converted
        assert site.calls == depth
        assert len(site.gates[0].loops) == 1
        assert site.gates[0].members == tuple(map(str, range(depth)))
        converted = rz.convert(model, vectors())
        assert len(list(rz.alphas(converted))) == depth
        x = vectors()
        assert torch.equal(rz.convert(model, x, alpha_init="preserve")(x), model(x))

    def test_a_weight_tied_iteration_has_one_alpha(self) -> None:
        (site,) = plan(Iterated(), vectors()).converted
        assert site.calls == 3
        assert site.gates[0].loops == ()
        assert [name for name, _ in rz.alphas(rz.convert(Iterated(), vectors()))] == ["alpha"]


# Hidden adds


def add_relu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + torch.relu(y)


def scripted(target: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        return torch.jit.script(target)


class ScriptedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


class CallsScript(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.b(x))
        return self.join(x, self.a(x))  # type: ignore[no-any-return, operator]


def test_an_add_in_a_scripted_function_is_hidden_and_the_others_are_found() -> None:
    model = CallsScript(a=nn.Linear(W, W), b=nn.Linear(W, W), join=scripted(add_relu))
    found = plan(model, vectors())
    (hidden,) = found.of("hidden")
    assert hidden.code == "RZ141"
    assert hidden.text.startswith("return self.join(x, self.a(x))")
    assert len(found.converted) == 1


def test_an_add_in_a_scripted_child_is_hidden() -> None:
    model = nn.Sequential(nn.Linear(W, W), scripted(ScriptedBlock()))
    assert [site.code for site in plan(model, vectors()).of("hidden")] == ["RZ141"]
