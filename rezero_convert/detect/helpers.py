"""Adds inside plain functions: the gate goes on the argument that carries the branch, at the module's call.

So it does for methods of objects that are no modules, and class methods, which have no module to hold an alpha.
`dropout_add(x, residual, ...)` of Bloom is `residual + dropout(x)`: a scalar gate commutes with dropout, with changes
of layout and with factors, so `dropout_add(alpha * x, residual, ...)` is the same.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import NamedTuple

from torch import nn

from .. import sources
from ..capture.facts import is_leaf, of_class, of_function
from ..capture.static import classes, exclusive, traces
from ..capture.static_names import ClassRef, Method
from ..capture.static_names import method as method_of
from ..capture.trace import Call, Frame
from ..errors import ConversionError
from ..plan import Operand, Place, Span
from . import code
from .flow import Flow
from .flow import flow as flow_of

Refused = str
"""Why not, as a sentence."""

_COMMUTING = frozenset({"dropout", "layout"})
_FORMS = frozenset({"shape", "size", "dtype", "device", "ndim", "dim", "numel"})


def argument(flow: Flow, frames: Sequence[Frame], at: Operand, *, shared: bool = False) -> Operand | Refused:
    """The argument, at the call in a module's method, that an operand in a helper function comes from.

    Args:
        flow: of the trace.
        frames: where the add ran: the helper first, the method last.
        at: the operand in the helper's text.
        shared: the helper is a method of the module itself.
    """
    for inner, outer in pairwise(frames):
        name = inner.place.qualname
        function = _function(inner, partial(_passes, flow, frames[-1].owner, code.self_name(inner.place)))
        expression = code.operand(at)
        if function is None or expression is None:
            return f"the add is inside {name}, whose text cannot be read"
        parameters = _parameters(function, expression, expression.lineno)
        if not parameters and _is_method(inner) and not shared:
            return f"the add is inside {name}, which is no module's method: no module there can hold the branch's alpha"
        places = {parameter: _position(inner, function, outer, parameter) for parameter in parameters}
        if len(places) > 1:
            places = {key: place for key, place in places.items() if place is None or not _is_fixed(outer, place)}
        if len(places) != 1:
            return (
                f"the add is inside {name}, where its operand is not one argument, at most through dropout and factors"
            )
        ((parameter, index),) = places.items()
        if index is None:
            return f"the add is inside {name}, and its argument {parameter} is not found at the call {outer.span}"
        line = _read_elsewhere(function, parameter, at, expression)
        if line is not None:
            return f"the add is inside {name}, which reads its argument {parameter} in line {line}, too"
        at = Operand(outer.place, outer.span, index)
    return at


def called(frames: Sequence[Frame], at: Operand) -> Operand | None:
    """The argument, at the call in a module's method, of functions that return what an operation makes of it.

    Args:
        frames: where the operation ran: the function first, the method last.
        at: the operand in the function's text.
    """
    span = at.span
    for inner, outer in pairwise(frames):
        function, read = _function(inner), code.operand(at)
        if function is None or not isinstance(read, ast.Name):
            return None
        returned = [node.value for node in ast.walk(function.definition) if isinstance(node, ast.Return)]
        if isinstance(function.definition, ast.Lambda):
            returned = [function.definition.body]
        if len(returned) != 1 or returned[0] is not code.expression(span):
            return None
        found = passed(inner, outer, read)
        if found is None:
            return None
        at, span = found, outer.span
    return at


def passed(inner: Frame, outer: Frame, read: ast.Name) -> Operand | None:
    """The argument that a variable of a function is, at the call of that function, unless it is set anew before."""
    function = _function(inner)
    if function is None or read.id not in function.names:
        return None
    here = (read.lineno, read.col_offset)
    if any((one.end_lineno or 0, one.end_col_offset or 0) <= here for one in _given(function, read.id)):
        return None
    index = _position(inner, function, outer, read.id)
    return None if index is None else Operand(outer.place, outer.span, index)


class _Function(NamedTuple):
    """The text of a function."""

    file: str
    definition: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    called: frozenset[str]
    """The names that it is called by."""
    names: tuple[str, ...]
    """Its parameters, without the object or class of a method."""
    passes: Callable[[ast.expr], bool | None]
    """Whether a scalar commutes with the module that an expression calls; None if it is not known to be one."""


def _function(frame: Frame, passes: Callable[[ast.expr], bool | None] = lambda called: None) -> _Function | None:
    """The innermost function around a frame's text."""
    try:
        outermost = sources.function(frame.place)
    except ConversionError:
        return None
    if outermost is None:
        return None
    file, parts = frame.span.file, list(ast.walk(outermost))  # breadth first
    around = (node for node in parts if isinstance(node, sources.FunctionNode))
    found = [node for node in around if sources.span_of(file, node).contains(frame.span)][-1]
    given = (node.targets for node in parts if isinstance(node, ast.Assign) and node.value is found)
    called = {target.id for targets in given for target in targets if isinstance(target, ast.Name)}
    return _Function(
        file, found, frozenset({*called, getattr(found, "name", "")}), _names(frame, outermost, found), passes
    )


