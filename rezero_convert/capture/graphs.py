"""Graph modules: their one flat `forward` is seen as the modules that it was traced from.

A `torch.fx.GraphModule` runs generated code that calls leaf modules and functions in a row; `nn_module_stack` among a
node's metadata tells which modules it came from. What a capture records of that code is given back its module
executions and owners, so that blocks are found and named as in the original model.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _LazyGraphModule

from .. import sources
from ..plan import Place, Span
from . import facts
from .trace import Call, Frame, Origin, Trace, origin


class Text(NamedTuple):
    """The generated code of a graph module, and which node each statement computes."""

    file: str
    nodes: dict[int, fx.Node]
    """By line."""

    def node(self, span: Span) -> fx.Node | None:
        return self.nodes.get(span.line) if span.file == self.file else None


def text_of(module: fx.GraphModule) -> Text:
    """Where the generated code of a graph module is, and what it computes."""
    _LazyGraphModule.force_recompile(module)  # torch.compile generates code at the first call only
    file = type(module).forward.__code__.co_filename
    return Text(file, dict(_statements(file, {node.name: node for node in module.graph.nodes})))


def _statements(file: str, named: dict[str, fx.Node]) -> Iterator[tuple[int, fx.Node]]:
    for statement in sources.nodes(file):
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            target = targets[0]
            clears = isinstance(statement.value, ast.Constant) and statement.value.value is None
            if isinstance(target, ast.Name) and target.id in named and not clears:
                for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                    yield line, named[target.id]


def graph_modules(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graph modules in a model that run code of their own graph, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and "forward" not in module.__dict__
    }


def is_flat(module: nn.Module | None) -> bool:
    """Whether nothing is known of the modules that a graph module was traced from (`make_fx`)."""
    return isinstance(module, fx.GraphModule) and not any(
        node.meta.get("nn_module_stack") for node in module.graph.nodes
    )


def unflattened(trace: Trace) -> Trace:
    """The trace with the module executions that graph modules among the traced ones were flattened from."""
    if trace.model is None:
        return trace
    if isinstance(trace.model, fx.GraphModule):
        for node in trace.graph.find_nodes(op="placeholder"):
            if _is_lifted(node):
                known = facts.Facts("parameter", "Parameter")
                node.meta["origin"] = dataclasses.replace(origin(node), facts=known)
    same: dict[Span, Span] = {}
    calls = list(trace.calls)
    for path, module in graph_modules(trace.model).items():
        for call in [call for call in trace.calls if call.module is module]:
            calls += _Unflattening(trace, call, path, module).carry_out(same)
    if not same:
        return trace
    notes = (*trace.notes, *_baked(trace.model))
    return dataclasses.replace(trace, calls=tuple(calls), notes=notes, generated=same, classes=_classes(trace.model))


def _baked(model: nn.Module) -> Iterator[str]:
    """Operations of graph modules whose training flag is a constant: `train()` and `eval()` do not change it."""
    found: dict[tuple[str, bool], list[str]] = {}
    for path, module in graph_modules(model).items():
        for node in module.graph.nodes:
            known = facts.of_function(node.target) if node.op == "call_function" else facts.Facts()
            flag = _training(node) if known.kind in ("dropout", "norm") else None
            if flag is not None:
                found.setdefault((known.type, flag), []).append(f"{path}.{node.name}" if path else node.name)
    for (name, flag), nodes in found.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"{name} at {nodes[0]}{more} has training={flag} baked in: train() and eval() do not change it"


def _training(node: fx.Node) -> bool | None:
    """The training flag that a node's operation is given, if it takes one."""
    target: Any = node.target
    if "no_training" in str(target):
        return False
    if isinstance(target, OpOverload):
        names = [argument.name for argument in target._schema.arguments]
    else:
        try:
            names = list(inspect.signature(target).parameters)
        except (TypeError, ValueError):  # a builtin
            return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    flag = given.get("training", given.get("train"))
    return flag if isinstance(flag, bool) else None


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    nodes = [node for module in graph_modules(model).values() for node in module.graph.nodes]
    noted = {(path, cls) for node in nodes for _, path, cls in _entries(node)}
    found = [_class(name) for _, name in noted]
    roots = {cls for path, name in noted if not path and (cls := _class(name)) is not None}
    classes = {cls.__name__: cls for cls in found if cls is not None}
    return classes | ({"GraphModule": roots.pop()} if len(roots) == 1 else {})


def _is_lifted(node: fx.Node) -> bool:
    """Whether a value is only ever a weight, bias or statistic of layers: torch.compile makes them inputs."""
    users = [user for user in node.users if user.op != "output"]  # torch.autograd's graphs return what it saves
    return bool(users) and all(_takes_as_weight(user, node) for user in users)


def _takes_as_weight(user: fx.Node, node: fx.Node) -> bool:
    here, dtype = origin(user).facts, origin(node).dtype
    if dtype is None or not dtype.is_floating_point:
        return False
    if here.kind == "layout":
        return _is_lifted(user)
    if here.type == "mm":
        return node.op != "placeholder" and user.args[0] is not node
    if here.kind not in ("linear", "norm", "embedding"):
        return False
    stream = {"addmm": 1, "baddbmm": 1}.get(here.type, 0)
    return here.kind == "embedding" or (user.args[stream : stream + 1] != (node,) and user.kwargs.get("input") != node)


class _Level(NamedTuple):
    """One entry of a node's module stack."""

    key: str
    path: str
    cls: str
    facts: facts.Facts


