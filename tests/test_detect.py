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
import rezero_convert.detect as detector
from rezero_convert import sources
from rezero_convert.capture.static import traces

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


class MaskedCoupling(Net):
    """RealNVP: what a mask takes of the input gives scale and shift of the rest."""

    def __init__(self) -> None:
        super().__init__(s=nn.Linear(W, W), t=nn.Linear(W, W))
        self.register_buffer("mask", torch.arange(2 * W).reshape(2, W) % 2.0)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.mask[1] * x
        s = torch.tanh(self.s(kept)) * (1 - self.mask[1])
        t = torch.tanh(self.t(kept)) * (1 - self.mask[1])
        rest = x - t
        return (1 - self.mask[1]) * rest * torch.exp(-s) + kept


class Reversible(Net):
    """RevNet: each half of the channels plus a function of the other."""

    def __init__(self) -> None:
        super().__init__(f=nn.Linear(4, 4), g=nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        left = left + torch.relu(self.f(right))
        right = right + torch.relu(self.g(left))
        return torch.cat((left, right), dim=-1)


class ReversibleLayer(Linears):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.relu(self.a(y))
        return x, y + torch.relu(self.b(x))


class ReversibleStack(Net):
    """As in Reformer: two streams through all layers, the same value at the start."""

    def __init__(self) -> None:
        super().__init__(layers=nn.ModuleList(ReversibleLayer() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x, y = torch.cat((x, x), dim=-1).chunk(2, dim=-1)
        for layer in self.layers:
            x, y = layer(x, y)
        return torch.cat((x, y), dim=-1)


UNKNOWN_END = """
from elsewhere import activation
from torch import nn


class Block(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv3 = nn.Conv2d(width, out, 1)
        self.norm = nn.BatchNorm2d(out)
        self.act = activation()

    def forward(self, x):
        y = self.conv2(nn.functional.relu(self.conv1(x)))
        x = self.norm(self.conv3(x))
        return self.act(y + x)
"""


SHIFTED = """
from elsewhere import Modulated
from torch import nn


class Block(nn.Module):
    def __init__(self, width, last=False):
        super().__init__()
        self.first = Modulated(width)
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Linear(width, width)
        self.ff = nn.Linear(width, width)
        self.last = last

    def forward(self, x, y, t):
        if self.last:
            n = self.first(y, t)
        else:
            n, shift, scale = self.first(y, t)
        x = x + self.attn(n)
        if self.last:
            y = None
        else:
            y = y + self.attn(n)
            n = self.norm(y) * (1 + scale[:, None]) + shift[:, None]
            y = y + self.ff(n)
        return x, y
"""


class TwoWay(Linears):
    """As in SAM: queries attend to the image, then it attends to them."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.a((x @ y.mT).softmax(-1) @ y)
        return x, y + self.b((y @ x.mT).softmax(-1) @ x)


class Conditioned(Linears):
    """A condition is added inside the branch, as in a diffusion model."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(x) + t
        return x + self.b(torch.relu(h))


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


class RefinedPositions(Net):
    """Positions of the queries come from boxes that each layer refines, the first from anchors the input chooses."""

    def __init__(self) -> None:
        super().__init__(one=PositionedLayer(), two=PositionedLayer(), box=nn.Linear(W, 4), place=nn.Linear(4, W))
        self.register_buffer("anchors", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.topk(x, 1, dim=-1).indices[..., 0] % 5
        boxes = self.box(x) + self.anchors[chosen]
        x = self.one(x, self.place(torch.sigmoid(boxes)))
        boxes = self.box(x) + torch.sigmoid(boxes)
        return self.two(x, self.place(torch.sigmoid(boxes)))


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
    ("a coupling by masks", MaskedCoupling, one, "+ kept", "RZ901", "a mask and its complement"),
    ("the shift of a coupling by masks", MaskedCoupling, one, "x - t", "RZ901", "a mask and its complement"),
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


@pytest.mark.parametrize("make", [Reversible, ReversibleStack])
def test_reversible_pairs_are_refused_as_a_whole(make: Any) -> None:
    found = plan(make(), vectors())
    assert {(site.verdict, site.code) for site in found.sites} == {("refused", "RZ918")}
    with pytest.warns(rz.NoEffectWarning, match="reversible pair"):
        rz.convert(make(), vectors())


def test_a_sum_that_goes_into_a_module_of_unknown_class_is_undecided() -> None:
    (site,) = rz.convert_source(UNKNOWN_END).report.plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ915")
    assert "whether act only passes the sum on" in site.reason


def test_a_value_that_only_a_dead_choice_reads_is_no_half_of_a_pair() -> None:
    found = rz.convert_source(SHIFTED).report.plan
    assert {site.verdict for site in found.sites if site.text.startswith("y = y +")} == {"converted"}
    assert not [site for site in found.sites if site.code == "RZ918"]


@pytest.mark.parametrize(("make", "blocks"), [(TwoWay, 2), (Conditioned, 1)])
def test_streams_that_read_each_other_and_themselves_are_no_reversible_pair(make: Any, blocks: int) -> None:
    assert len(plan(make(), vectors(), vectors()).converted) == blocks
    assert len(list(rz.alphas(rz.convert(make(), (vectors(), vectors()))))) == blocks


@pytest.mark.parametrize("make", [Positioned, PositionedFirst, PositionedQueries, PositionedStream])
def test_positions_added_again_in_each_layer_are_no_skip_and_hide_no_block(make: Any) -> None:
    found = plan(make(), vectors(), vectors())
    given = [site for site in found.sites if "x + place" in segment(site)]
    assert {site.verdict for site in given} == {"refused"}
    assert {site.code for site in given} <= {"RZ901", "RZ904", "RZ907", "RZ914"}
    layers = len([name for name, module in make().named_modules() if isinstance(module, (Block, PositionedLayer))])
    assert len(found.converted) == layers
    assert len(list(rz.alphas(rz.convert(make(), (vectors(), vectors()))))) == layers


def test_positions_made_of_the_stream_are_inside_the_branch_that_reads_them() -> None:
    found = plan(RefinedPositions(), vectors())
    verdicts = {segment(site): (site.verdict, site.code) for site in found.sites}
    assert verdicts["x + place"] == ("interior", "RZ131")
    assert verdicts["self.box(x) + self.anchors[chosen]"] == ("refused", "RZ901")
    assert [site.path for site in found.converted] == ["one", "two"]
    assert len(list(rz.alphas(rz.convert(RefinedPositions(), vectors())))) == 2


class Biased(Linears):
    """Attention with a bias that all layers share."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(x).mT
        scores += bias
        return x + self.b(scores.softmax(-1) @ x)


class SharedBias(Net):
    def __init__(self) -> None:
        super().__init__(one=Biased(), two=Biased(), table=nn.Parameter(torch.randn(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table.unsqueeze(0)
        return self.two(self.one(x, bias), bias)


class Latents(Linears):
    """As in Perceiver: the stream begins as a parameter."""

    def __init__(self) -> None:
        super().__init__(start=nn.Parameter(torch.randn(3, W)))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(2, 3, W)
        return start + self.b((self.a(start) @ x.mT).softmax(-1) @ x)


def test_a_bias_added_to_the_scores_of_each_layer_is_refused_in_each() -> None:
    found = plan(SharedBias(), vectors())
    assert [site.code for site in found.sites if segment(site) == "scores += bias"] == ["RZ907"] * 2
    assert len(found.converted) == 2


def test_a_stream_that_begins_as_a_parameter_is_one() -> None:
    assert only(plan(Latents(), vectors()), "start +").verdict == "converted"


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
    assert plan(Latents(), vectors()).scalars == 0


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


class LongSkipInOneBody(Linears):
    """The last block and the long skip are written in one module: one sum of three terms."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.relu(self.a(x))
        z = y + torch.relu(self.b(y))
        return z + x


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


def test_the_last_block_before_a_long_skip_is_a_block() -> None:
    found = plan(LongSkipInOneBody(), vectors())
    assert only(found, "z + x").code == "RZ130"
    assert [segment(site) for site in found.converted] == ["x + torch.relu(self.a(x))", "y + torch.relu(self.b(y))"]
    converted = rz.convert(LongSkipInOneBody(), vectors())
    assert len(list(rz.alphas(converted))) == 2
    x = vectors()
    assert torch.equal(converted(x), x + x)


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


@pytest.mark.parametrize(
    ("make", "options"),
    [(Interior, {}), (PreNormInterior, {}), (LongSkip, {}), (LongSkipBare, {}), (LongSkip, {"long_skips": True})],
)
def test_a_second_run_decides_as_the_first(make: Any, options: dict[str, Any]) -> None:
    once = rz.convert(make(), vectors(), **options)
    found = plan(once, vectors(), **options)
    assert not found.converted, [(segment(site), site.form) for site in found.converted]
    gates = [gate.alpha for site in found.of("gated") for gate in site.gates]
    assert len(gates) == len(list(rz.alphas(once)))
    with pytest.warns(rz.NoEffectWarning):
        assert len(list(rz.alphas(rz.convert(once, vectors(), **options)))) == len(gates)


def test_a_unet_keeps_its_merge_and_loses_no_block() -> None:
    found = plan(UNet(), images())
    assert only(found, "x + y").code == "RZ905"
    assert sorted(site.path for site in found.converted) == ["end", "low", "top"]
    assert len(list(rz.alphas(rz.convert(UNet(), images())))) == 3


class LowRank(Net):
    """Products with weights that are parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__(p=nn.Parameter(torch.randn(W, W)), q=nn.Parameter(torch.randn(W, W)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) @ self.p + torch.tanh(x) @ self.q


class Routed(Experts):
    """Each token goes to the experts with the best scores."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1, dim=-1)
        routed = weights * torch.where(chosen > 0, self.first(x), self.second(x))
        return routed + self.shared(x)


class Exchange(Net):
    """Two resolutions of one image, merged."""

    def __init__(self) -> None:
        super().__init__(
            high=nn.Conv2d(W, W, 3, padding=1),
            low=nn.Conv2d(W, W, 3, 2, padding=1),
            step=nn.Conv2d(W, W, 3, 2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.step(torch.relu(self.high(x)))) + torch.relu(self.low(x))


class Pooled(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + F.avg_pool1d(x, 3, 1, 1))


@pytest.mark.parametrize(
    ("make", "text", "reason"),
    [
        (RotaryBuffers, "q * self.cos", "parts of the skip times given factors, as in a rotation"),
        (PolynomialGelu, "0.0447", "a pointwise function of the skip, as in an activation"),
        (Snake, "torch.sin", "a pointwise function of the skip, as in an activation"),
        (GlobalResponse, "+ x", "the skip is scaled by statistics of its own"),
        (Pooled, "x +", "the skip is only pooled"),
    ],
)
def test_it_is_told_what_a_branch_without_weights_is(make: Any, text: str, reason: str) -> None:
    assert only(plan(make(), vectors()), text).reason.rpartition(": ")[2] == reason


class Sampled(Linears):
    """A variational layer: noise of a size computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.a(x), torch.exp(self.b(x))
        return mean + deviation * torch.randn_like(deviation)


class Propagation(Linears):
    """A graph convolution: both paths are linear in the input, the graph given."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return torch.relu(self.a(x) + graph @ self.b(x))


class ScaledNorm(nn.Module):
    """A norm that also returns the scale of its output, as integer networks need it."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), None


class ScaledPostNorm(Linears):
    def __init__(self) -> None:
        super().__init__(norm=ScaledNorm())

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.norm(x + torch.relu(self.a(x)))
        return y


def test_a_norm_that_returns_more_than_its_tensor_stays() -> None:
    converted = rz.convert(ScaledPostNorm(), vectors())
    assert isinstance(converted.norm, ScaledNorm)
    assert len(list(rz.alphas(converted))) == 1


class OwnNorm(Linears):
    """Its norm is called by itself, and by the module that holds it."""

    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W))

    def adapt(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.relu(self.b(x)) + x

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.adapt(torch.relu(self.a(h)) + x)


class OneNormThreeCalls(Net):
    """One of the calls is on a path that does not run."""

    def __init__(self) -> None:
        super().__init__(out=OwnNorm())
        self.pre = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.out.norm(x) if self.pre else x, x)
        return y if self.pre else self.out.norm(y)


def test_the_uses_of_one_norm_go_together_or_not_at_all() -> None:
    converted = rz.convert(OneNormThreeCalls(), vectors())
    assert isinstance(converted.out.norm, nn.LayerNorm)
    norms = [norm for site in plan(OneNormThreeCalls(), vectors()).converted for norm in site.norms]
    assert len(norms) > 1
    assert {norm.action for norm in norms} == {"keep"}


def test_noise_of_a_computed_size_is_no_branch() -> None:
    assert only(plan(Sampled(), vectors()), "mean +").code == "RZ901"


def test_a_product_with_a_given_matrix_is_linear() -> None:
    x = vectors()
    assert only(plan(Propagation(), x, torch.rand(*x.shape[:-1], x.shape[-2])), "self.a(x) +").code == "RZ903"


@pytest.mark.parametrize(
    ("make", "inputs", "text", "reason"),
    [
        (TwoStreams, two, "self.a(x)", "they come from different inputs"),
        (Experts, one, "routed +", "all are computed from the input x, none from another"),
        (Highway, one, "(1 - t) * x", "a mean of two values, with sigmoid(...) and its complement"),
        (Disentangled, one, "q @ k.mT +", "products of queries and keys, the scores of an attention"),
        (LowRank, one, "self.p +", "all are computed from the input x, none from another"),
        (
            Routed,
            one,
            "routed +",
            "all are computed from the input x, none from another, one of them by routing: rows chosen by their scores",
        ),
        (
            Exchange,
            image,
            "self.low(x)",
            "all are computed from the input x, none from another, at several resolutions",
        ),
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


# Scaled skips


class ScaledSkips(Linears):
    """As in CAFormer and Doge: the first of two adds scales its skip per channel, the second by a number."""

    def __init__(self) -> None:
        super().__init__(scale=nn.Parameter(torch.rand(W)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * x + self.a(x)
        return x * 0.5 + torch.relu(self.b(x))


class ScaledParts(Linears):
    """One part of the input, scaled, and a function of another."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x[:, 0] + torch.relu(self.a(x[:, 1]))


class InitialLayer(Linears):
    """The first layer's input is mixed in again in each."""

    def __init__(self) -> None:
        super().__init__(mix=nn.Parameter(torch.tensor([1.0, 0.5])), norm=nn.LayerNorm(W))

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        x = self.mix[0] * x + self.mix[1] * start
        x = x + torch.relu(self.a(self.norm(x)))
        return x + self.b(torch.relu(x))


class InitialState(Net):
    def __init__(self) -> None:
        super().__init__(layers=nn.ModuleList(InitialLayer() for _ in range(3)), end=nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.end(x)
        for layer in self.layers:
            x = layer(x, start)
        return x


def test_a_scaled_part_beside_another_is_no_skip() -> None:
    assert only(plan(ScaledParts(), vectors())).verdict == "refused"


def test_the_initial_state_mixed_in_hides_no_block() -> None:
    found = plan(InitialState(), vectors())
    mixed = [site for site in found.sites if "self.mix" in segment(site)]
    assert [site.code for site in mixed] == ["RZ902", "RZ130", "RZ130"]
    assert len(found.converted) == 3 * 2


def test_a_scaled_skip_is_an_identity_skip_wherever_its_sum_goes() -> None:
    sites = plan(ScaledSkips(), vectors()).sites
    assert [(site.verdict, site.skip_kind) for site in sites] == [("converted", "identity")] * 2
    assert len(list(rz.alphas(rz.convert(ScaledSkips(), vectors())))) == 2


# Adds in modules of their own


class Join(nn.Module):
    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        return f + x


class Mean(nn.Module):
    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        return (f * 0.7 + x * 0.3) / 0.5


class Joined(Net):
    """The operands meet in a child that only adds, a projection or a copy of the skip among them."""

    def __init__(self, join: nn.Module, projected: bool) -> None:
        super().__init__(
            f=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, 4 if projected else W)),
            short=nn.Linear(W, 4 if projected else W), join=join,
        )  # fmt: skip
        self.projected = projected

    def forward(self, x: Tensor) -> Tensor:
        skip = self.short(x) if self.projected else x.clone()
        return self.join(self.f(x), skip)


class JoinedElsewhere(Net):
    """Skip and branch part two modules above the add, beside another layer."""

    def __init__(self) -> None:
        super().__init__(f=nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, 4)), g=nn.Linear(W, 4), join=Deep())

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.f(x), self.g(x))


class Deep(Net):
    def __init__(self) -> None:
        super().__init__(join=Join(), end=nn.Linear(4, 4))

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        return self.end(self.join(f, x))


def test_skip_and_branch_that_part_outside_a_module_with_weights_are_refused() -> None:
    assert only(plan(JoinedElsewhere(), vectors())).code == "RZ904"


def test_a_projection_of_the_same_shape_is_no_skip_in_a_module_that_only_adds() -> None:
    class Parallel(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.f(x), self.short(x))

    assert only(plan(Parallel(Join(), projected=False), vectors())).code == "RZ903"


@pytest.mark.parametrize(("join", "projected"), [(Join, True), (Join, False), (Mean, False)])
def test_a_module_that_only_adds_belongs_to_its_caller(join: Any, projected: bool) -> None:
    model = Joined(join(), projected)
    site = only(plan(model, vectors()))
    assert (site.path, site.skip_kind) == ("join", "projection" if projected else "identity")
    converted = rz.convert(model, vectors())
    assert [name for name, _ in rz.alphas(converted)] == ["join.alpha"]
    assert {one.verdict for one in plan(converted, vectors()).sites} == {"gated"}


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


class SigmoidGate(Linears):
    def __init__(self) -> None:
        super().__init__(gate=nn.Parameter(torch.zeros(1)))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate) * self.b(torch.relu(self.a(x)))


