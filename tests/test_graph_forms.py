"""Graphs whose norms, activations and layers are written out operation by operation, by hand or by decomposition."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_graphs import agree_in_order, names, randomise, resnet, transformer
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

import rezero_convert as rz

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own

aten = torch.ops.aten
FULL = {
    **core_aten_decompositions(),
    **get_decompositions(
        [
            aten.native_layer_norm, aten._fused_rms_norm, aten.native_group_norm, aten.gelu, aten.silu, aten.relu,
            aten._native_batch_norm_legit_no_training, aten._native_batch_norm_legit_functional, aten.native_batch_norm,
            aten._native_batch_norm_legit, aten._softmax, aten.native_dropout, aten.addmm,
        ]
    ),
}  # fmt: skip
"""More than core ATen: no norm, no activation but the simplest, no layer with a bias is left."""

CORE = core_aten_decompositions()
DOORS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "core ATen": lambda model, x: torch.export.export(model, (x,)).run_decompositions(CORE).module(),
    "all decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions(FULL).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, all decomposed": lambda model, x: make_fx(model, decomposition_table=FULL)(x),
}  # fmt: skip


class Residual(nn.Module):
    """x + linear(norm(x)), with whatever norm."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.linear = nn.Linear(width, width)
        self.groups = groups

    def norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(self.norm(x)))


