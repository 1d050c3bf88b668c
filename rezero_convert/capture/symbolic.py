"""The symbolic capture: torch.fx tracing, for when there are no example inputs."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..errors import ConversionError
from . import facts
from .facts import Facts
from .frames import FrameReader
from .graphs import unflattened
from .guard import substitute, untouched
from .recorded import attribute_facts, is_leaf, one_line
from .trace import Call, Frame, Origin, Trace


def trace_symbolically(model: nn.Module, *, training: bool = False) -> Trace:
    """Trace `model` on proxies, with the defaults of its optional arguments; shapes and dtypes stay unknown.

    The model is left as it was.

    Raises:
        ConversionError: the model cannot be traced (control flow on values, for one); the message gives the tracer's
            error in short. Or Python runs without column information.
    """
    tracer = _Tracer(model)
    with untouched(model, training=training):
        # tensors that depend on no input are computed for real during tracing
        substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
        try:
            graph = _boundary(tracer, model)
        except ConversionError:
            raise
        except Exception as error:  # whatever a model may raise on proxies
            raise ConversionError(
                f"{type(model).__name__} cannot be traced without inputs ({one_line(error)})"
            ) from error
    tracer.finish(graph)
    return unflattened(Trace(graph, tracer.root_call, tuple(tracer.calls), "symbolic", model, scalars=tracer.scalars))


def _boundary(tracer: _Tracer, model: nn.Module) -> fx.Graph:
    """Traces the model; stacks are read outwards up to here."""
    return tracer.trace(model)


class _Tracer(fx.Tracer):
    """A tracer that notes for every node where it comes from, and every execution of an inlined module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reader = FrameReader(model, _boundary.__code__)
        self.root_call = Call("", type(model).__qualname__, facts.of_class(type(model)), None, (), model)
        self.calls = [self.root_call]
        self.scalars = 0
        self._model = model
        self._call = self.root_call
        self._leaf_frames: tuple[Frame, ...] | None = None
        self._attributes = dict([*model.named_buffers(), *model.named_parameters()])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the required arguments of the model; optional ones keep their defaults."""
        args: list[Any] = [self._model]
        keywords: dict[str, Any] = {}
        for name, parameter in inspect.signature(self._model.forward).parameters.items():
            if not is_required(parameter):
                continue
            proxy = self.create_proxy("placeholder", name, (), {})
            self.root_call.inputs.append(proxy.node)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = proxy
            else:
                args.append(proxy)
        if not self.root_call.inputs:
            raise ConversionError(f"{type(self._model).__name__}.forward has no required argument to trace with")

        def call(_: nn.Module, *proxies: Any) -> Any:
            result = self._model.forward(*proxies, **keywords)
            self.root_call.outputs += _nodes(result)
            return result

        return call, args

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        known, shape, dtype = _OUTPUT, None, None
        frames = self._leaf_frames
        if frames is None:
            frames = () if kind in ("placeholder", "output") else self.reader.collect(sys._getframe(1))
        if kind == "placeholder":
            known = _INPUT
        elif kind == "get_attr":
            tensor = self._attributes.get(target)
            known = Facts("parameter", "Constant") if tensor is None else attribute_facts(tensor)
            if tensor is not None:
                shape, dtype = tuple(tensor.shape), tensor.dtype
        elif kind == "call_module":
            module = self._model.get_submodule(target)
            known = facts.of_class(type(module))
            known = dataclasses.replace(known, inplace=bool(getattr(module, "inplace", False)))
        elif kind in ("call_function", "call_method"):
            known = facts.of_function(target)
            if target is getattr and len(node.args) > 1:  # like the recorded capture: the attribute's own name
                known = dataclasses.replace(facts.of_function(str(node.args[1])), inplace=False)
            if known.type in ("add", "sub", "rsub") and len(node.all_input_nodes) < 2:
                self.scalars += 1
        node.meta["origin"] = Origin(self._call, frames, known, shape, dtype)
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        frames = self.reader.collect(sys._getframe(1), m)
        if self.is_leaf_module(m, ""):
            self._leaf_frames = frames
            try:
                return super().call_module(m, forward, args, kwargs)
            finally:
                self._leaf_frames = None
        parent = self._call
        call = Call(self.reader.path(m), type(m).__qualname__, facts.of_class(type(m)), parent, frames, m)
        self.calls.append(call)
        call.inputs = _nodes((args, kwargs))
        self._call = call
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self._call = parent
        call.outputs = _nodes(result)
        call.bare = isinstance(result, fx.Proxy)
        return result

    def finish(self, graph: fx.Graph) -> None:
        """Describe the nodes that torch.fx made without asking us."""
        for node in graph.nodes:
            if "origin" not in node.meta:
                node.meta["origin"] = Origin(self.root_call, (), _OUTPUT if node.op == "output" else Facts())


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a call must give the argument."""
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


_INPUT = Facts("input", "input")
_OUTPUT = Facts("other", "output")


def _nodes(value: Any, depth: int = 4) -> list[fx.Node]:
    """Nodes of the proxies in a nested structure, in order."""
    if isinstance(value, fx.Proxy):
        return [value.node]
    if depth == 0:
        return []
    if isinstance(value, dict):
        value = tuple(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(vars(value).values())
    if isinstance(value, (tuple, list)):
        return [node for item in value for node in _nodes(item, depth - 1)]
    return []
