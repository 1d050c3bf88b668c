"""The third rung: no inputs, and torch.fx cannot trace: the source is read with the instances' attributes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import test_zoo
import torch
import zoo
from torch import Tensor, nn

import rezero_convert as rz
from rezero_convert.capture import capture
from rezero_convert.capture.inputs import normalize_inputs
from rezero_convert.capture.live import ROUTE, trace_live
from rezero_convert.capture.recorded import record
from rezero_convert.capture.trace import Trace, origin
from rezero_convert.detect import detect
from rezero_convert.plan import Plan

W = 8
CALLED: list[str] = []


def note(x: Tensor) -> Tensor:
    CALLED.append("called")
    return x


class Block(nn.Module):
    """Tracing stops at its condition."""

    def __init__(self, norm_first: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.fc = nn.Linear(W, W)
        self.norm_first = norm_first
        self.scale = scale

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if x.sum() > 1e6:
            x = x / 2
        if self.norm_first:
            return x + self.scale * torch.relu(self.fc(self.norm(x)))
        return self.norm(x + torch.relu(self.fc(x)))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(W, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gates(plan: Plan) -> set[tuple[str, tuple[str, ...]]]:
    return {(site.path, tuple(gate.alpha for gate in site.gates)) for site in plan.converted}


def decided(plan: Plan) -> set[Any]:
    return {
        (site.path, site.span, tuple((gate.alpha, gate.existing) for gate in site.gates)) for site in plan.converted
    }


def recorded(model: nn.Module, inputs: Any) -> Plan:
    args, kwargs = normalize_inputs(inputs)
    return detect(record(model, args, kwargs))


def calls(trace: Trace) -> list[Any]:
    return [node.target for node in trace.graph.nodes if node.op == "call_module"]


# What it must not do


def test_a_class_without_source_says_what_to_pass() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Bare(nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else -x", space)
    with pytest.raises(rz.ConversionError, match=r"no source text of Bare\.forward; pass example_inputs="):
        capture(space["Bare"]())


def test_an_inner_class_without_source_is_one_step_and_is_named() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Inner(nn.Module):\n    def forward(self, x):\n        return x * 2 if x.sum() > 0 else x", space)
    trace = capture(Stack(space["Inner"](), Block()))
    assert calls(trace) == ["blocks.0", "blocks.1.norm", "blocks.1.fc", "head"]
    assert any("Inner has no source text" in text for text in trace.notes)


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.sum() > 0:
            raise NotImplementedError
        raise ValueError("never")


def test_a_forward_that_raises_whatever_the_input_is_refused_with_the_place() -> None:
    with pytest.raises(
        rz.ConversionError, match=r"Refuses\.forward raises at .*test_capture_live\.py:\d+.*pass example"
    ):
        capture(Refuses())


class Watched(Block):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        note(x)
        return super().forward(x)


def test_nothing_is_run_and_the_model_stays_as_it_was() -> None:
    model = Stack(Watched(), Watched()).train()
    CALLED.clear()
    model.head.register_forward_hook(lambda *_: CALLED.append("hook"))
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    plan = detect(trace_live(model))
    assert len(plan.converted) == 2
    assert plan.route == ROUTE
    assert any("nothing was run" in text for text in plan.notes)
    assert CALLED == []
    assert model.training
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before


def test_is_not_asked_where_tracing_works_or_inputs_are_there() -> None:
    assert capture(nn.Sequential(nn.Linear(W, W))).route == "symbolic"
    assert capture(Stack(Block()), torch.ones(2, W)).route.startswith("recorded")


def test_arms_that_the_attributes_exclude_are_not_seen() -> None:
    model = Stack(Block(True), Block(False))
    names = calls(capture(model))
    assert names == ["blocks.0.norm", "blocks.0.fc", "blocks.1.fc", "blocks.1.norm", "head"]


class NoBlocks(nn.Module):
    """Adds that are none: a position, a number, scores and a mask, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, W))
        self.q = nn.Linear(W, W)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.sum() > 0:
            x = x + self.position
        scores = self.q(x) @ y.transpose(0, 1) + 1e-6
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ y + torch.ones_like(y)


def test_adds_that_are_no_blocks_stay_refused() -> None:
    plan = rz.audit(NoBlocks()).plan
    assert plan.route == ROUTE
    assert plan.sites
    assert not plan.converted


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: x.shape[0]]:
            x = x + torch.relu(layer(x))
        return x


