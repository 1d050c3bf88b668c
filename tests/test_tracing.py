"""`rz.trace`: the recorded capture as a graph that runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from sweep.doors import outcomes
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import rezero_convert as rz

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear layer, and what a test makes of it."""

    def __init__(self, then: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
        self.offset = torch.ones(8)  # no buffer
        self.hidden = [nn.Linear(8, 8)]
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self, x)


def through_numpy(net: Net, x: Tensor) -> Tensor:
    return x + torch.from_numpy(np.tanh(net.fc(x).detach().numpy()))


def without_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.fc(x)
    return y + net.fc(x)


def unregistered(net: Net, x: Tensor) -> Tensor:
    return x + net.hidden[0](x)


@torch.library.custom_op("rezero_tests::double_both", mutates_args={"one", "other"})
def double_both(one: Tensor, other: Tensor) -> None:
    one.mul_(2)
    other.mul_(2)


def several_at_once(net: Net, x: Tensor) -> Tensor:
    one, other = net.fc(x).detach(), net.fc(x).detach()
    double_both(one, other)
    return x + one + other


def with_a_generator(net: Net, x: Tensor) -> Tensor:
    return x + torch.rand(8, generator=torch.Generator().manual_seed(0)) * net.fc(x)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (through_numpy, "no torch call"),
        (without_gradient, "has other gradients than the model"),
        (unregistered, "unregistered Linear is no submodule of Net"),
        (several_at_once, r"test_tracing.py:\d+: .*double_both.* overwrites several tensors"),
        (with_a_generator, r"test_tracing.py:\d+: .*rand.* is given a Generator"),
    ],
)
def test_what_cannot_be_a_graph_that_runs_is_refused(then: Callable[[Net, Tensor], Any], message: str) -> None:
    model = Net(then)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(rz.ConversionError, match=message):
        rz.trace(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def overwriting(net: Net, x: Tensor) -> Tensor:
    y = net.fc(x)
    y[:, 0] = 1.0
    y[1].mul_(3)
    torch.add(y.detach(), 1.0, out=y.detach()[:, :8])
    return x + y.relu_()


def attributes(net: Net, x: Tensor) -> Tensor:
    return x + net.fc(x) ** 2 * net.scale + 2 ** (net.offset * np.float64(0.5))


def branching(net: Net, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    y = x
    for _ in range(x.shape[0]):
        y = y + net.fc(y).T.mT if y.dim() == 2 else y
    return y, {"first": y[0], "again": y}


@pytest.mark.parametrize("then", [overwriting, attributes, branching])
@pytest.mark.parametrize("training", [False, True])
def test_the_graph_computes_what_the_model_does_on_other_inputs(
    then: Callable[[Net, Tensor], Any], training: bool
) -> None:
    model = Net(then).train(training)
    module = rz.trace(model, X, training=training)
    assert isinstance(module, fx.GraphModule)
    assert module.training is training
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=0)
    assert set(module.state_dict()) == set(model.state_dict())
    assert module.get_parameter("fc.weight") is model.fc.weight
    assert set(model._non_persistent_buffers_set) == {"scale"}
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_batch_statistics_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    module = rz.trace(model, x, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert [node.op for node in module.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 160),
        ("test_nfnet", 96),
        ("test_coatnet", 160),
        ("xcit_nano_12_p8_224", 32),
        ("res2net50_14w_8s", 32),
    ],
)
def test_models_of_timm_get_the_gates_of_the_module_route(name: str, size: int) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, size, size)
    module = rz.trace(model, x)
    assert torch.equal(module(x), model(x))
    gates = dict(rz.alphas(rz.convert(model, x, verify=False)))
    assert set(dict(rz.alphas(rz.convert(module, x)))) == set(gates)
    assert torch.equal(rz.convert(module, x, alpha_init="preserve", verify=False)(x), model(x))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "Qwen3MoeForCausalLM"])
def test_models_of_transformers_are_traced(name: str) -> None:
    small: dict[str, dict[str, Any]] = {
        "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 32, "n_head": 2},
        "T5ForConditionalGeneration": {"num_layers": 2, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4},
        "Qwen3MoeForCausalLM": {
            "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        },
    }  # fmt: skip
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=50, **small[name])).eval()
    ids = torch.randint(0, 50, (2, 6))
    given = {"input_ids": ids, **({"decoder_input_ids": ids + 0} if "T5" in name else {})}
    module = rz.trace(model, given)
    found, expected = module(**given), model(**given)
    assert torch.equal(found["logits"], expected.logits)
    gates = dict(rz.alphas(rz.convert(model, given, verify=False)))
    assert set(dict(rz.alphas(rz.convert(module, given)))) == set(gates)


def test_a_pipeline_of_torch_fx_takes_the_graph() -> None:
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(2, 3, 64, 64)
    module = rz.trace(model, x)
    ShapeProp(module).propagate(x)
    result = PassManager(passes=[rz.ReZeroPass()])(module)
    assert result.modified
    assert torch.equal(result.graph_module(x), rz.convert(model, x)(x))


def test_nodes_tell_modules_places_and_shapes() -> None:
    module = rz.trace(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    add = next(node for node in module.graph.nodes if node.name == "add_1")
    path, cls = list(add.meta["nn_module_stack"].values())[-1]
    assert (path, cls.__name__) == ("blocks.0", "Block")
    assert "vision_transformer.py" in add.stack_trace
    assert tuple(add.meta["val"].shape) == (1, 101, 64)
    placeholder = next(iter(module.graph.nodes))
    assert (placeholder.name, tuple(placeholder.meta["val"].shape)) == ("x", (1, 3, 160, 160))


def test_on_the_meta_device_only_the_graph_is_made() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit")
    module = rz.trace(model, torch.randn(1, 3, 160, 160, device="meta"))
    assert module(torch.randn(1, 3, 160, 160, device="meta")).shape == (1, 1000)


def test_it_is_one_of_the_doors() -> None:
    (one,) = outcomes("resnet18", ("rz.trace",))
    assert (one.failures, one.traced, one.gates) == ((), True, 8)