def _parameters(function: _Function, node: ast.expr, before: int) -> tuple[str, ...]:
    """The parameters that an expression is proportional to: at most through operations that a scalar commutes with."""
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        known = function.passes(called)
        if not (of_function(name).kind in _COMMUTING if known is None else known):
            return ()
        if node.args and not (isinstance(called, ast.Attribute) and _is_value(function, called.value)):
            return _parameters(function, node.args[0], before)
        return _parameters(function, called.value, before) if isinstance(called, ast.Attribute) else ()
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        sides = (node.left, node.right) if isinstance(node.op, ast.Mult) else (node.left,)
        found = [name for side in sides for name in _parameters(function, side, before)]
        return tuple(name for name in found if _reads(function, name) == 1)
    if not isinstance(node, ast.Name):
        return ()
    given = [statement for statement in _given(function, node.id) if statement.lineno < before]
    if given:
        last = max(given, key=lambda statement: statement.lineno)
        return _parameters(function, last.value, last.lineno) if isinstance(last, ast.Assign) else ()
    return (node.id,) if node.id in function.names else ()


def is_shared(inner: Frame, outer: Frame) -> bool:
    """Whether some function's text calls another in several places of one run: a method of its module, or a nested one.

    Methods that each call it once may stand for each other, as two ways to run a model.
    """
    if inner.place != outer.place:
        try:
            return _serves_several(outer.place.file, inner.place)
        except ConversionError:  # a file without a text
            return False
    function = _function(inner)
    outermost = sources.function(outer.place) if function is not None else None
    parts = ast.walk(outermost) if outermost is not None else ()
    named = [node for node in parts if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    called = [node for node in named if function is not None and getattr(node.func, "id", "") in function.called]
    return any_apart(sources.span_of(outer.place.file, node) for node in called)


@sources.cached
def _serves_several(file: str, place: Place) -> bool:
    """Whether a method of a file's classes calls a method on its own module in several places of one run."""
    for name in classes(file):
        definition = sources.class_of(file, name)
        for method in definition.body if definition is not None else ():
            me = code.first_argument(method) if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
            called = [node for node in ast.walk(method) if isinstance(node, ast.Call) and me]
            spans = [sources.span_of(file, node) for node in called if code.is_path(node.func, me, place.name)]
            if definition is not None and any_apart(spans):
                own = method_of(ClassRef(file, name, definition), place.name)
                if isinstance(own, Method) and own.cls.file == place.file and _first(own.node) == place.line:
                    return True
    return False


def any_apart(spans: Iterable[Span]) -> bool:
    """Whether two of several places are not in arms of which one run takes one."""
    pairs = combinations(dict.fromkeys(spans), 2)
    return any(not (sources.has_text(one.file) and exclusive(one, other)) for one, other in pairs)


def _first(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])


