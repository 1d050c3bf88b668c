"""Graph modules: symbolic_trace, torch.export, make_fx; the same blocks as in the model itself, and the pass."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.graph_drawer import FxGraphDrawer
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module
from zoo import Block, stack

import rezero_convert as rz

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own

Door = Callable[[nn.Module, Tensor], nn.Module]

DOORS: dict[str, Door] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "non-strict export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module(),
    "make_fx": lambda model, x: make_fx(model)(x),
}


class Unread(nn.Module):
    """The sum is where the branch was: nobody reads what `add_` returns."""

    def __init__(self, width: int, active: bool) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x)
        out.add_(x)
        return F.gelu(out) if self.active else out


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Layer(nn.Module):
    """Pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Basic(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(width, out, 1) if out != width else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += skip
        return self.relu(out)


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), Layer(16), Layer(16), nn.LayerNorm(16))


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Basic(8, 8), Basic(8, 16), Basic(16, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "transformer": (transformer, lambda: torch.randn(2, 5, 8)),
    "resnet": (resnet, lambda: torch.randn(2, 3, 8, 8)),
}


def made(model: str, door: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, inputs = MODELS[model]
    original, x = make().eval(), inputs()
    return original, DOORS[door](copy.deepcopy(original), x), x


def names(model: nn.Module) -> list[str]:
    return sorted(name for name, _ in rz.alphas(model))


def randomise(*models: nn.Module) -> None:
    """The same random gates, by their names."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names(models[0]):
            value = torch.rand((), generator=generator) + 0.5
            for model in models:
                dict(rz.alphas(model))[name].fill_(float(value))


# --- what is refused ---


def test_a_pass_takes_graph_modules_only() -> None:
    with pytest.raises(rz.ConversionError, match="takes a GraphModule, got a Sequential"):
        rz.ReZeroPass()(transformer())  # type: ignore[arg-type]


def test_a_broken_graph_is_refused() -> None:
    traced = fx.symbolic_trace(transformer())
    traced.delete_submodule("0")
    with pytest.raises(rz.ConversionError, match="is broken"):
        rz.ReZeroPass(torch.randn(2, 5, 8))(traced)


def test_an_exported_program_is_refused_with_what_to_pass() -> None:
    program = torch.export.export(transformer(), (torch.randn(2, 5, 8),))
    for verb in (rz.audit, rz.convert):
        with pytest.raises(rz.ConversionError, match=r"ExportedProgram: pass the graph module that its \.module\(\)"):
            verb(program)


def test_the_pass_fails_where_a_gate_is_read_by_no_node() -> None:
    traced = rz.convert(fx.symbolic_trace(transformer()), torch.randn(2, 5, 8))
    assert isinstance(traced, fx.GraphModule)
    rz.ReZeroPass().ensures(traced)
    for node in list(traced.graph.nodes):
        if node.op == "get_attr" and "alpha" in str(node.target):
            (product,) = node.users
            product.replace_all_uses_with(product.args[1])
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with pytest.raises(rz.ConversionError, match=r"no node of the graph reads the gate 1\.alpha_attn"):
        rz.ReZeroPass().ensures(traced)


# --- every door ---


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("model", MODELS)
def test_preserve_is_bit_identical(model: str, door: str) -> None:
    _, traced, x = made(model, door)
    expected = traced(x)
    converted = rz.convert(traced, x, alpha_init="preserve", verify=False)
    assert len(names(converted)) == {"transformer": 4, "resnet": 3}[model]
    assert torch.equal(converted(x), expected)
    randomise(converted)
    assert not torch.allclose(converted(x), expected)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("model", MODELS)
def test_the_conversion_holds_and_the_given_graph_stays(model: str, door: str) -> None:
    _, traced, x = made(model, door)
    assert isinstance(traced, fx.GraphModule)
    code, keys = traced.code, list(traced.state_dict())
    converted = rz.convert(traced, x)
    assert isinstance(converted, fx.GraphModule)
    assert (traced.code, list(traced.state_dict())) == (code, keys)
    converted.graph.lint()
    assert rz.validate(converted, x).ok
    assert not any(site.verdict == "converted" for site in rz.audit(converted, x).plan.sites)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "make_fx"])
@pytest.mark.parametrize("model", MODELS)
def test_it_agrees_with_the_module_route(model: str, door: str) -> None:
    original, traced, x = made(model, door)
    module, graph = rz.convert(original, x), rz.convert(traced, x)
    assert names(graph) == names(module)
    assert set(graph.state_dict()) == set(module.state_dict())
    randomise(module, graph)
    gradients = []
    for one in (module, graph):
        out = one(x)
        out.square().sum().backward()
        gradients.append((out.detach(), {name: p.grad for name, p in one.named_parameters()}))
    (out, ours), (again, theirs) = gradients
    torch.testing.assert_close(again, out)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_make_fx_agrees_with_the_module_route_in_all_but_names(model: str) -> None:
    original, traced, x = made(model, "make_fx")
    module, graph = rz.convert(original, x), rz.convert(traced, x)
    agree_in_order(module, graph)
    torch.testing.assert_close(graph(x), module(x))


class Arms(nn.Module):
    """Two adds in the text, of which an instance runs one."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))
        self.proj = nn.Linear(width, out) if out != width else None

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is not None:
            return self.proj(x) + self.f(x)
        return x + self.f(x)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8, 16, 16)])
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_names_where_the_text_holds_more_adds_than_an_instance_runs(door: str, widths: tuple[int, ...]) -> None:
    model, x = nn.Sequential(*map(Arms, widths, widths[1:])), torch.randn(2, widths[0])
    traced = DOORS[door](copy.deepcopy(model), x)
    assert names(rz.convert(traced, x)) == names(rz.convert(model, x)) == ["0.alpha_f", "1.alpha_f"]


