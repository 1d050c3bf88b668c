"""The live captures: what they refuse, what they record, and that they leave the model alone."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
import weakref
from collections import Counter
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from rezero_convert import sources
from rezero_convert.capture import capture, infer_inputs, normalize_inputs, resolve_inputs
from rezero_convert.capture.recorded import RUNGS, record, record_on, replay
from rezero_convert.capture.symbolic import trace_symbolically
from rezero_convert.capture.trace import Trace, origin
from rezero_convert.errors import ConversionError


def adds(trace: Trace) -> list[fx.Node]:
    return [node for node in trace.graph.nodes if origin(node).facts.type == "add" and len(node.all_input_nodes) > 1]


def texts(trace: Trace) -> Counter[str]:
    """The source text of every add, innermost frame."""
    return Counter(sources.segment(origin(node).frames[0].span) for node in adds(trace))


def owners(trace: Trace) -> list[str | None]:
    return [origin(node).frames[-1].owner for node in adds(trace)]


def named(trace: Trace, kind: str) -> list[fx.Node]:
    return [node for node in trace.graph.nodes if origin(node).facts.type == kind]


class Net(nn.Module):
    """A base whose `forward` subclasses define."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)


# Refusals


class Raises(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lin(x)
        self.extra = x
        raise ValueError("no\nway")


class Doubling(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(x)


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.lin(x)
        return x - self.lin(x)


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(ConversionError, match=r"must be a torch.nn.Module, got a dict"):
        capture({}, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match=r"the class Doubling: pass an instance"):
        capture(Doubling, torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_refuses_wrapped_models() -> None:
    model = Doubling()
    scripted = torch.jit.trace(model, torch.zeros(2, 4))
    with pytest.raises(ConversionError, match="before scripting"):
        capture(scripted, torch.zeros(2, 4))
    with pytest.raises(ConversionError, match=r"convert model\._orig_mod"):
        capture(torch.compile(model), torch.zeros(2, 4))
    with pytest.raises(ConversionError, match=r"DataParallel: convert model\.module"):
        capture(nn.DataParallel(model), torch.zeros(2, 4))


@pytest.mark.filterwarnings("ignore")
def test_refuses_lazy_parameters() -> None:
    with pytest.raises(ConversionError, match=r"lazy parameter 1\.weight is not initialized: run a forward first"):
        capture(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), torch.zeros(2, 4))


def test_refuses_inputs_of_another_form() -> None:
    with pytest.raises(ConversionError, match="got list"):
        capture(Doubling(), [torch.zeros(2, 4)])


def test_reports_the_error_of_the_real_run_on_one_line() -> None:
    with pytest.raises(ConversionError) as caught:
        capture(Doubling(), torch.zeros(2, 5))
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x5 and 4x4)" in str(caught.value)
    with pytest.raises(ConversionError) as caught:
        capture(Raises(), torch.zeros(2, 4))
    assert str(caught.value) == "the model raised on the example inputs: ValueError: no way"


class Hopeless(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise ValueError
        raise NotImplementedError


def test_says_what_to_pass_when_tracing_and_reading_fail() -> None:
    with pytest.raises(ConversionError, match=r"TraceError: .*control flow.*; Hopeless.forward raises.*; pass "):
        capture(Hopeless())


def test_says_that_columns_are_missing() -> None:
    code = (
        "import torch; from torch import nn; from rezero_convert.capture import capture\n"
        "class N(nn.Module):\n    def forward(self, x): return x + x.sin()\n"
        "try: capture(N(), torch.zeros(2))\nexcept Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONNODEBUGRANGES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConversionError <string>:3: ")
    assert "PYTHONNODEBUGRANGES" in done.stdout


# Inputs


def test_normalized_inputs() -> None:
    x = torch.zeros(1)
    assert normalize_inputs(x) == ((x,), {})
    assert normalize_inputs((x, 2)) == ((x, 2), {})
    assert normalize_inputs({"x": x}) == ((), {"x": x})


def test_inferred_inputs() -> None:
    assert infer_inputs(Doubling()) is None
    with pytest.raises(ConversionError, match="Doubling does not describe its inputs; pass example_inputs="):
        resolve_inputs(Doubling(), None)
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, intermediate_size=8)
    vit = ViTModel(config)
    state = torch.get_rng_state()
    inferred = infer_inputs(vit)
    assert inferred is not None
    assert inferred[1]["pixel_values"].shape == (2, 3, 32, 32)
    assert torch.equal(torch.get_rng_state(), state)
    t5 = T5Model(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=6))
    inferred = infer_inputs(t5)
    assert inferred is not None
    assert set(inferred[1]) >= {"input_ids", "decoder_input_ids"}
    assert int(inferred[1]["input_ids"].max()) < 6
    timm_model = timm.create_model("resnet18", in_chans=1)
    inferred = infer_inputs(timm_model)
    assert inferred is not None
    assert inferred[0][0].shape == (2, 1, 224, 224)