class Indexed(Sliced):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[0]):
            x = x + torch.relu(self.layers[i](x))
        return x


class Whiled(Sliced):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < len(self.layers) and x.sum() < 1e6:
            x = x + torch.relu(self.layers[i](x))
            i += 1
        return x


@pytest.mark.parametrize("model", [Sliced, Indexed, Whiled])
def test_one_add_for_modules_that_only_a_run_tells_is_refused(model: Callable[[], nn.Module]) -> None:
    plan = rz.audit(model()).plan
    assert plan.route == ROUTE
    assert [(site.verdict, site.code) for site in plan.sites] == [("refused", "RZ911")]


# Real instances


class Odd(nn.Module):
    """What a reader of text alone cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.names = [f"part{i}" for i in range(3)]
        for i, name in enumerate(self.names):
            setattr(self, name, Block(scale=float(i + 1)))
        self.table = {"act": torch.tanh, "first": self.part0}
        self.extra: nn.Module | None = None
        self.run = partial(self._run, number=2)
        self.head = nn.Linear(W, W)

    @property
    def last(self) -> nn.Module:
        return getattr(self, self.names[-1])

    def _run(self, x: Tensor, number: int) -> Tensor:
        return getattr(self, f"part{number - 1}")(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table["first"](x) if "first" in self.table else x
        if self.extra is not None:
            x = x + self.extra(x)
        x = self.last(self.run(x))
        assert isinstance(self.head, nn.Linear)
        if isinstance(self.head, nn.Sequential) or not hasattr(self, "head"):
            return x
        return x + self.table["act"](self.head(x))


def test_attributes_lead_to_the_real_modules() -> None:
    trace = capture(Odd())
    assert trace.route == ROUTE
    assert calls(trace) == [f"part{i}.{name}" for i in range(3) for name in ("norm", "fc")] + ["head"]
    assert gates(detect(trace)) == {("part0", ("alpha_fc",)), ("part1", ("alpha_fc",)), ("part2", ("alpha_fc",)),
                                    ("", ("alpha",))}  # fmt: skip


class Certain(nn.Module):
    """Every condition but the first is decided by what is there; the arms that raise are not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ["a", "b"]
        self.a, self.b = Block(), nn.Identity()
        self.options = {"depth": 2, "kind": "plain"}

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if x is None or y is None:
            raise ValueError
        states, options = [x], dict(self.options)
        for number, name in enumerate(self.names, start=1):
            if number not in (1, 2) or not isinstance(name, str) or isinstance(states, tuple):
                raise ValueError
            states.insert(0, getattr(self, name)(states[0]))
        if len(states) != 3 or states.pop() is None or len(states) != self.options["depth"]:
            raise ValueError
        if f"{options['kind']}-{len(states)}" != "plain-2" or type(states) is not list or options.get("none"):
            raise ValueError
        if self.training or torch.jit.is_scripting() or self.a.fc.weight.shape[0] != W or x.dtype == 3:
            raise ValueError
        try:
            raise KeyError
        except KeyError:
            x = states[0]
        return x + self.a.fc(y).mean() * 0


def test_what_is_certain_is_decided() -> None:
    trace = trace_live(Certain())
    assert calls(trace) == ["a.norm", "a.fc", "a.fc"]
    assert gates(detect(trace)) == {("a", ("alpha_fc",))}
    with pytest.raises(rz.ConversionError, match="raises at"):
        trace_live(Certain(), training=True)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(2 * W, W) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            kept.append(x)
            x = torch.relu(layer(x))
        for layer in self.up:
            x = torch.relu(layer(torch.cat([x, kept.pop()], -1)))
        return x


def test_lists_are_followed_element_by_element() -> None:
    model = UNet()
    args = (torch.ones(2, W),)
    found = [
        [origin(node).frames for node in trace.graph.nodes] for trace in (trace_live(model), record(model, args, {}))
    ]
    assert found[0][1:] == found[1][1:]  # the placeholder's place in the list is the same, its frames are none
    edges = [
        [
            [str(source.target) for source in node.all_input_nodes]
            for node in trace.graph.nodes
            if node.op == "call_module"
        ]
        for trace in (trace_live(model), record(model, args, {}))
    ]
    assert edges[0] == edges[1]


def test_a_hundred_layers_take_seconds() -> None:
    model = Stack(*(Block() for _ in range(100)))
    start = time.process_time()
    plan = rz.audit(model).plan
    assert time.process_time() - start < 10
    assert len(plan.converted) == 100