def agree_in_order(module: nn.Module, graph: nn.Module) -> None:
    """The same random gates, in order."""
    ours, theirs = list(rz.alphas(module)), list(rz.alphas(graph))
    with torch.no_grad():
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            one.uniform_(0.5, 1.5)
            other.copy_(one)


@pytest.mark.parametrize("model", MODELS)
def test_graphs_of_torch_compile_backends(model: str) -> None:
    original, _, x = made(model, "symbolic_trace")
    module = rz.convert(original, x)
    found: list[nn.Module] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        converted = rz.convert(graph, tuple(inputs))
        agree_in_order(module, converted)
        found.append(converted)
        return converted.forward

    torch._dynamo.reset()
    compiled = torch.compile(original, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    (converted,) = found
    assert isinstance(converted, fx.GraphModule)
    alphas = names(converted)
    assert len(alphas) == {"transformer": 4, "resnet": 3}[model]
    assert all(hasattr(converted, name) for name in alphas)  # the parameters are inputs: no module could hold them


@pytest.mark.parametrize("grad", [True, False])
def test_graphs_of_aot_autograd_are_refused(grad: bool) -> None:
    from torch._dynamo.backends.common import aot_autograd

    told: list[str] = []

    def compiler(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        assert rz.audit(graph, tuple(inputs)).plan.converted
        with pytest.raises(rz.ConversionError) as error:
            rz.convert(graph, tuple(inputs))
        told.append(str(error.value))
        return graph.forward

    def forward_only(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return graph.forward

    model, x = transformer(), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler, bw_compiler=forward_only))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x))
    assert len(told) == 1
    assert "convert the model, or the graph that torch.compile gives its backend" in told[0]


def test_an_input_that_is_no_weight_is_not_taken_for_one() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
            return x + F.linear(F.relu(other), weight)

    traced = fx.symbolic_trace(Mixed())
    (site,) = rz.audit(traced, (torch.randn(2, 8), torch.randn(2, 8), torch.randn(8, 8))).plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ901")


