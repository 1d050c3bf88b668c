"""Adds inside plain functions: the gate goes on the argument that carries the branch, at the module's call.

So it does for methods of objects that are no modules, and class methods, which have no module to hold an alpha.
`dropout_add(x, residual, ...)` of Bloom is `residual + dropout(x)`: a scalar gate commutes with dropout, with changes
of layout and with factors, so `dropout_add(alpha * x, residual, ...)` is the same.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import pairwise

from .. import sources
from ..capture.facts import of_function
from ..capture.trace import Frame
from ..errors import ConversionError
from ..plan import Operand
from ..sources import FunctionNode
from . import code

Refused = str
"""Why not, as a sentence."""

_COMMUTING = frozenset({"dropout", "layout"})


def argument(frames: Sequence[Frame], at: Operand) -> Operand | Refused:
    """The argument, at the call in a module's method, that an operand in a helper function comes from.

    Args:
        frames: where the add ran: the helper first, the method last.
        at: the operand in the helper's text.
    """
    for inner, outer in pairwise(frames):
        name = inner.place.qualname
        expression = code.operand(at)
        definition = _definition(inner, expression)
        if definition is None or expression is None:
            return f"the add is inside {name}, whose text cannot be read"
        parameters = _parameters(definition, expression, expression.lineno)
        if not parameters and _is_method(inner):
            return f"the add is inside {name}, which is no module's method: no module there can hold the branch's alpha"
        places = {parameter: _position(inner, definition, outer, parameter) for parameter in parameters}
        if len(places) > 1:
            places = {key: place for key, place in places.items() if place is None or not _is_fixed(outer, place)}
        if len(places) != 1:
            return (
                f"the add is inside {name}, where its operand is not one argument, at most through dropout and factors"
            )
        ((parameter, index),) = places.items()
        if index is None:
            return f"the add is inside {name}, and its argument {parameter} is not found at the call {outer.span}"
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
        read = code.operand(at)
        definition = _definition(inner, read)
        if definition is None or not isinstance(read, ast.Name):
            return None
        returned = [node.value for node in ast.walk(definition) if isinstance(node, ast.Return)]
        if isinstance(definition, ast.Lambda):
            returned = [definition.body]
        if len(returned) != 1 or returned[0] is not code.expression(span):
            return None
        found = passed(inner, outer, read)
        if found is None:
            return None
        at, span = found, outer.span
    return at


def passed(inner: Frame, outer: Frame, read: ast.Name) -> Operand | None:
    """The argument that a variable of a function is, at the call of that function, unless it is set anew before."""
    definition = _definition(inner, read)
    if definition is None or read.id not in _names(definition):
        return None
    here = (read.lineno, read.col_offset)
    if any((one.end_lineno or 0, one.end_col_offset or 0) <= here for one in _given(definition, read.id)):
        return None
    index = _position(inner, definition, outer, read.id)
    return None if index is None else Operand(outer.place, outer.span, index)


def _definition(frame: Frame, inside: ast.AST | None) -> FunctionNode | None:
    """The function that a frame runs: the innermost around an expression, a lambda or a nested function perhaps."""
    try:
        whole = sources.function(frame.place)
    except ConversionError:
        return None
    around = [node for node in ast.walk(whole) if isinstance(node, FunctionNode)] if whole is not None else []
    return next((node for node in reversed(around) if any(part is inside for part in ast.walk(node))), None)


def _parameters(definition: FunctionNode, node: ast.expr, before: int) -> tuple[str, ...]:
    """The parameters that an expression is proportional to: at most through operations that a scalar commutes with."""
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if of_function(name).kind not in _COMMUTING:
            return ()
        if node.args and not (isinstance(function, ast.Attribute) and _is_value(definition, function.value)):
            return _parameters(definition, node.args[0], before)
        return _parameters(definition, function.value, before) if isinstance(function, ast.Attribute) else ()
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        sides = (node.left, node.right) if isinstance(node.op, ast.Mult) else (node.left,)
        found = [name for side in sides for name in _parameters(definition, side, before)]
        return tuple(name for name in found if _reads(definition, name) == 1)
    if not isinstance(node, ast.Name):
        return ()
    given = [statement for statement in _given(definition, node.id) if statement.lineno < before]
    if given:
        last = max(given, key=lambda statement: statement.lineno)
        return _parameters(definition, last.value, last.lineno)
    return (node.id,) if node.id in _names(definition) else ()


def _given(definition: FunctionNode, name: str) -> list[ast.Assign]:
    """The statements that give a variable a value."""
    return [
        statement
        for statement in ast.walk(definition)
        if isinstance(statement, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)
    ]


def _reads(definition: FunctionNode, parameter: str) -> int:
    """How often the text reads a parameter before it gives it another value."""
    nodes = [node for node in ast.walk(definition) if isinstance(node, ast.Name) and node.id == parameter]
    last = min((statement.lineno for statement in _given(definition, parameter)), default=None)
    return sum(isinstance(node.ctx, ast.Load) and (last is None or node.lineno <= last) for node in nodes)


def _is_fixed(outer: Frame, index: int | str) -> bool:
    """Whether a call's argument is a constant or an attribute, so that it is not computed there."""
    given = code.operand(Operand(outer.place, outer.span, index))
    while isinstance(given, (ast.UnaryOp, ast.Attribute)):
        given = given.operand if isinstance(given, ast.UnaryOp) else given.value
        if isinstance(given, ast.Name):
            return True
    return isinstance(given, ast.Constant)


def _is_value(definition: FunctionNode, node: ast.expr) -> bool:
    """Whether what stands before a dot is a value of the function, not a module like `F`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and (
        node.id in _names(definition)
        or any(
            isinstance(n, ast.Name) and n.id == node.id and isinstance(n.ctx, ast.Store) for n in ast.walk(definition)
        )
    )


def _names(definition: FunctionNode) -> list[str]:
    args = definition.args
    return [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def _position(inner: Frame, definition: FunctionNode, outer: Frame, parameter: str) -> int | str | None:
    """Where a call passes a parameter of the function it calls."""
    call = code.expression(outer.span)
    if not isinstance(call, ast.Call):
        return None
    if any(keyword.arg == parameter for keyword in call.keywords):
        return parameter
    positional = [arg.arg for arg in (*definition.args.posonlyargs, *definition.args.args)]
    if parameter not in positional:
        return None
    index = positional.index(parameter) - _is_bound(inner, definition, call)
    plain = not any(isinstance(arg, ast.Starred) for arg in call.args[: index + 1])
    return index if plain and index < len(call.args) else None


def _is_bound(inner: Frame, definition: FunctionNode, call: ast.Call) -> bool:
    """Whether a call leaves out the first parameter of what it calls: the object or class of a method."""
    names = {getattr(decorator, "id", "") for decorator in getattr(definition, "decorator_list", ())}
    nested = definition is not sources.function(inner.place)
    if nested or not _is_method(inner) or "staticmethod" in names:
        return False
    on = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    name = on.attr if isinstance(on, ast.Attribute) else getattr(on, "id", "")
    return "classmethod" in names or name != inner.place.cls.rpartition(".")[2]


def _is_method(frame: Frame) -> bool:
    return frame.place.cls.rpartition(".")[2] not in ("", "<locals>")