class _Unflattening:
    """One execution of one graph module."""

    def __init__(self, trace: Trace, call: Call, path: str, module: fx.GraphModule) -> None:
        self.trace = trace
        self.call = call
        self.path = path
        self.module = module
        self.text = text_of(module)
        self.made: dict[tuple[str, ...], Call] = {}
        self.adds: Counter[tuple[Call, Span | None]] = Counter()
        self.first: dict[tuple[str, Span | None, int], Span] = {}

    def carry_out(self, same: dict[Span, Span]) -> Iterable[Call]:
        """Move every node and call of the generated code below a call of its own module; give the new calls."""
        for call in self.trace.calls:
            if call.parent is self.call and (node := self._source(call.frames)) is not None:
                call.parent, call.frames = self._placed(node, call.frames, str(node.target))
        for node in self.trace.graph.nodes:
            here = origin(node)
            source = self._source(here.frames) if here.call is self.call else None
            if source is None:
                continue
            leaf = str(source.target) if source.op == "call_module" else ""
            call, frames = self._placed(source, here.frames, leaf)
            written = _written(source.stack_trace or "")
            node.meta["origin"] = dataclasses.replace(here, call=call, frames=frames, written=written)
            span = frames[0].span
            same.setdefault(span, self._canonical(call, here, span, written))
        self._connect()
        return self.made.values()

    def _source(self, frames: tuple[Frame, ...]) -> fx.Node | None:
        """The graph's node that a frame of the generated code computes.

        A module called for no result, as exported guards are, has its metadata from some other node.
        """
        node = self.text.node(frames[-1].span) if frames else None
        return None if node is not None and node.op == "call_module" and not node.users else node

    def _placed(self, node: fx.Node, frames: tuple[Frame, ...], leaf: str) -> tuple[Call, tuple[Frame, ...]]:
        """The module execution around a node, and frames that say so."""
        levels = [level for level in _stack(node) if level.path != leaf or not leaf]
        if node.op == "call_module" and levels and levels[-1].cls == type(self._leaf(node)).__qualname__:
            levels.pop()  # a leaf under another path: torch.fx.passes.split_module moves modules
        call = self.call
        for depth, level in enumerate(levels, 1):
            key = tuple(one.key for one in levels[:depth])
            if key not in self.made:
                path = ".".join(part for part in (self.path, level.path) if part)
                around = (*frames[:-1], self._frame(frames[-1], call))
                module = self._module(path)
                own = call.path if module is None else path
                self.made[key] = Call(own, level.cls, level.facts, call, around, module)
            call = self.made[key]
        return call, (*frames[:-1], self._frame(frames[-1], call))

    def _frame(self, frame: Frame, call: Call) -> Frame:
        """The frame as one of a method of the call's module, or of the nearest around it that is still there."""
        while call.module is None and call.parent is not None:
            call = call.parent
        return Frame(
            Place(frame.place.module, f"{call.cls}.forward", frame.place.file, frame.place.line), frame.span, call.path
        )

    def _leaf(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _module(self, path: str) -> nn.Module | None:
        assert self.trace.model is not None
        try:
            return self.trace.model.get_submodule(path)
        except AttributeError:
            return None

    def _canonical(self, call: Call, here: Origin, span: Span, line: Span | None) -> Span:
        """The span that stands for the same add of other executions of the class: the same by number on its line, or
        among all adds where no line is known."""
        if here.facts.type not in _ADDS or call.module is None:
            return span
        self.adds[call, line] += 1
        return self.first.setdefault((call.cls, line, self.adds[call, line]), span)

    def _connect(self) -> None:
        """Find the inputs and outputs of the new calls."""
        new = set(self.made.values())
        returned = set(self.call.outputs)
        for node in self.trace.graph.nodes:
            around = _around(node, new)
            for source in node.all_input_nodes:
                if source.op != "get_attr":
                    for call in around - _around(source, new):
                        _enter(call.inputs, source)
            for call in around:
                if node in returned or any(
                    call not in _around(user, new) for user in node.users if user.op != "output"
                ):
                    _enter(call.outputs, node)


_ADDS = frozenset({"add", "sub", "rsub", "addcmul", "lerp"})


def _enter(nodes: list[fx.Node], node: fx.Node) -> None:
    if node not in nodes and node.op != "get_attr":
        nodes.append(node)


def _around(node: fx.Node, new: set[Call]) -> set[Call]:
    """The new calls that a node is in."""
    found: set[Call] = set()
    call: Call | None = origin(node).call
    while call is not None:
        if call in new:
            found.add(call)
        call = call.parent
    return found


def _written(stack: str) -> Span | None:
    """The innermost line of a tracer's note that is of a model's code: `File "model.py", line 3, in forward`."""
    frames = [found for found in _FRAME.findall(stack) if not _OF_TRACERS.search(found[0].replace(os.sep, "/"))]
    return Span(frames[-1][0], int(frames[-1][1]), -1, int(frames[-1][1]), -1) if frames else None


_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in ', re.MULTILINE)
_OF_TRACERS = re.compile(r"/torch/(nn/modules/module\.py$|(fx|_dynamo|_export|export|_higher_order_ops|utils)/)")


def _entries(node: fx.Node) -> Iterator[tuple[str, str, Any]]:
    """Key, path and class, or its name, of the modules that a node was traced in."""
    for key, entry in (node.meta.get("nn_module_stack") or {}).items():
        path, cls = entry if isinstance(entry, tuple) else ("", entry)
        yield str(key), str(path), cls


def _stack(node: fx.Node) -> Iterator[_Level]:
    """The modules that a node was traced in, outermost first, without the root."""
    for key, path, cls in _entries(node):
        if path:
            name = cls.rpartition(".")[2] if isinstance(cls, str) else cls.__qualname__
            known = _class(cls)
            yield _Level(key, path, name, facts.Facts() if known is None else facts.of_class(known))


def _class(cls: Any) -> type[nn.Module] | None:
    if isinstance(cls, str):
        module, _, name = cls.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None
