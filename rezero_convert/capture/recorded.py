"""The recorded capture: run the model once and write down every torch call with its place in the source."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._C import DisableTorchFunction
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from ..errors import ConversionError
from . import facts
from .facts import Facts
from .frames import TORCH, FrameReader
from .graphs import unflattened
from .guard import is_users_object, substitute, uncollected, untouched, weights_kept
from .memo import Fakes, Memo
from .trace import Call, Frame, Origin, Trace

Rung = Literal["fake", "meta", "real"]
RUNGS: tuple[Rung, ...] = ("fake", "meta", "real")

_DEPTH = 4  # how deep tensors are looked for in nested containers

_call_module = nn.Module.__call__

Perform = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Calls a torch function."""


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False) -> Trace:
    """Run `model` on the example inputs, on fake tensors if that works, else on meta, else on real ones.

    The model and the inputs are left as they were, also after an exception.

    Raises:
        ConversionError: the model raises on every kind of tensor (the message gives the last error), or Python runs
            without column information.
    """
    on_meta = any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    for rung in RUNGS[: 2 if on_meta else 3]:
        try:
            return record_on(rung, model, args, kwargs, training=training)
        except ConversionError:
            raise
        except Exception as error:  # whatever a model may raise; the last one is reported
            failure = error
    raise ConversionError(f"the model raised on the example inputs: {one_line(failure)}") from failure


def record_on(
    rung: Rung, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False
) -> Trace:
    """Record on one kind of tensor.

    Raises:
        ConversionError: Python runs without column information.
        Exception: whatever the model raises.
    """
    with contextlib.nullcontext() if rung == "real" else uncollected(), untouched(model, training=training):
        return unflattened(_RECORDERS[rung](model, args, kwargs))


Observe = Callable[[int, fx.Node, Tensor], None]
"""Called with a node's position in the graph, the node and its value."""


def replay(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: Trace,
    observe: Observe,
    *,
    training: bool = False,
    gradients: bool = True,
) -> list[Tensor]:
    """Run `model` again, on real tensors, and show every tensor to `observe` as it is made.

    The model is left as it was, its parameters are the real ones. A tensor that is overwritten is shown again, with
    the node that overwrites it. Positions and nodes are those of `trace`, which must be of a recorded route.

    Returns:
        The tensors that the model returned, in order.

    Raises:
        ConversionError: the model did not do what it did when `trace` was recorded.
        Exception: whatever the model raises.
    """
    nodes = list(trace.graph.nodes)
    align = _aligned(nodes)

    def checked(index: int, node: fx.Node, tensor: Tensor) -> None:
        position = align(node)
        if position is not None:
            observe(position, nodes[position], tensor)

    with untouched(model, training=training, gradients=gradients), weights_kept(model):
        paths = substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
        recorder = _Recorder(model, paths, weak=True, observe=checked)
        return list(tensors_in(_execute(recorder, model, fresh_inputs((args, kwargs)))))


_CONSTANT = "_constant_"
_PASSING = frozenset({"contiguous", "to", "type_as", "float", "half", "bfloat16", "double"})
"""Operations that return their operand itself when there is nothing to do, and then leave no node."""


def _aligned(nodes: list[fx.Node]) -> Callable[[fx.Node], int | None]:
    """For each node of a graph in the making, in order, its position among `nodes`; None for one without a partner.

    Only operations that may have had nothing to do (a tensor is contiguous on one kind of tensor and not on another)
    may be without, and tensors that no operation is seen to make.
    """
    positions: dict[fx.Node, int | None] = {}
    state = {"next": 0}
    last: list[fx.Node] = []

    def same(expected: fx.Node, node: fx.Node) -> bool:
        return (expected.op, str(expected.target)) == (node.op, str(node.target))

    def passes(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target).startswith(_CONSTANT)
        return node.op in ("call_method", "call_function") and facts.operation(node.target) in _PASSING

    def place(node: fx.Node) -> int | None:
        at = state["next"]
        while at < len(nodes) and not same(nodes[at], node) and passes(nodes[at]):
            at += 1
        if at < len(nodes) and same(nodes[at], node):
            state["next"] = at + 1
            return at
        if passes(node):
            return None
        raise ConversionError(f"the model took another path when it was run again, at {node.format_node()}")

    def align(node: fx.Node) -> int | None:
        while node not in positions:
            following = last[0].next if last else next(iter(node.graph.nodes))
            positions[following] = place(following)
            last[:] = [following]
        return positions[node]

    return align


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}{'...' if len(message) > 300 else ''}".rstrip(": ")