@pytest.mark.parametrize("door", [door for door in DOORS if door != "make_fx"])
def test_the_bias_of_a_dropped_batch_norm_stays(door: str) -> None:
    original, traced, x = made("resnet", door)
    module, graph = (rz.convert(one, x, drop_norm=("layer", "batch")) for one in (original, traced))
    assert set(graph.state_dict()) == set(module.state_dict())
    assert "1.conv1.bias" in graph.state_dict()
    agree_in_order(module, graph)
    with torch.no_grad():
        for one in (module, graph):
            one.get_parameter("1.conv1.bias").fill_(0.5)
    torch.testing.assert_close(graph(x), module(x))
    with pytest.warns(UserWarning, match="6 dropped norms were made anew"):
        back = rz.unconvert(graph)
    assert isinstance(traced, fx.GraphModule)
    assert isinstance(back, fx.GraphModule)
    assert back.code == traced.code


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.linear(x), 0.5, self.training)


class EndNorm(nn.Module):
    """Of a stream that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(F.relu(self.linear(x)))


class Transposed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x.transpose(1, 2)))


@pytest.mark.parametrize("make", [EndNorm, lambda: Layer(8)])
@pytest.mark.parametrize("door", DOORS)
def test_the_head_norm_stays_and_strides_do_not_matter(door: str, make: Callable[[], nn.Module]) -> None:
    model, x = Transposed(make()).eval(), torch.randn(2, 8, 5)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(nn.Sequential(model), x), rz.convert(traced, x)
    agree_in_order(module, graph)
    torch.testing.assert_close(graph(x), module(x))


def test_partitions_of_split_module() -> None:
    model = transformer().eval()
    traced, x = fx.symbolic_trace(model), torch.randn(2, 5, 8)
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    parts = split_module(traced, model, lambda node: int(order[node] > 13))  # between a norm and the add of its block
    module, graph = rz.convert(model, x), rz.convert(parts, x)
    assert [name.partition(".")[0] for name in names(graph)] == ["submod_0"] + 3 * ["submod_1"]
    agree_in_order(module, graph)
    torch.testing.assert_close(graph(x), module(x))


def test_hooks_buffers_and_tied_parameters_are_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.block = Basic(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.block(self.embedding(ids).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    ids, calls = torch.randint(11, (2, 3, 3)), list[str]()
    traced = fx.symbolic_trace(Tied())
    traced(ids)
    traced.register_forward_pre_hook(lambda *_: calls.append("before"))
    traced.register_forward_hook(lambda *_: calls.append("after"))
    converted = rz.convert(traced, ids)
    assert converted.get_parameter("head.weight") is converted.get_parameter("embedding.weight")
    assert [*dict(converted.named_buffers())] == [*dict(traced.named_buffers())]
    for name, buffer in traced.named_buffers():
        assert torch.equal(converted.get_buffer(name), buffer)
    calls.clear()
    converted(ids)
    assert calls == ["before", "after"]


def test_pytrees_and_keywords_of_exported_programs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8)

        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> dict[str, object]:
            return {"out": self.block(x) * more["scale"], "all": (x, [more["scale"]])}

    inputs = {"x": torch.randn(2, 8), "more": {"scale": torch.randn(2, 8)}}
    exported = torch.export.export(Nested(), (), inputs).module()
    for given in (inputs, None):
        converted = rz.convert(exported, given)
        assert names(converted) == ["block.alpha"]
        result = converted(**inputs)
        assert list(result) == ["out", "all"]
        assert isinstance(result["all"], tuple)
        assert torch.equal(result["all"][1][0], inputs["more"]["scale"])


@fx.wrap
def joined(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return joined(x, F.relu(self.linear(x)))


def test_wrapped_functions_that_add() -> None:
    traced, x = fx.symbolic_trace(Joining()), torch.randn(2, 8)
    converted = rz.convert(traced, x)
    assert names(converted) == names(rz.convert(Joining(), x)) == ["alpha"]
    assert torch.equal(converted(x), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao's own
def test_torch_ao_prepared_graphs() -> None:
    quantize = pytest.importorskip("torch.ao.quantization")
    prepare = pytest.importorskip("torch.ao.quantization.quantize_fx").prepare_fx
    model, x = resnet().eval(), torch.randn(2, 3, 8, 8)
    prepared = prepare(model, quantize.get_default_qconfig_mapping("x86"), (x,))
    assert names(rz.convert(prepared, x)) == ["1.alpha", "2.alpha", "3.alpha"]


def test_feature_extractors_of_torchvision() -> None:
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(resnet18().eval(), {"layer1": "one", "layer2.0": "two"})
    x = torch.randn(1, 3, 32, 32)
    converted = rz.convert(extractor, x, alpha_init="preserve")
    assert len(names(converted)) == 3
    expected, found = extractor(x), converted(x)
    assert list(found) == ["one", "two"]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_baked_in_training_flags_are_told(door: str, training: bool) -> None:
    model, x = Dropping().train(training), torch.randn(2, 8)
    assert rz.audit(model, x).plan.notes == ()
    (note,) = rz.audit(DOORS[door](model, x), x).plan.notes
    assert note == f"dropout at dropout has training={training} baked in: train() and eval() do not change it"


@pytest.mark.parametrize("door", ["symbolic_trace", "export", "make_fx"])
def test_unconvert_gives_the_graph_back(door: str) -> None:
    _, traced, x = made("resnet", door)
    converted = rz.convert(traced, x, alpha_init="preserve")
    back = rz.unconvert(converted)
    assert isinstance(back, fx.GraphModule)
    assert isinstance(traced, fx.GraphModule)
    assert back.code == traced.code
    assert list(back.state_dict()) == list(traced.state_dict())


def test_copies_and_pickles_keep_the_record() -> None:
    _, traced, x = made("transformer", "symbolic_trace")
    converted = rz.convert(traced, x)
    randomise(converted)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert names(again) == names(converted)
        assert torch.equal(again(x), converted(x))
        assert len(rz.audit(again).plan.converted) == 4


def test_a_graph_without_inputs_is_traced_or_run_on_noted_shapes() -> None:
    _, traced, x = made("transformer", "symbolic_trace")
    assert rz.audit(traced).plan.route == "symbolic"
    assert len(names(rz.convert(traced))) == 4
    ShapeProp(traced).propagate(x)
    assert rz.audit(traced).plan.route.startswith("recorded")
    _, exported, _ = made("transformer", "export")
    assert rz.audit(exported).plan.route.startswith("recorded")


def test_a_graph_module_inside_a_model_and_a_model_inside_a_graph() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = fx.symbolic_trace(nn.Sequential(Layer(8), Layer(8)))
            self.block = Block(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.backbone(x))

    x = torch.randn(2, 5, 8)
    converted = rz.convert(Outer(), x)
    assert names(converted) == [
        *(f"backbone.{i}.alpha_{part}" for i in (0, 1) for part in ("attn", "mlp")),
        "block.alpha",
    ]
    assert torch.equal(converted.eval()(x), x)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Layer) or super().is_leaf_module(m, module_qualified_name)

    model = transformer()
    leafy = fx.GraphModule(model, Leaves().trace(model))
    converted = rz.convert(leafy, x)
    assert names(converted) == names(rz.convert(model, x))
    assert rz.validate(converted, x).ok


# --- the pass ---


def test_it_composes_with_other_passes() -> None:
    _, traced, x = made("resnet", "symbolic_trace")
    assert isinstance(traced, fx.GraphModule)

    class Shapes(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            ShapeProp(graph_module).propagate(x)
            return PassResult(graph_module, False)

    with warnings.catch_warnings():  # torch's own, at import
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse

    class Fuse(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return PassResult(fuse(graph_module), True)

    manager = PassManager([Shapes(), rz.ReZeroPass(alpha_init=0.5), Fuse()])
    result = manager(traced)
    assert result.modified
    expected = rz.convert(traced, x, alpha_init=0.5, verify=False).eval()(x)
    torch.testing.assert_close(result.graph_module(x), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.graph_module.modules())


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_torchs_drawer_draws_the_gates(door: str) -> None:
    _, traced, x = made("transformer", door)
    converted = rz.convert(traced, x)
    assert isinstance(converted, fx.GraphModule)
    drawn = FxGraphDrawer(converted, "converted").get_dot_graph().to_string()
    assert [name for name in names(converted) if name.replace(".", "_") in drawn or name in drawn] == names(converted)
    assert len(names(converted)) == 4


def test_modified_and_inplace() -> None:
    _, traced, x = made("transformer", "symbolic_trace")
    assert isinstance(traced, fx.GraphModule)
    first = rz.ReZeroPass(x)(traced)
    assert first.modified
    assert first.graph_module is not traced
    assert not rz.ReZeroPass(x)(first.graph_module).modified
    assert rz.ReZeroPass(x, inplace=True)(traced).graph_module is traced
    assert len(names(traced)) == 4


def test_annotating_changes_nothing_else() -> None:
    _, traced, x = made("transformer", "symbolic_trace")
    assert isinstance(traced, fx.GraphModule)
    code = traced.code
    result = rz.ReZeroPass(x, annotate_only=True)(traced)
    assert not result.modified
    assert traced.code == code
    found = [node.meta["rezero"] for node in traced.graph.nodes if "rezero" in node.meta]
    assert [(one["verdict"], one["path"], one["alphas"]) for one in found] == [
        ("converted", path, (alpha,)) for path in ("1", "2") for alpha in ("alpha_attn", "alpha_mlp")
    ]


def test_metadata_is_kept_and_set_on_new_nodes() -> None:
    _, exported, x = made("transformer", "export")
    converted = rz.convert(exported, x)
    assert isinstance(converted, fx.GraphModule)
    products = [node for node in converted.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 4
    for node in products:
        assert node.meta["val"].shape == (2, 5, 16)
        assert node.meta["nn_module_stack"]
        assert node.stack_trace
    assert sum("layer_norm" in str(node.target) for node in converted.graph.nodes) == 1  # the head's


# --- graphs that are hard ---


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.block = Block(8)


class CalledTwice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class TwoOnALine(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return (y := x + self.a(x)) + self.b(y)


class InPlace(Chain):
    def forward(self, x: Tensor) -> Tensor:
        branch = self.a(x)
        return x.clone().add_(branch)


class WithItself(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + x)


class Dead(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x + self.a(x)
        return self.block(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (CalledTwice, ["block.alpha"]),
        (TwoOnALine, ["alpha_a", "alpha_b"]),
        (InPlace, ["alpha"]),
        (WithItself, ["block.alpha"]),
        (Dead, ["block.alpha"]),
    ],
)
@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
def test_hard_graphs(cls: type[Chain], expected: list[str], door: str) -> None:
    torch.manual_seed(0)
    model, x = cls(), torch.randn(2, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(model, x, verify=False), rz.convert(traced, x)
    assert names(graph) == names(module)
    assert set(expected) <= set(names(graph))
    assert rz.validate(graph, x).ok
    randomise(module, graph)
    torch.testing.assert_close(graph(x), module(x))


class Autocast(Chain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            branch = self.a(x)
        return self.block(x + branch)


@pytest.mark.parametrize("door", ["export", "non-strict export", "make_fx"])
def test_autocast_inside_the_graph(door: str) -> None:
    torch.manual_seed(0)
    model, x = Autocast(), torch.randn(2, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(model, x), rz.convert(traced, x)
    agree_in_order(module, graph)
    out = graph(x)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, module(x), rtol=1e-2, atol=1e-2)
    kept = rz.convert(traced, x, alpha_init="preserve", verify=False)
    assert torch.equal(kept(x), traced(x))


class BackToBack(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        return self.block(self.block(x))


@pytest.mark.parametrize("door", DOORS)
def test_back_to_back_blocks_with_one_shared(door: str) -> None:
    torch.manual_seed(0)
    model, x = BackToBack(), torch.randn(2, 8)
    traced = DOORS[door](copy.deepcopy(model), x)
    module, graph = rz.convert(model, x), rz.convert(traced, x)
    if door == "make_fx":  # knows no modules: a gate for each call
        assert len(names(graph)) == 4
        return
    assert names(graph) == names(module) == ["alpha_a", "alpha_b", "block.alpha"]
    randomise(module, graph)
    torch.testing.assert_close(graph(x), module(x))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor)
        return x + F.batch_norm(self.conv(x), self.mean, self.variance, training=self.training)


@pytest.mark.parametrize("training", [True, False])
def test_baked_in_flags_of_functional_batch_norms_are_told(training: bool) -> None:
    model, x = Normalized().train(training), torch.randn(2, 8, 4, 4)
    (note,) = rz.audit(fx.symbolic_trace(model), x).plan.notes
    assert note == f"batch_norm at batch_norm has training={training} baked in: train() and eval() do not change it"


def test_half_precision_streams_keep_their_dtype() -> None:
    model = transformer().to(torch.bfloat16)
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    converted = rz.convert(torch.export.export(model, (x,)).module(), x)
    assert converted(x).dtype is torch.bfloat16
    assert {alpha.dtype for _, alpha in rz.alphas(converted)} == {torch.bfloat16}


@pytest.mark.slow
def test_a_graph_of_a_hundred_thousand_nodes_takes_four_times_that_of_a_quarter() -> None:
    seconds = []
    rz.audit(fx.symbolic_trace(stack(depth=10, width=2)), torch.randn(1, 8))  # imports
    for blocks in (8_400, 16_700, 33_400):
        traced = fx.symbolic_trace(stack(depth=blocks, width=2))
        start = time.process_time()
        report = rz.audit(traced, torch.randn(1, 8))
        seconds.append(time.process_time() - start)
        print(f"{len(traced.graph.nodes)} nodes: {seconds[-1]:.0f} s")
        assert len(report.plan.converted) == blocks
    assert len(traced.graph.nodes) > 100_000
    assert seconds[-1] < 6 * seconds[0]


def test_the_time_is_proportional_to_the_nodes() -> None:
    def seconds(blocks: int) -> float:
        traced = fx.symbolic_trace(stack(depth=blocks, width=2))
        start = time.process_time()
        assert len(rz.audit(traced, torch.randn(1, 8)).plan.converted) == blocks
        return time.process_time() - start

    seconds(10)  # imports
    assert min(seconds(400) for _ in range(3)) < 8 * min(seconds(100) for _ in range(3))


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("door", ["symbolic_trace", "decomposed", "make_fx"])
def test_a_sum_made_in_place_is_read_where_the_branch_was(door: str, active: bool) -> None:
    model, x = nn.Sequential(Unread(4, active), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    live = rz.convert(model, x)
    graph = rz.convert(DOORS[door](model, x), x)
    for one in (live, graph):
        (alpha,) = (value for _, value in rz.alphas(one))
        nn.init.constant_(alpha, 0.5)
    torch.testing.assert_close(graph(x), live(x))


class InALoop(nn.Module):
    """Adds in its own loops, as fully connected nets are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(12))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return x