# Real models: counts by configuration, spans by text


def check_real(trace: Trace, route: str, expected: dict[str, int]) -> None:
    trace.graph.lint()
    assert trace.route == route
    found = texts(trace)
    for text, count in expected.items():
        assert found[text] == count, found
    assert all("origin" in node.meta for node in trace.graph.nodes)


@pytest.mark.parametrize("rung", RUNGS)
def test_resnet18(rung: Any) -> None:
    trace = record_on(rung, torchvision.models.resnet18(), (torch.randn(2, 3, 64, 64),), {})
    check_real(trace, f"recorded ({rung} tensors)", {"out += identity": 8})
    assert owners(trace) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert all(origin(node).facts.inplace for node in adds(trace))
    assert origin(adds(trace)[-1]).shape == (2, 512, 2, 2)
    assert adds(trace)[0].args[1].target == "maxpool"  # type: ignore[union-attr]


def test_timm_vit() -> None:
    trace = capture(timm.create_model("vit_tiny_patch16_224"))
    check_real(trace, "recorded (fake tensors)", {"x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))": 12})
    assert sum("drop_path1" in text for text in texts(trace)) == 1
    assert len(adds(trace)) == 25
    assert trace.scalars == 0


def test_gpt2() -> None:
    trace = capture(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=16)))
    expected = {"attn_output + residual": 2, "residual + feed_forward_hidden_states": 2}
    check_real(trace, "recorded (fake tensors)", expected)
    blocks = [owner for owner in owners(trace) if owner and owner.endswith(("h.0", "h.1"))]
    assert blocks == ["transformer.h.0", "transformer.h.0", "transformer.h.1", "transformer.h.1"]
    assert trace.scalars == 3  # 1 + tanh in two layers, arange + 0