def _on_fake(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = Fakes(mode)

    def fake(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return mode.from_tensor(tensor)
        value = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return fakes(value, torch.device("cpu") if tensor.is_meta else tensor.device)

    def parameter(tensor: Tensor) -> Tensor:
        made = fake(tensor).requires_grad_(tensor.requires_grad)
        made._is_param = True  # what nn.Parameter() does to subclasses, without a dispatched detach
        return made

    paths = substitute(model, parameter=parameter, buffer=fake, other=Tensor.clone)  # values may be read
    inputs = _converted((args, kwargs), fake)
    with mode, _quiet():
        return _run(model, inputs, paths, "recorded (fake tensors)", weak=False, perform=Memo(mode))


def _on_meta(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    def meta(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor.to("meta")
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def parameter(tensor: Tensor) -> Tensor:
        return nn.Parameter(meta(tensor), requires_grad=tensor.requires_grad)

    paths = substitute(model, parameter=parameter, buffer=meta, other=meta)
    with torch.device("meta"):
        return _run(model, _converted((args, kwargs), meta), paths, "recorded (meta tensors)", weak=False)


def _on_real(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    paths = substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
    with weights_kept(model):
        return _run(model, _converted((args, kwargs), Tensor.clone), paths, "recorded (real tensors)", weak=True)


_RECORDERS: dict[Rung, Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Trace]] = {
    "fake": _on_fake,
    "meta": _on_meta,
    "real": _on_real,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging an operation that fails on fake tensors: the next kind of tensor is tried."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def fresh_inputs(inputs: Any) -> Any:
    """Nested inputs again, for a model that may overwrite them."""
    return _converted(inputs, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def _performed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _converted(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested inputs with every tensor converted, the same one once."""
    memo: dict[int, Any] = {}

    def walk(item: Any, depth: int) -> Any:
        if id(item) in memo:
            return memo[id(item)]
        if isinstance(item, Tensor):
            memo[id(item)] = convert(item)
            return memo[id(item)]
        filled = any(True for _ in tensors_in(item, depth))
        if depth == 0 or not (filled or isinstance(item, (list, dict)) or is_users_object(item)):
            return item
        if isinstance(item, (tuple, list)):
            items = [walk(part, depth - 1) for part in item]
            if isinstance(item, list):
                return items
            return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)
        made = copy.copy(item)
        if isinstance(item, dict):
            for key, part in item.items():
                made[key] = walk(part, depth - 1)
        for name, part in getattr(item, "__dict__", {}).items():
            made.__dict__[name] = walk(part, depth - 1)
        return made

    return walk(value, _DEPTH + 2)


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists, dicts, dataclasses and plain objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, int, float, type, nn.Module)):
        return
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)


def _run(
    model: nn.Module, inputs: Any, paths: dict[int, str], route: str, *, weak: bool, perform: Perform = _performed
) -> Trace:
    recorder = _Recorder(model, paths, weak=weak, perform=perform)
    _execute(recorder, model, inputs)
    hidden = _hidden_adds(model, inputs, paths, weak=weak) if recorder.unexplained else ()
    calls = tuple(recorder.calls)
    return Trace(
        recorder.graph, recorder.root, calls, route, model,
        scalars=recorder.scalars, hidden=hidden, constants=recorder.constants,
    )  # fmt: skip


def _hidden_adds(model: nn.Module, inputs: Any, paths: dict[int, str], *, weak: bool) -> tuple[tuple[Frame, ...], ...]:
    """Where a second run, watched from the dispatcher, adds tensors outside of any recorded call."""
    recorder = _Recorder(model, paths, weak=weak)
    watcher = _Watcher(recorder)
    with watcher:
        _execute(recorder, model, inputs)
    return tuple(watcher.found)


def _execute(recorder: _Recorder, model: nn.Module, inputs: Any) -> Any:
    args, kwargs = inputs
    recorder.inputs(model, args, kwargs)
    with mock.patch.object(nn.Module, "__call__", recorder.patched_call()), recorder:
        result = _boundary(model, args, kwargs)
    recorder.output(result)
    return result


def _boundary(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the model; stacks are read outwards up to here."""
    return model(*args, **kwargs)


@dataclass(slots=True)
class _Known:
    """What the recorder knows of a torch function."""

    op: str
    target: Any
    facts: Facts
    overwriting: Facts
    add: bool
    attribute: str = ""


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Notes the adds of two tensors that reach the dispatcher while the recorder is in no call."""

    supports_higher_order_operators = True

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.found: list[tuple[Frame, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if facts.operation(func) in ("add", "sub") and not self.recorder.inside:
            tensors = [value for value in args if isinstance(value, Tensor)]
            if len(tensors) > 1 and all(tensor.is_floating_point() for tensor in tensors):
                self.found.append(self.recorder.reader.collect(sys._getframe(1)))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    """Builds the graph while the model runs."""

    def __init__(
        self, model: nn.Module, paths: dict[int, str], *, weak: bool, observe: Observe | None = None,
        perform: Perform = _performed,
    ) -> None:  # fmt: skip
        super().__init__()
        self.graph = fx.Graph()
        self.reader = FrameReader(model, _boundary.__code__)
        self.root = Call("", type(model).__qualname__, facts.of_class(type(model)), None, (), model)
        self.calls = [self.root]
        self.scalars = 0
        self.inside = False
        """In a recorded call: what happens now is explained by its node."""
        self.unexplained = False
        """A tensor turned up that no recorded call made."""
        self.constants: dict[str, Tensor] = {}
        self._paths = paths
        self._weak = weak
        self._observe = observe
        self._perform = perform
        self._positions: dict[fx.Node, int] = {}
        self._call = self.root
        self._silent = False
        self._entered = False
        self._constants = 0
        self._bound: dict[int, tuple[Any, fx.Node]] = {}
        self._functions: dict[Any, _Known] = {}
        self._classes: dict[type, tuple[bool, Facts, Facts]] = {}

    def inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the placeholders."""
        try:
            names = list(inspect.signature(model.forward).parameters)
        except (TypeError, ValueError):
            names = []
        given = [(names[i] if i < len(names) else f"input_{i}", value) for i, value in enumerate(args)]
        for name, value in [*given, *kwargs.items()]:
            for tensor in tensors_in(value):
                if self._lookup(tensor) is None:
                    node = self.graph.placeholder(name)
                    self._describe(node, Facts("input", "input"), (), tensor)
                    self._bind(tensor, node)
                self.root.inputs.append(self._node(tensor, ()))

    def output(self, result: Any) -> None:
        """Make the output node."""
        self.root.outputs += [self._node(tensor, ()) for tensor in tensors_in(result)]
        node = self.graph.output(self._argument(result, (), _DEPTH))
        self._describe(node, Facts("other", "output"), (), None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._silent or (isinstance(func, OpOverload) and _called_by_torch(sys._getframe(1))):
            return self._perform(func, args, kwargs)
        before = [(tensor, _version(tensor)) for tensor in _operands(args, kwargs)]
        outside, self.inside = not self.inside, True
        try:
            result = self._perform(func, args, kwargs)
        finally:
            self.inside = not outside
        if isinstance(result, Tensor) or (result is None and before) or isinstance(result, (tuple, list)):
            fresh, changed = _effects(result, before)
            if fresh:
                known = self._known(func)
                if known.attribute:
                    args = (*args[:1], known.attribute, *args[1:2])
                if known.add and len(before) < 2:
                    self.scalars += 1
                frames = self.reader.collect(sys._getframe(1))
                self._write(known.op, known.target, known.facts, known.overwriting, args, kwargs, before, result,
                            fresh, changed, frames)  # fmt: skip
        return result

    def patched_call(self) -> Callable[..., Any]:
        """What stands in for `nn.Module.__call__` during the run."""
        thread = threading.get_ident()

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._silent or threading.get_ident() != thread:
                return _call_module(module, *args, **kwargs)
            if module is self.root.module and self._call is self.root and not self._entered:
                self._entered = True
                return _call_module(module, *args, **kwargs)
            leaf, plain, overwriting = self._class(module)
            with DisableTorchFunction():
                frames = self.reader.collect(sys._getframe(1), module)
            if leaf:
                return self._leaf_call(module, plain, overwriting, frames, args, kwargs)
            return self._inlined_call(module, plain, frames, args, kwargs)

        return __call__

    def _leaf_call(
        self, module: nn.Module, plain: Facts, overwriting: Facts, frames: tuple[Frame, ...],
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        with DisableTorchFunction():
            before = [(tensor, _version(tensor)) for tensor in _operands(args, kwargs)]
        scripted = isinstance(module, torch.jit.ScriptModule)
        self.unexplained |= scripted
        self._silent, self.inside = True, not scripted
        try:
            result = _call_module(module, *args, **kwargs)
        finally:
            self._silent = self.inside = False
        with DisableTorchFunction():
            fresh, changed = _effects(result, before)
            if fresh:
                path = self.reader.path(module)
                self._write("call_module", path, plain, overwriting, args, kwargs, before, result, fresh, changed,
                            frames)  # fmt: skip
        return result

    def _inlined_call(
        self, module: nn.Module, plain: Facts, frames: tuple[Frame, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        parent = self._call
        call = Call(self.reader.path(module), type(module).__qualname__, plain, parent, frames, module)
        self.calls.append(call)
        with DisableTorchFunction():
            call.inputs = [self._node(tensor, frames) for tensor in _call_tensors((args, kwargs))]
        self._call = call
        try:
            result = _call_module(module, *args, **kwargs)
        finally:
            self._call = parent
        with DisableTorchFunction():
            call.outputs = [self._node(tensor, frames) for tensor in _call_tensors(result)]
        call.bare = isinstance(result, Tensor)
        return result

    def _write(
        self, op: str, target: Any, plain: Facts, overwriting: Facts, args: tuple[Any, ...], kwargs: dict[str, Any],
        before: list[tuple[Tensor, int]], result: Any, fresh: list[Tensor], changed: list[Tensor],
        frames: tuple[Frame, ...],
    ) -> None:  # fmt: skip
        given = tuple([self._argument(value, frames) for value in args])
        named = {name: self._argument(value, frames) for name, value in kwargs.items()}
        node = self.graph.create_node(op, target)
        node.args = given  # `create_node` would look for symbols in them first
        if named:
            node.kwargs = named
        first = before[0][0] if before else None
        inplace = first is not None and any(first is tensor for tensor in changed)
        self._describe(node, overwriting if inplace else plain, frames, result if isinstance(result, Tensor) else None)
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif result is not None:
            self._bind_items(result, node, fresh, frames)
        if not any(True for _ in tensors_in(result)):
            node.meta["same_as"] = [self._node(tensor, frames) for tensor in changed]
            for tensor in changed:
                self._bind(tensor, node)
        for tensor in changed:
            base = tensor._base
            if base is not None and any(tensor is item for item in fresh):
                parts = (self._node(base, frames), self._node(tensor, frames))
                merged = self.graph.create_node("call_function", operator.setitem, parts)
                self._describe(merged, _SETITEM, frames, base)
                merged.meta["same_as"] = parts[:1]
                self._bind(base, merged)

    def _bind_items(self, result: Any, node: fx.Node, fresh: list[Tensor], frames: tuple[Frame, ...]) -> None:
        """A getitem node for every new tensor in a returned structure."""
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(result, Mapping):
            items = result.items()
        elif isinstance(result, (tuple, list)):
            items = enumerate(result)
        for key, item in items:
            if isinstance(item, Tensor) and not any(item is tensor for tensor in fresh):
                continue
            if isinstance(item, Tensor) or any(True for _ in tensors_in(item)):
                element = self.graph.create_node("call_function", operator.getitem, (node, key))
                is_tensor = isinstance(item, Tensor)
                self._describe(element, _GETITEM, frames, item if is_tensor else None)
                if is_tensor:
                    self._bind(item, element)
                else:
                    self._bind_items(item, element, fresh, frames)

    def _describe(self, node: fx.Node, known: Facts, frames: tuple[Frame, ...], tensor: Tensor | None) -> None:
        self._positions[node] = len(self._positions)
        shape, dtype = (None, None) if tensor is None else (tuple(_bare(tensor).shape), tensor.dtype)
        node.meta["origin"] = Origin(self._call, frames, known, shape, dtype)

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self._bound[id(tensor)] = (TensorWeakRef(tensor) if self._weak else tensor, node)
        if _is_wrapped(tensor):
            self._bind(_bare(tensor), node)
            return
        if self._observe is not None:
            self._silent = True  # what the observer computes is not the model's
            try:
                self._observe(self._positions[node], node, tensor)
            finally:
                self._silent = False

    def _lookup(self, tensor: Tensor) -> fx.Node | None:
        bound = self._bound.get(id(tensor))
        if bound is None:
            return self._lookup(_bare(tensor)) if _is_wrapped(tensor) else None
        held = bound[0]() if self._weak else bound[0]
        return bound[1] if held is tensor else None  # an id may be used again

    def _node(self, tensor: Tensor, frames: tuple[Frame, ...]) -> fx.Node:
        """The node of a tensor; one that no recorded operation made becomes a get_attr node."""
        node = self._lookup(tensor)
        if node is None:
            path = self._paths.get(id(tensor))
            if path is None:
                path = f"{_CONSTANT}{self._constants}"
                self._constants += 1
                self.unexplained = True
                if not self._weak:
                    self.constants[path] = tensor
            unseen = path.startswith(_CONSTANT) and (self._weak or isinstance(tensor, FakeTensor))
            known = Facts("unseen", "Tensor") if unseen else attribute_facts(tensor)
            node = self.graph.create_node("get_attr", path)
            self._describe(node, known, frames, tensor)
            self._bind(tensor, node)
        return node

    def _argument(self, value: Any, frames: tuple[Frame, ...], depth: int = 2) -> Any:
        """A value as an fx argument: tensors become nodes, what fx does not know its type's name."""
        if isinstance(value, Tensor):
            return self._node(value, frames)
        if value is None or isinstance(value, _BASE_TYPES):
            return value
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice(*[self._argument(part, frames, depth) for part in parts])
        if isinstance(value, tuple):
            return tuple([self._argument(item, frames, depth) for item in value])
        if isinstance(value, list):
            return [self._argument(item, frames, depth) for item in value]
        if isinstance(value, Mapping):
            return {str(key): self._argument(item, frames, depth) for key, item in value.items()}
        if depth and any(True for _ in tensors_in(value, depth)):
            return {name: self._argument(item, frames, depth - 1) for name, item in vars(value).items()}
        return f"<{type(value).__qualname__}>"

    def _known(self, func: Any) -> _Known:
        known = self._functions.get(func)
        if known is None:
            known = self._functions[func] = _learn(func)
        return known

    def _class(self, module: nn.Module) -> tuple[bool, Facts, Facts]:
        cls = type(module)
        if cls not in self._classes:
            plain = facts.of_class(cls)
            self._classes[cls] = (is_leaf(module), plain, dataclasses.replace(plain, inplace=True))
        return self._classes[cls]


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, grad, jvp of torch.func


def _bare(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func: as long as it is not computed with, the one that went in."""
    while _is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


_BASE_TYPES = (str, int, float, bool, complex, torch.dtype, torch.device, torch.layout, torch.memory_format,
               type(Ellipsis), range)  # fmt: skip
_SETITEM = facts.of_function(operator.setitem)
_GETITEM = facts.of_function(operator.getitem)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node. A scripted one cannot be looked into; one whose class has no forward can."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    cls = type(module)
    return cls.forward is not nn.Module.forward and facts.is_leaf(cls)


def attribute_facts(tensor: Tensor) -> Facts:
    """Facts of a get_attr node."""
    matrix = sum(size > 1 for size in tensor.shape) > 1
    if isinstance(tensor, nn.Parameter):
        return Facts("parameter", "Parameter", weight=matrix)
    return Facts("parameter", "Buffer")


def _learn(func: Any) -> _Known:
    """How a torch function is written in the graph."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        attribute = func.__self__.__name__
        plain = Facts("layout" if attribute in ("T", "mT", "H", "mH") else "other", attribute)
        known = _Known("call_function", getattr if name == "__get__" else setattr, plain, plain, False, attribute)
    else:
        plain = facts.of_function(func)
        method = getattr(Tensor, name, None) is func
        known = _Known(
            "call_method" if method else "call_function", name if method else func, plain, plain,
            plain.type in ("add", "sub", "rsub"),
        )  # fmt: skip
    known.overwriting = dataclasses.replace(known.facts, inplace=True)
    known.facts = dataclasses.replace(known.facts, inplace=False)
    return known


_CALLS_OPERATORS = (torch._ops.__file__, torch._library.custom_ops.__file__)


def _called_by_torch(frame: FrameType | None) -> bool:
    """Whether torch itself called an operator: the fake tensor mode does for what a scripted function computes.

    A call of what `torch.library.custom_op` has made is the model's own.
    """
    while frame is not None and frame.f_code.co_filename in _CALLS_OPERATORS:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(TORCH)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments of a torch function, each once."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += tensors_in(value, 3)
    if len(found) < 2:
        return found
    return list({id(tensor): tensor for tensor in found}.values())


def _effects(result: Any, before: list[tuple[Tensor, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that get a new node, and which of the operands were overwritten."""
    changed = [tensor for tensor, version in before if _version(tensor) != version]
    returned = [result] if isinstance(result, Tensor) else list(tensors_in(result))
    if not returned:
        return changed, changed
    fresh = [
        tensor
        for tensor in returned
        if any(tensor is item for item in changed) or not any(tensor is item for item, _ in before)
    ]
    return fresh, changed


def _call_tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """As `tensors_in`, but plain objects are not searched: a cache of n layers passed to n layers costs n * n."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0:
        return
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _call_tensors(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _call_tensors(item, depth - 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in vars(value).values():
            yield from _call_tensors(item, depth - 1)