# Models that symbolic tracing fails on, converted without inputs and then run


class TwoArms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + torch.tanh(self.a(x))
        else:
            x = x + torch.tanh(self.b(x))
        if x.shape[0] % 2:
            x = x + torch.relu(self.b(x))
        return self.head(x)


class DictInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, W)
        self.layers = nn.ModuleDict({"a": Block(), "b": Block()})

    def forward(self, batch: dict[str, Tensor], *, order: tuple[str, ...] = ("a", "b")) -> dict[str, Tensor]:
        x = self.emb(batch["ids"])
        mask = batch.get("mask")
        if mask is not None:
            x = x * mask[..., None]
        for name in order:
            x = self.layers[name](x, batch=batch)
        return {"logits": x.mean(1), "x": x}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, **kwargs: Any) -> Tensor:
        x = kwargs["x"]
        return self.block(x + 0 if len(x) > 3 else x)


@dataclass
class Output:
    hidden: Tensor
    extra: Tensor | None = None


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Output:
        return Output(self.block(x))


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Wrapped(), Wrapped()

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x)
        found = self.second(hidden if (hidden := found.hidden) is not None else x)
        return found.hidden if found.extra is None else found.extra


class EarlyExit(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == 1:
                continue
            x = block(x)
            if x.abs().max() > 1e9:
                break
        return self.head(x)


class Zipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.b = nn.ModuleList(nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.a, self.b, strict=True):
            x = x + torch.tanh(a(x))
            x = x + b(x)
            if x.isnan().any():
                return x
        return x


def dropout_add(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return residual + nn.functional.dropout(x, p, training)


class Helper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.act = nn.LayerNorm(W), nn.Linear(W, W), lambda x: torch.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            x = x.clamp(max=1)
        return dropout_add(self.act(self.fc(self.norm(x))), x, 0.1, self.training)


X = torch.arange(5.0 * W).reshape(5, W) / W
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "pre-norm": (lambda: Stack(Block(), Block(), Block()), X, 3),
    "post-norm": (lambda: Stack(Block(False), Block(False)), X, 2),
    "both arms": (TwoArms, X, 3),
    "a dictionary of inputs": (DictInput, ({"ids": torch.arange(10).reshape(2, 5), "mask": torch.ones(2, 5)},), 2),
    "keywords": (Keywords, {"x": X}, 1),
    "outputs in a dataclass": (Outputs, X, 2),
    "a loop with exits": (lambda: EarlyExit(Block(), Block(), Block()), X, 2),
    "two lists": (Zipped, X, 6),
    "a helper function": (Helper, X, 1),
}


def run(model: nn.Module, inputs: Any, train: bool) -> Tensor:
    torch.manual_seed(1)
    return zoo.call(copy.deepcopy(model).train(train), inputs)


@pytest.mark.parametrize("name", CASES)
def test_converts_without_inputs_what_holds_with_them(name: str) -> None:
    make, inputs, alphas = CASES[name]
    torch.manual_seed(0)
    model = make()
    plan = rz.audit(model).plan
    assert plan.route == ROUTE
    assert all(site.confidence < 1 for site in plan.converted)
    assert decided(recorded(model, inputs)) <= decided(plan)
    preserved = rz.convert(model, alpha_init="preserve")
    for train in (False, True):
        assert torch.equal(run(model, inputs, train), run(preserved, inputs, train))
    converted = rz.convert(model)  # verified: structure
    assert len(list(rz.alphas(converted))) == alphas
    check = rz.validate(converted)
    assert check.ok
    assert any("only the structure was checked" in text for text in check.notes)
    measured = rz.validate(converted, inputs)
    assert measured.ok, measured.failures


def test_validation_sees_a_gate_that_is_not_read_any_more() -> None:
    converted = rz.convert(Stack(Block(), Block()))
    converted.blocks[1].__class__ = Block
    assert not rz.validate(converted).ok


# Against the recorded route, on models that others wrote

ZOO = [*(pytest.param(case, id=case.name) for case in zoo.CASES), *test_zoo.CASES]


@pytest.mark.parametrize("case", ZOO)
def test_agrees_with_the_recorded_route(case: zoo.Case) -> None:
    model = case.make()
    trace = trace_live(model)
    assert decided(detect(trace)) == decided(recorded(model, case.inputs()))
    trace.graph.lint()