def test_llama() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16, pad_token_id=0
    )
    trace = capture(LlamaModel(config), {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    expected = {"residual + hidden_states": 4, "(q * cos) + (rotate_half(q) * sin)": 2}
    check_real(trace, "recorded (fake tensors)", expected)
    rotary = next(node for node in adds(trace) if "rotate_half" in sources.segment(origin(node).frames[0].span))
    inner, outer = origin(rotary).frames
    assert (inner.place.qualname, inner.owner) == ("apply_rotary_pos_emb", None)
    assert (outer.place.qualname, outer.owner) == ("LlamaAttention.forward", "layers.0.self_attn")
    layer = next(call for call in trace.calls if call.path == "layers.1")
    assert layer.frames[0].place.qualname == "LlamaModel.forward"
    assert layer.frames[0].owner == ""


def test_bert() -> None:
    config = BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    trace = capture(BertModel(config))
    check_real(trace, "recorded (fake tensors)", {"hidden_states + input_tensor": 4})
    output = next(call for call in trace.calls if call.path == "encoder.layer.0.attention.output")
    assert len(output.inputs) == 2
    assert output.frames[0].place.qualname == "BertAttention.forward"
    assert output.parent is not None
    assert output.parent.path == "encoder.layer.0.attention"


def test_transformer_layers_are_inlined() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    trace = capture(layer, torch.randn(2, 3, 8))
    assert owners(trace) == ["", ""]
    assert [node.target for node in named(trace, "MultiheadAttention")] == ["self_attn"]
    assert origin(adds(trace)[0]).frames[0].place.qualname == "TransformerEncoderLayer.forward"
    assert owners(capture(nn.Sequential(layer), torch.randn(2, 3, 8))) == ["0", "0"]


# Values: in-place forms, passthrough, tuples, parameters


class Forms(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.ones(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.plain = torch.ones(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.drop(x).to(x.dtype).contiguous()  # all the same tensor in eval mode
        b = self.act(a * self.scale + self.table)
        b += self.plain
        c = b.view(-1)
        c.mul_(2)
        q, k = b.chunk(2, dim=-1)
        q[:, 0] = k[:, 1]
        d = torch.empty_like(q)
        torch.add(q, k, out=d)
        return d


@pytest.mark.parametrize("rung", RUNGS)
def test_values_flow_by_identity(rung: Any) -> None:
    trace = record_on(rung, Forms(), (torch.randn(2, 4),), {})
    trace.graph.lint()
    assert not named(trace, "Dropout")
    assert not named(trace, "to")
    (mul, mul_) = named(trace, "mul")
    assert mul.args[0].op == "placeholder"  # type: ignore[union-attr]
    assert mul.args[1].target == "scale"  # type: ignore[union-attr]
    assert not origin(mul).facts.inplace
    first, second, last = adds(trace)
    (act,) = named(trace, "ReLU")
    assert act.args == (first,)
    assert origin(act).facts.inplace
    assert second.args[0] is act
    assert origin(second).facts.inplace
    assert not origin(first).facts.inplace
    merged = next(node for node in named(trace, "setitem") if node.args[1] is mul_)
    assert merged.args[0] is second
    (chunk,) = named(trace, "chunk")
    assert chunk.args[0] is merged
    written = next(node for node in named(trace, "setitem") if node.target == "__setitem__")
    assert last.args[0] is written
    (output,) = [node for node in trace.graph.nodes if node.op == "output"]
    assert output.args == (last,)
    attributes = [node.target for node in trace.graph.nodes if node.op == "get_attr"]
    assert attributes == ["scale", "table", "plain"]
    assert origin(last).shape == (2, 2)
    assert origin(last).dtype is torch.float32


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, batch: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        x, y = batch["both"]
        out, (h, _) = self.rnn(x)
        return {"sum": out + y, "h": h.mT}


def test_nested_inputs_and_outputs() -> None:
    trace = capture(Nested(), ({"both": [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]},))
    trace.graph.lint()
    assert trace.route == "recorded (fake tensors)"
    assert len(trace.root.inputs) == 2
    assert [node.op for node in trace.root.inputs] == ["placeholder"] * 2
    (add,) = adds(trace)
    assert trace.root.outputs[0] is add
    assert origin(add.args[0]).shape == (2, 3, 4)  # type: ignore[arg-type]
    assert named(trace, "mT")
    (lstm,) = named(trace, "LSTM")
    assert lstm.op == "call_module"
    assert origin(lstm).facts.kind == "recurrent"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.same: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight is not self.b.weight or not isinstance(self.a.weight, nn.Parameter):
            raise ValueError("not tied")
        return x @ self.b.weight


@pytest.mark.parametrize("rung", RUNGS)
def test_tied_parameters_stay_tied(rung: Any) -> None:
    trace = record_on(rung, Tied(), (torch.randn(2, 4),), {})
    assert [node.target for node in trace.graph.nodes if node.op == "get_attr"] == ["a.weight"]


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.lin(y)


@pytest.mark.parametrize("rung", RUNGS)
def test_one_tensor_given_twice_is_one_value(rung: Any) -> None:
    x = torch.randn(2, 4)
    trace = record_on(rung, TwoInputs(), (x, x), {})
    assert [node.name for node in trace.graph.nodes if node.op == "placeholder"] == ["x"]
    assert trace.root.inputs[0] is trace.root.inputs[1]


def test_falls_back_to_real_tensors() -> None:
    trace = capture(Branching(), torch.ones(2, 4))
    assert trace.route == "recorded (real tensors)"
    assert len(adds(trace)) + len(named(trace, "sub")) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_on_meta(device: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    trace = capture(model, torch.zeros(2, 3, 64, 64, device=device))
    assert trace.route == "recorded (fake tensors)"
    assert len(adds(trace)) == 8
    assert all(parameter.is_meta for parameter in model.parameters())


class Watching(Net):
    alive: list[int]

    def forward(self, x: Tensor) -> Tensor:
        refs = []
        for _ in range(4):
            x = x + self.lin(x)
            refs.append(weakref.ref(x))
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in refs))
        return x


def test_activations_are_not_kept_on_real_tensors() -> None:
    model = Watching()
    Watching.alive = []
    trace = record_on("real", model, (torch.randn(2, 4),), {})
    assert Watching.alive[0] <= 2
    assert len(adds(trace)) == 4


class Alternating(Net):
    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        Alternating.turn += 1
        return x + self.lin(x) if Alternating.turn % 2 else x - self.lin(x)


def test_replay_refuses_another_path() -> None:
    model = Alternating()
    trace = capture(model, torch.zeros(2, 4))
    with pytest.raises(ConversionError, match="another path"):
        replay(model, (torch.zeros(2, 4),), {}, trace, lambda *_: None)


@pytest.mark.parametrize("training", [False, True])
def test_replay_shows_real_values_with_gradients(training: bool) -> None:
    model = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trace = record(model, (x,), {}, training=training)
    nodes = list(trace.graph.nodes)
    seen: dict[int, Tensor] = {}

    def observe(index: int, node: fx.Node, value: Tensor) -> None:
        assert node is nodes[index]
        assert tuple(value.shape) == origin(node).shape
        seen[index] = value.detach() * 1

    (output,) = replay(model, (x,), {}, trace, observe, training=training)
    assert len(seen) == len(nodes) - 1
    last_add = nodes.index(adds(trace)[-1])
    assert torch.equal(seen[last_add].relu(), seen[last_add + 1])
    output.sum().backward()
    assert model.conv1.weight.grad is not None
    assert not model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.train(training)
    assert torch.allclose(output, model(x))


def test_train_mode_records_dropout() -> None:
    model = Forms()
    assert not named(capture(model, torch.zeros(2, 4)), "Dropout")
    assert named(capture(model, torch.zeros(2, 4), training=True), "Dropout")


# Places


class Inner(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + x


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any) -> Any:
        return function(self, *args) * 1

    return wrapper


def bare(function: Any) -> Any:
    def wrapper(self: nn.Module, *args: Any) -> Any:
        return function(self, *args)

    return wrapper


def helper(module: nn.Module, x: Tensor) -> Tensor:
    return x + module(x)


class Places(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = Inner()
        self.hidden = [Inner()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.b.forward(x)
        x = self.decorated(x)
        x = self.bare(x)

        def closure(y: Tensor) -> Tensor:
            return y + self.lin(y)

        def no_self(y: Tensor) -> Tensor:
            return y + 2 * y

        x = no_self(closure(x))
        x = sum(y + self.lin(y) for y in [x]) + x  # type: ignore[assignment]
        (x,) = [y + y.sin() for y in (x,)]
        x = checkpoint(closure, x, use_reentrant=False)
        x = checkpoint(self.decorated, x, use_reentrant=True)
        x = helper(self.lin, x)
        return self.hidden[0](x)  # type: ignore[no-any-return]

    @decorated
    @torch.no_grad()
    def decorated(self, x: Tensor) -> Tensor:
        return x + self.lin(x) * 3

    @bare
    def bare(self, x: Tensor) -> Tensor:
        return x + self.lin(x) * 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # checkpoint without gradients
def test_places() -> None:
    trace = capture(Places(), torch.randn(2, 4))
    assert trace.route == "recorded (fake tensors)"
    found = [
        [(frame.place.qualname, sources.segment(frame.span), frame.owner) for frame in origin(node).frames]
        for node in adds(trace)
    ]
    forward = "Places.forward"
    assert found == [
        [("Inner.forward", "self.lin(x) + x", "b")],
        [("Places.decorated", "x + self.lin(x) * 3", "")],
        [("Places.bare", "x + self.lin(x) * 4", "")],
        [(forward, "y + self.lin(y)", "")],
        [(forward, "y + 2 * y", None), (forward, "no_self(closure(x))", "")],
        [(forward, "y + self.lin(y)", "")],
        [(forward, "sum(y + self.lin(y) for y in [x]) + x", "")],
        [(forward, "y + y.sin()", None), (forward, "[y + y.sin() for y in (x,)]", "")],
        [(forward, "y + self.lin(y)", "")],
        [("Places.decorated", "x + self.lin(x) * 3", "")],
        [("helper", "x + module(x)", None), (forward, "helper(self.lin, x)", "")],
        [("Inner.forward", "self.lin(x) + x", "<unregistered Inner>")],
    ]
    first_line = Places.forward.__code__.co_firstlineno
    assert {f.place.line for n in adds(trace) for f in origin(n).frames if f.place.qualname == forward} == {first_line}
    for node in adds(trace):
        assert all(sources.function(frame.place) is not None for frame in origin(node).frames)
        assert all(frame.place.module == __name__ for frame in origin(node).frames)


def test_classes_inside_functions() -> None:
    class Local(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.lin(x)

    trace = capture(nn.Sequential(Local()), torch.randn(2, 4))
    (add,) = adds(trace)
    assert origin(add).frames[0].place.qualname == "test_classes_inside_functions.<locals>.Local.forward"
    assert trace.calls[1].frames[0].place.qualname == "Sequential.forward"


class OwnCall(Inner):
    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


def test_a_call_override_is_not_the_call_site() -> None:
    trace = capture(nn.Sequential(OwnCall()), torch.randn(2, 4))
    assert trace.calls[1].frames[0].owner == ""
    assert trace.calls[1].frames[0].place.qualname == "Sequential.forward"


def plus(self: nn.Module, x: Tensor) -> Tensor:
    return x + self.lin(x)  # type: ignore[operator]


def test_functions_put_on_the_instance() -> None:
    model = Inner()
    model.forward = functools.partial(plus, model)  # type: ignore[method-assign]
    (add,) = adds(capture(model, torch.randn(2, 4)))
    assert (origin(add).frames[0].place.qualname, origin(add).frames[0].owner) == ("plus", "")


class OwnForward(Net):
    """Has its forward on the instance only; the class has none."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.run

    def run(self, x: Tensor) -> Tensor:
        return x + self.lin(x)


@pytest.mark.filterwarnings("ignore")
def test_opaque_and_transparent_children() -> None:
    scripted = torch.jit.trace(Doubling(), torch.zeros(2, 4))
    trace = capture(nn.Sequential(scripted, OwnForward(), torch.compile(Doubling())), torch.zeros(2, 4))
    assert [node.target for node in trace.graph.nodes if node.op == "call_module"] == ["0", "1.lin", "2._orig_mod.lin"]
    assert owners(trace) == ["1", "2._orig_mod"]


class Operators(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.aten.add.Tensor(self.lin(x), x)
        return self.script(x, x) * 2  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
def test_what_a_scripted_function_adds_is_not_recorded() -> None:
    model = Operators()
    model.script = torch.jit.trace(lambda a, b: a + b, (torch.zeros(2, 4), torch.zeros(2, 4)))
    for rung in RUNGS:
        trace = record_on(rung, model, (torch.zeros(2, 4),), {})
        assert texts(trace) == {"torch.ops.aten.add.Tensor(self.lin(x), x)": 1}


def test_fsdp_is_recognised() -> None:
    from torch.distributed.fsdp import FSDPModule

    class Sharded(FSDPModule, Doubling):
        def __new__(cls) -> Any:
            return object.__new__(cls)

    with pytest.raises(ConversionError, match="sharded by FSDP"):
        capture(nn.Sequential(Sharded()), torch.zeros(2, 4))


# Symbolic


@pytest.mark.parametrize("build", [torchvision.models.resnet18, lambda: timm.create_model("convnext_atto")])
def test_symbolic_agrees_with_recorded(build: Any) -> None:
    model = build()
    symbolic = trace_symbolically(model)
    recorded = record_on("fake", model, (torch.zeros(2, 3, 64, 64),), {})
    symbolic.graph.lint()
    assert symbolic.route == "symbolic"
    assert [origin(n).frames for n in adds(symbolic)] == [origin(n).frames for n in adds(recorded)]
    assert [call.path for call in symbolic.calls] == [call.path for call in recorded.calls]
    assert [call.frames for call in symbolic.calls] == [call.frames for call in recorded.calls]
    modules = [[n.target for n in t.graph.nodes if n.op == "call_module"] for t in (symbolic, recorded)]
    assert set(modules[1]) <= set(modules[0])


def test_symbolic_optional_arguments_keep_their_defaults() -> None:
    class Optional(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                x = x + mask
            return x + self.lin(x) + 1

    trace = capture(Optional())
    assert trace.route == "symbolic"
    assert [node.op for node in trace.graph.nodes if node.op == "placeholder"] == ["placeholder"]
    assert texts(trace) == {"x + self.lin(x)": 1}
    assert trace.scalars == 1
    assert trace.root.inputs[0].name == "x"
    assert len(trace.root.outputs) == 1


# Nothing is left behind


class Stateful(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.log: list[Tensor] = []
        self.cache: dict[str, Any] = {"a": 1}
        self.seen: set[int] = {1}
        self.plain = torch.zeros(4)
        self.slots: list[Any] = [0, 1]
        self.steps = 0
        self.fail = False
        self.device = ""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.count += 1
        self.plain.add_(1)
        self.norm.running_mean = x.mean(0)
        self.log.append(x)
        self.slots[0] = x
        self.cache["b"] = x
        self.seen.add(2)
        self.steps += 1
        self.new = x
        self.register_buffer("late", x)
        self.lin.register_forward_hook(lambda *_: None)
        self.train()
        random.random()
        numpy.random.rand()
        torch.rand(1)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        if self.device:
            torch.set_default_device(self.device)
        if self.fail:
            raise ValueError("halfway")
        return self.norm(self.lin(x)) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("rung", [*RUNGS, "symbolic"])
def test_the_model_and_the_world_are_left_alone(rung: Any, fail: bool) -> None:
    model = Stateful()
    model.norm.eval()
    model.fail = fail
    model.device = "" if rung == "meta" else "cpu"  # torch cannot take back one made below `with torch.device(...)`
    x = torch.ones(2, 4)
    random.seed(1)
    numpy.random.seed(1)
    tensors = {name: (t, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    plain = model.plain
    rng = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist())  # type: ignore[union-attr]
    call = nn.Module.__call__
    if fail:
        with pytest.raises((ValueError, ConversionError), match="halfway"):
            trace_symbolically(model) if rung == "symbolic" else record_on(rung, model, (x,), {})
    else:
        trace_symbolically(model) if rung == "symbolic" else record_on(rung, model, (x,), {})
    assert torch.equal(x, torch.ones(2, 4))
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert now.keys() == tensors.keys()
    for name, (tensor, value) in tensors.items():
        assert now[name] is tensor
        assert torch.equal(tensor, value)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == attributes[path].keys()
        assert all(module.__dict__[key] is value for key, value in attributes[path].items())
    assert model.plain is plain
    assert torch.equal(plain, torch.zeros(4))
    assert (model.log, model.cache, model.seen, model.steps) == ([], {"a": 1}, {1}, 0)
    assert model.slots == [0, 1]
    assert model.training
    assert model.lin.training
    assert not model.norm.training
    assert not model.lin._forward_hooks
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert numpy.random.get_state()[1].tolist() == rng[2]  # type: ignore[union-attr]
    assert torch.is_grad_enabled()
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.mha.get_fastpath_enabled()
    assert nn.Module.__call__ is call
    assert torch._C._len_torch_function_stack() == 0
    assert torch.empty(1).device.type == "cpu"


def test_hooks_run_and_their_results_count() -> None:
    model = nn.Sequential(Inner())
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    trace = capture(model, torch.randn(2, 4))
    (mul,) = named(trace, "mul")
    assert trace.calls[1].outputs == [mul]
    assert len(model[0]._forward_hooks) == 1