def test_a_gate_that_is_open_at_zero_is_none() -> None:
    assert only(plan(SigmoidGate(), vectors()), "self.gate").verdict == "converted"


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


class Offset(Linears):
    """A gate that is zero because something is added to its parameter."""

    def __init__(self, value: float) -> None:
        super().__init__(gate=nn.Parameter(torch.full((W,), value)))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.gate + 1.0) * self.b(torch.relu(self.a(x)))


class ScaleElsewhere(Net):
    """The gate is in one module, the add in the next."""

    def __init__(self) -> None:
        super().__init__(scale=Scale(), join=Join())

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.scale(x), x)


class Scale(Linears):
    def __init__(self) -> None:
        super().__init__(gate=nn.Parameter(torch.zeros(W)))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * self.b(torch.relu(self.a(x)))


class Switched(Linears):
    """A branch that a buffer turns off."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("switch", torch.full((1,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.switch * self.b(torch.relu(self.a(x)))


class ZeroLast(Linears):
    """The last layer starts at zero, and a number scales what it gives."""

    def __init__(self) -> None:
        super().__init__(factor=0.5)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.b(torch.relu(self.a(x)))


class ZeroLastScaled(ZeroLast):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((2, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x))) * self.factor


def test_a_zero_initialised_last_layer_behind_a_number_is_no_gate() -> None:
    site = only(plan(ZeroLast(), vectors()), "x + self.factor")
    assert (site.verdict, [repair.parameter for repair in site.repairs]) == ("converted", ["b.weight"])
    assert len(list(rz.alphas(rz.convert(ZeroLast(), vectors())))) == 1


def test_a_zero_initialised_last_layer_behind_a_parameter_is_repaired() -> None:
    site = only(plan(ZeroLastScaled(), vectors()), "x + self.b")
    assert site.code != "RZ908"
    assert len(list(rz.alphas(rz.convert(ZeroLastScaled(), vectors())))) == 1


@pytest.mark.parametrize(
    ("make", "verdict", "code", "word"),
    [
        (lambda: Offset(-1.0), "gated", "RZ120", "gate"),
        (ScaleElsewhere, "gated", "RZ120", "scale.gate"),
        (lambda: Switched(0.0), "refused", "RZ913", "switch"),
    ],
)
def test_a_block_that_is_zero_otherwise_is_left_and_the_others_are_converted(
    make: Any, verdict: str, code: str, word: str
) -> None:
    model = nn.Sequential(make(), Block())
    left, converted = sorted(plan(model, vectors()).sites, key=lambda site: site.verdict == "converted")
    assert (left.verdict, left.code) == (verdict, code)
    assert word in left.reason
    assert not left.gates
    assert converted.path == "1"
    assert [name for name, _ in rz.alphas(rz.convert(model, vectors()))] == ["1.alpha"]


@pytest.mark.parametrize("make", [lambda: Offset(-0.5), lambda: Switched(0.5)])
def test_a_factor_that_is_not_zero_holds_nothing_back(make: Any) -> None:
    assert plan(make(), vectors()).converted
    assert len(list(rz.alphas(rz.convert(make(), vectors())))) == 1


# Paths that did not run


def test_the_text_of_a_class_is_read_once_for_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(detector, "traces", lambda file, only: read.extend(only) or traces(file, only))
    sources.forget()
    model, x = nn.TransformerEncoderLayer(W, 2, W, batch_first=True).eval(), vectors()
    first = plan(model, x)
    assert plan(model, x) == first
    assert read == ["TransformerEncoderLayer"]
    other = plan(model, x, drop_norm="none")
    assert read == ["TransformerEncoderLayer"] * 2  # other options have findings of their own
    assert [norm.action for site in other.of("not-executed") for norm in site.norms] != [
        norm.action for site in first.of("not-executed") for norm in site.norms
    ]
    sources.forget()
    plan(model, x)
    assert len(read) == 3


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


class StackedSum(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.a(x)], dim=1).sum(1)


class Reversed(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub(self.a(x), x)


class ProductOfTheBranch(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[0], torch.relu(self.a(x[0])), self.b.weight)


class ProductOfTheSkip(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x[0], x[0], self.b.weight)


@pytest.mark.parametrize("make", [StackedSum, Reversed, ProductOfTheBranch, ProductOfTheSkip])
def test_a_sum_that_is_no_add_in_the_text_is_answered_too(make: type[nn.Module]) -> None:
    site = only(plan(make(), vectors()))
    assert (site.verdict, site.code) == ("refused", "RZ912")
    assert site.reason == "the sum is not written as an add of its operands"


class StackedOverAnotherDimension(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.a(x)], dim=1).sum(0)


class ProductWithABias(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.a.bias, x[0], self.b.weight)


@pytest.mark.parametrize("make", [StackedOverAnotherDimension, ProductWithABias])
def test_what_adds_no_two_of_the_models_values_is_no_add(make: type[nn.Module]) -> None:
    assert plan(make(), vectors()).sites == ()


def test_a_helper_that_computes_with_its_argument_is_refused_by_name() -> None:
    site = only(plan(HelpedMixed(), vectors()), "x + y")
    assert (site.verdict, site.code) == ("refused", "RZ912")
    assert "mixed" in site.reason


def activated(x: Tensor, y: Tensor) -> Tensor:
    return x + F.gelu(y)


class HelpedActivated(Linears):
    def forward(self, x: Tensor) -> Tensor:
        return activated(x, self.b(torch.relu(self.a(x))))


def test_a_helper_that_activates_its_argument_is_refused() -> None:
    """A gate does not commute with it."""
    site = only(plan(HelpedActivated(), vectors()), "x + F.gelu(y)")
    assert (site.verdict, site.code) == ("refused", "RZ912")


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


class Sometimes(Linears):
    """Both adds may run in one pass, for the same child."""

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if again:
            x = x + torch.relu(self.a(x))
        return x + torch.tanh(self.a(x))


def test_an_add_that_did_not_run_beside_one_that_did_gets_no_gate() -> None:
    found = plan(Sometimes(), vectors())
    assert only(found, "torch.tanh").verdict == "converted"
    site = only(found, "torch.relu")
    assert (site.verdict, site.gates) == ("not-executed", ())
    assert site.reason.endswith("pass inputs that run it, unless its condition is a setting of the module")