class InLoopsOfLoops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(depth)) for depth in (2, 1, 3))
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            for layer in stage:
                x = x + torch.relu(layer(x))
        return x + torch.tanh(self.last(x))


class OneByOne(nn.Module):
    """The same modules without a loop: nothing in the text is a list of gates."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.relu(self.layers[0](x))
        return x + torch.tanh(self.layers[1](x))


@pytest.mark.parametrize("door", ["symbolic_trace", "export"])
@pytest.mark.parametrize("cls", [InALoop, InLoopsOfLoops])
def test_unrolled_loops_have_lists_of_gates_again(cls: type[nn.Module], door: str) -> None:
    model, x = cls().eval(), torch.randn(2, 8)
    module, traced = rz.convert(model, x), DOORS[door](model, x)
    graph = rz.convert(traced, x)
    assert {name for name, _ in rz.alphas(graph)} == {name for name, _ in rz.alphas(module)}
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    graph.load_state_dict(state)
    expected = module(x).detach()
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    copied = copy.deepcopy(graph)
    assert torch.equal(copied(x), graph(x))
    assert [name for name, _ in rz.alphas(copied)] == [name for name, _ in rz.alphas(graph)]
    back = rz.unconvert(rz.convert(traced, x, alpha_init="preserve"))
    assert torch.equal(back(x), traced(x))
    assert list(back.state_dict()) == list(traced.state_dict())


def test_pickles_keep_lists_of_gates() -> None:
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    graph, x = fx.Graph(), torch.ones(2, 8)
    value = graph.placeholder("x")
    for number in range(3):
        value = graph.call_function(torch.add, (value, graph.call_module(f"layers.{number}", (value,))))
    graph.output(value)
    model = rz.convert(fx.GraphModule({f"layers.{n}": one for n, one in enumerate(layers)}, graph), x)
    again = pickle.loads(pickle.dumps(model))
    assert [name for name, _ in rz.alphas(again)] == ["alpha.0", "alpha.1", "alpha.2"]
    assert torch.equal(again(x), x)


def test_what_is_written_one_by_one_gets_no_list() -> None:
    model, x = OneByOne().eval(), torch.randn(2, 8)
    names = {name for name, _ in rz.alphas(rz.convert(model, x))}
    assert names == {name for name, _ in rz.alphas(rz.convert(torch.export.export(model, (x,)).module(), x))}
    assert not any("." in name for name in names)


def test_a_list_of_gates_that_cannot_be_finished_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, x = fx.symbolic_trace(InALoop()), torch.randn(2, 8)
    traced.alpha = nn.Identity()  # its name
    assert "rezero_alpha.11" in dict(rz.alphas(rz.convert(traced, x)))
    before, keys = traced(x), list(traced.state_dict())
    append = nn.ParameterList.append

    def full(self: nn.ParameterList, value: Tensor) -> nn.ParameterList:
        if len(self) == 3:
            raise MemoryError("no more")
        return append(self, value)

    monkeypatch.setattr(nn.ParameterList, "append", full)
    with pytest.raises(MemoryError):
        rz.convert(traced, x, inplace=True)
    assert list(traced.state_dict()) == keys
    assert torch.equal(traced(x), before)


class Pooled(nn.Module):
    """What reads a part of a dropped norm's output reads that part of the sum."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.functional = nn.Linear(8, 8), nn.LayerNorm(8), functional

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.relu(self.fc(x))
        x = torch.nn.functional.layer_norm(x, (8,)) if self.functional else self.norm(x)
        return x[0], x[:, :1]


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_parts_of_a_dropped_norms_output_stay_parts(door: str, functional: bool) -> None:
    model, x = Pooled(functional).eval(), torch.randn(2, 5, 8)
    graph = rz.convert(DOORS[door](model, x), x)
    first, column = graph(x)
    assert torch.equal(first, x[0])
    assert torch.equal(column, x[:, :1])


class AttentionBeforeANorm(nn.Module):
    """A norm written out behind what is one of two results of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.weight = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(x, x, x)[0]
        return x + self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_written_out_norm_of_one_of_several_results() -> None:
    model, x = AttentionBeforeANorm().eval(), torch.randn(2, 5, 8)
    graph = rz.convert(fx.symbolic_trace(model), x)
    with torch.no_grad():
        dict(rz.alphas(graph))["alpha"].fill_(0.5)
    assert torch.allclose(graph(x), x + 0.5 * model.attn(x, x, x)[0], atol=1e-6)