def _passes(flow: Flow, owner: str | None, me: str, called: ast.expr) -> bool | None:
    """Whether a scalar commutes with what is called, if that is a module of the owner's: dropout, stochastic depth."""
    written = ast.unparse(called)
    if owner is None or not written.startswith(f"{me}."):
        return None
    path = f"{owner}.{written.removeprefix(f'{me}.')}".lstrip(".")
    module = flow.module(path)
    if module is not None:
        return of_class(type(module)).kind in _COMMUTING or (not is_leaf(type(module)) and _scales(type(module)))
    known = [flow.facts[i] for i, node in enumerate(flow.nodes) if node.op == "call_module" and node.target == path]
    calls = [call for call in flow.trace.calls if call.path == path]
    if flow.trace.model is None and (calls or any(facts.type for facts in known)):
        return all(facts.kind in _COMMUTING for facts in known) and all(_is_scaled(flow, call) for call in calls)
    return None


@sources.cached
def _scales(cls: type[nn.Module]) -> bool:
    """Whether what modules of a class compute of their first input is proportional to it, by their text."""
    try:
        file = inspect.getsourcefile(cls)
        found = traces(file, only=frozenset({cls.__qualname__})) if file is not None else ()
    except (TypeError, ConversionError):  # a class without a file, or a file without a text
        return False
    forward = [trace for trace in found if trace.root.inputs]
    return bool(forward) and all(_is_scaled(whole := flow_of(trace), whole.trace.root) for trace in forward)


def _is_scaled(flow: Flow, call: Call) -> bool:
    """Whether what a module computes is proportional to its first input."""
    start = flow.index[call.inputs[0]] if call.inputs else -1
    ends = [flow.index[node] for node in call.outputs]
    return bool(ends) and all(start >= 0 and _is_proportional(flow, flow.region(start, end)) for end in ends)


def _is_proportional(flow: Flow, region: tuple[int, ...]) -> bool:
    for node in region[1:]:
        varying = [source for source in flow.inputs[node] if source in region]
        product = flow.name(node) in ("mul", "div") and flow.nodes[node].args[0] is flow.nodes[varying[0]]
        if not (flow.facts[node].kind in _COMMUTING or (product and len(varying) == 1)):
            return False
    return bool(region)