class ByMean(Residual):
    def norm(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class ByVariance(Residual):
    def norm(self, x: Tensor) -> Tensor:
        return self.bias + self.weight * (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)


class ByVarMean(Residual):
    def norm(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt()


class ByPower(Residual):
    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class BySquare(Residual):
    def norm(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * ((y * y).mean(-1, keepdim=True) + 1e-6).pow(-0.5)
        return self.weight * y.type_as(x)


class ByLength(Residual):
    def norm(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) * self.weight


class Weights(Residual):
    """Weights that sum up to one: no norm, though the scale of x does not matter."""

    def norm(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


class Centred(Residual):
    def norm(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class Squashed(Residual):
    """Global response: grows with x."""

    def norm(self, x: Tensor) -> Tensor:
        return x * x.norm(dim=-1, keepdim=True) / (x.mean(-1, keepdim=True) + 1e-6)


class Statistics(Residual):
    """The mean of the norm is read elsewhere too."""

    def norm(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * x.var(-1, keepdim=True).rsqrt() + torch.tanh(mean)


NORMS = [ByMean, ByVariance, ByVarMean, ByPower, BySquare, ByLength]


def dropped(model: nn.Module, x: Tensor, **options: object) -> list[str]:
    """The kinds of the norms that go, in order."""
    plan = rz.audit(model, x, **options).plan
    return [norm.kind for site in plan.converted for norm in site.norms if norm.action != "keep"]


def unread(model: nn.Module) -> set[str]:
    """The parameters that a graph does not read."""
    assert isinstance(model, fx.GraphModule)
    read = {str(node.target) for node in model.graph.nodes}
    return {name for name, _ in model.named_parameters() if not {name, name.rpartition(".")[0]} & read}


# --- what is no norm ---


@pytest.mark.parametrize("cls", [Weights, Centred, Squashed, Statistics])
@pytest.mark.parametrize("door", ["symbolic_trace", "make_fx"])
def test_what_is_no_norm_stays(cls: type[Residual], door: str) -> None:
    x = torch.rand(2, 3, 8) + 0.5
    traced = DOORS[door](cls(8), x)
    assert dropped(traced, x) == []
    assert len(names(rz.convert(traced, x))) == 1


def test_a_norm_whose_inside_is_returned_stays() -> None:
    class Returned(ByMean):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            mean = x.mean(-1, keepdim=True)
            return x + self.linear((x - mean) * x.var(-1, keepdim=True).rsqrt()), mean

    x = torch.randn(2, 3, 8)
    assert dropped(fx.symbolic_trace(Returned(8)), x) == []


def test_a_gate_by_a_sigmoid_is_no_activation_of_the_sum() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.linear(x)
            return x * torch.sigmoid(x.mean(-1, keepdim=True))

    x = torch.randn(2, 8)
    (site,) = rz.audit(make_fx(Gated())(x), x).plan.converted
    assert site.activation is None


# --- norms ---


@pytest.mark.parametrize("door", ["symbolic_trace", "make_fx", "make_fx, all decomposed"])
@pytest.mark.parametrize("cls", NORMS)
def test_norms_written_by_hand_are_dropped(cls: type[Residual], door: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(8), cls(8)), torch.randn(2, 3, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    assert dropped(traced, x) == ["layer", "layer"]
    assert dropped(traced, x, drop_norm="none") == []
    converted = rz.convert(traced, x)
    assert rz.validate(converted, x).ok
    assert unread(converted) == unread(traced)  # the norms' parameters went with them
    with torch.no_grad():
        for (_, alpha), value in zip(rz.alphas(converted), (0.5, 0.25), strict=True):
            alpha.fill_(value)
    expected = x
    for block, value in zip(model, (0.5, 0.25), strict=True):
        assert isinstance(block, Residual)
        expected = expected + value * F.relu(block.linear(expected))
    torch.testing.assert_close(converted(x), expected)
    assert "sqrt" not in converted.code
    assert "mean" not in converted.code


@pytest.mark.parametrize("door", ["all decomposed", "make_fx", "make_fx, all decomposed"])
@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8)])
def test_decomposed_norms_are_dropped_with_their_parameters(make: Callable[[], nn.Module], door: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))

    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 3, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(model, x), rz.convert(traced, x)
    assert dropped(traced, x) == ["layer", "layer"]
    assert len(graph.state_dict()) == len(module.state_dict())
    agree_in_order(module, graph)
    torch.testing.assert_close(graph(x), module(x))
    with pytest.warns(UserWarning, match="made anew"):
        back = rz.unconvert(graph)
    assert list(back.state_dict()) == list(traced.state_dict())
    torch.testing.assert_close(back(x), traced(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("door", ["make_fx", "make_fx, all decomposed"])
def test_the_bias_of_a_flat_batch_norm_stays(door: str, train: bool) -> None:
    model, x = resnet().train(train), torch.randn(2, 3, 8, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = (rz.convert(one, x, drop_norm=("layer", "batch")) for one in (model, traced))
    assert len(list(graph.parameters())) == len(list(module.parameters()))
    agree_in_order(module, graph)
    with torch.no_grad():
        module.get_parameter("1.conv1.bias").fill_(0.5)
        graph.get_parameter("_param_constant2_bias").fill_(0.5)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x))
    with pytest.warns(UserWarning, match="12 parameters of dropped norms were made anew"):
        back = rz.unconvert(graph)
    assert list(back.state_dict()) == list(traced.state_dict())


@pytest.mark.parametrize("kind", ["batch", "group", "instance"])
def test_the_kinds_of_decomposed_norms(kind: str) -> None:
    norm = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8), "instance": nn.InstanceNorm2d(8)}[kind]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.norm(x))

    model, x = Block().eval(), torch.randn(2, 8, 4, 4)
    traced = DOORS["make_fx, all decomposed"](model, x)
    assert dropped(traced, x) == []
    assert [n.kind for site in rz.audit(traced, x).plan.converted for n in site.norms] == [kind]
    assert dropped(traced, x, drop_norm=kind) == [kind]


# --- models ---


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", init_values=0.1, drop_path_rate=0.1, drop_rate=0.1, **sizes)
    assert isinstance(model, nn.Module)
    return model


def convnext() -> nn.Module:
    models = pytest.importorskip("torchvision.models.convnext")
    rows = [models.CNBlockConfig(8, 16, 2), models.CNBlockConfig(16, None, 1)]
    model = models.ConvNeXt(rows, stochastic_depth_prob=0.1, num_classes=3)
    assert isinstance(model, nn.Module)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pre-norm transformer": (transformer, (2, 5, 8)),
    "ViT with LayerScale": (vit, (2, 3, 32, 32)),
    "ConvNeXt": (convnext, (2, 3, 32, 32)),
    "ResNet": (resnet, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("door", ["core ATen", "all decomposed", "make_fx, all decomposed"])
@pytest.mark.parametrize("name", MODELS)
def test_decomposed_models_agree_with_the_module_route(name: str, door: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(model, x), rz.convert(traced, x)
    assert len(list(graph.parameters())) == len(list(module.parameters()))
    ours, theirs = (rz.audit(one, x).plan.converted for one in (model, traced))
    assert sorted(site.reason for site in theirs) == sorted(site.reason for site in theirs if site.gates)
    count = [sum(n.action != "keep" for site in sites for n in site.norms) for sites in (ours, theirs)]
    assert count[0] == count[1]
    if door.startswith("make_fx"):
        agree_in_order(module, graph)
    else:
        assert names(graph) == names(module)
        randomise(module, graph)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-4)
    kept = rz.convert(traced, x, alpha_init="preserve", verify=False)
    assert torch.equal(kept(x), traced(x))


@pytest.mark.parametrize("door", ["core ATen", "make_fx, all decomposed"])
@pytest.mark.parametrize("name", ["ViT with LayerScale", "ConvNeXt"])
def test_drop_path_and_dropout_of_training_graphs(name: str, door: str) -> None:
    make, shape = MODELS[name]
    model, x = make().train(), torch.randn(shape)
    traced = DOORS[door](copy.deepcopy(model), x)
    graph = rz.convert(traced, x)
    gates = [site.gates for site in rz.audit(traced, x).plan.converted]
    assert len(gates) == len(list(rz.alphas(rz.convert(model, x))))
    assert all(gate.existing for row in gates for gate in row)  # LayerScale, seen through what drops paths
    assert rz.validate(graph, x).ok
    kept = rz.convert(traced, x, alpha_init="preserve", verify=False)
    outs = []
    for one in (kept, traced):
        torch.manual_seed(1)
        outs.append(one(x))
    assert torch.equal(*outs)


class Activated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv(x))


ACTIVATIONS = {
    "relu": nn.ReLU(), "gelu": nn.GELU(), "tanh gelu": nn.GELU("tanh"), "silu": nn.SiLU(), "hardswish": nn.Hardswish(),
    "leaky": nn.LeakyReLU(), "mish": nn.Mish(), "elu": nn.ELU(),
}  # fmt: skip


@pytest.mark.parametrize("door", ["make_fx, all decomposed"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_decomposed_activations_move_into_the_branch(act: str, door: str) -> None:
    model, x = nn.Sequential(Activated(ACTIVATIONS[act]), Activated(ACTIVATIONS[act])), torch.randn(2, 8, 4, 4)
    traced = DOORS[door](copy.deepcopy(model), x)
    sites = rz.audit(traced, x).plan.converted
    assert [site.activation and site.activation.action for site in sites] == ["move", "move"]
    module, graph = rz.convert(model, x), rz.convert(traced, x)
    assert torch.equal(graph(x), x)
    agree_in_order(module, graph)
    torch.testing.assert_close(graph(x), module(x))


def test_half_precision_norms_with_casts() -> None:
    model, x = nn.Sequential(BySquare(8)).to(torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    for door in ("symbolic_trace", "make_fx, all decomposed"):
        traced = DOORS[door](copy.deepcopy(model), x)
        assert dropped(traced, x) == ["layer"]
        assert rz.convert(traced, x)(x).dtype is torch.bfloat16


# --- places ---


@pytest.mark.parametrize("door", ["core ATen", "all decomposed"])
def test_reports_tell_the_line_that_was_traced(door: str) -> None:
    x = torch.randn(2, 5, 8)
    model = transformer()
    graph, module = rz.audit(DOORS[door](model, x), x), rz.audit(model, x)
    lines = {f"{site.shown.file}:{site.shown.line}" for site in module.plan.converted if site.shown}
    assert {str(site.shown) for site in graph.plan.converted} == lines
    assert {site.text for site in graph.plan.converted} == {site.text for site in module.plan.converted}
    assert (
        str(graph).count("RZ101 converted identity skip, pre-norm: {1,2} (x 2), Layer") == 2
    )  # equal blocks are one entry
    assert "eval_with_key" not in str(graph)


def test_places_of_graphs_whose_tracer_notes_none() -> None:
    x = torch.randn(2, 5, 8)
    report = rz.audit(fx.symbolic_trace(transformer()), x)
    assert all(site.written is None for site in report.plan.sites)
    assert "eval_with_key" in str(report)
    assert "from" not in str(report).split("RZ101")[0]
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    model = transformer()
    noted = rz.audit(fx.GraphModule(model, tracer.trace(model)), x)
    assert all(site.written and site.written.file.endswith("test_graphs.py") for site in noted.plan.converted)