def _read_elsewhere(function: _Function, parameter: str, at: Operand, operand: ast.expr) -> int | None:
    """The line in which a function reads an argument, or what it makes of it, other than for the add; None if none.

    An arm that does not run together with the add may add it, too.
    """

    def carries(node: ast.expr) -> bool:
        return _parameters(function, node, node.lineno) == (parameter,)

    parts = list(ast.walk(function.definition))
    expected = [operand]
    for node in parts:
        sides: list[ast.expr] = []
        if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            sides = [node.value]
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, (ast.Add, ast.Sub)):
            span = sources.span_of(function.file, node)
            both = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
            sides = both if exclusive(at.span, span) else []
        expected += [side for side in sides if carries(side)]
    known = {id(node) for one in expected for node in ast.walk(one)}
    known |= {id(node.value) for node in parts if isinstance(node, ast.Attribute) and node.attr in _FORMS}
    known |= {id(node.left) for node in parts if isinstance(node, ast.Compare)}
    reads = [node for node in parts if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    if at.receiver and isinstance(operand, ast.Name):  # `x.add_(y)`: from there on x is the sum
        known |= {id(node) for node in reads if node.id == operand.id and node.lineno > operand.lineno}
    return min((node.lineno for node in reads if id(node) not in known and carries(node)), default=None)


def _given(function: _Function, name: str) -> list[ast.Assign | ast.AugAssign]:
    """The statements that give a variable a value."""
    return [
        statement
        for statement in ast.walk(function.definition)
        if (isinstance(statement, ast.Assign) and any(_is_name(target, name) for target in statement.targets))
        or (isinstance(statement, ast.AugAssign) and _is_name(statement.target, name))
    ]


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _reads(function: _Function, parameter: str) -> int:
    """How often the text reads a parameter before it gives it another value."""
    nodes = [node for node in ast.walk(function.definition) if isinstance(node, ast.Name) and node.id == parameter]
    last = min((statement.lineno for statement in _given(function, parameter)), default=None)
    return sum(isinstance(node.ctx, ast.Load) and (last is None or node.lineno <= last) for node in nodes)


def _is_fixed(outer: Frame, index: int | str) -> bool:
    """Whether a call's argument is a constant or an attribute, so that it is not computed there."""
    given = code.operand(Operand(outer.place, outer.span, index))
    while isinstance(given, (ast.UnaryOp, ast.Attribute)):
        given = given.operand if isinstance(given, ast.UnaryOp) else given.value
        if isinstance(given, ast.Name):
            return True
    return isinstance(given, ast.Constant)


def _is_value(function: _Function, node: ast.expr) -> bool:
    """Whether what stands before a dot is a value of the function, not a module like `F`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and (
        node.id in function.names
        or any(
            isinstance(n, ast.Name) and n.id == node.id and isinstance(n.ctx, ast.Store)
            for n in ast.walk(function.definition)
        )
    )


def _names(frame: Frame, outermost: sources.FunctionNode, found: sources.FunctionNode) -> tuple[str, ...]:
    args = found.args
    every = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return tuple(every[1:] if found is outermost and _has_receiver(frame, found) else every)


def _position(inner: Frame, function: _Function, outer: Frame, parameter: str) -> int | str | None:
    """Where a call passes a parameter of the function it calls."""
    call = code.expression(outer.span)
    if not isinstance(call, ast.Call) or not _is_called(inner, function, call):
        return None
    if any(keyword.arg == parameter for keyword in call.keywords):
        return parameter
    definition = function.definition
    positional = [arg.arg for arg in (*definition.args.posonlyargs, *definition.args.args)]
    if parameter not in positional:
        return None
    index = positional.index(parameter) - _is_bound(inner, function, outer, call)
    plain = not any(isinstance(arg, ast.Starred) for arg in call.args[: index + 1])
    return index if plain and 0 <= index < len(call.args) else None


def _is_called(inner: Frame, function: _Function, call: ast.Call) -> bool:
    """Whether a call is one of a method, or of a function in it, by its name; functions may be imported by another."""
    on = call.func
    name = on.attr if isinstance(on, ast.Attribute) else getattr(on, "id", "")
    return not _is_method(inner) or name in function.called or "__call__" in function.called


def _is_bound(inner: Frame, function: _Function, outer: Frame, call: ast.Call) -> bool:
    """Whether a call leaves out the first parameter of what it calls: the object or class of a method."""
    definition = function.definition
    if definition is not sources.function(inner.place) or not _has_receiver(inner, definition):
        return False
    if "classmethod" in _decorators(definition):
        return True
    on = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    name = on.attr if isinstance(on, ast.Attribute) else getattr(on, "id", "")
    given = call.args[0] if call.args else None
    passed = isinstance(given, ast.Name) and outer.owner is not None and given.id == code.self_name(outer.place)
    return name != inner.place.cls.rpartition(".")[2] and not passed


def _has_receiver(frame: Frame, definition: sources.FunctionNode) -> bool:
    """Whether the first parameter is the object or class of a method."""
    return _is_method(frame) and "staticmethod" not in _decorators(definition)


def _decorators(definition: sources.FunctionNode) -> set[str]:
    return {getattr(decorator, "id", "") for decorator in getattr(definition, "decorator_list", ())}


def _is_method(frame: Frame) -> bool:
    return frame.place.cls.rpartition(".")[2] not in ("", "<locals>")
