"""Adds in a loop over modules: which list is walked, and how its alphas can be walked beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from .. import sources
from ..errors import ConversionError
from ..plan import Loop, Place, Span
from . import code

Refused = str
"""Why not, as a sentence."""


def loop_of(place: Place, add: Span, weights: Sequence[str]) -> Loop | Refused:
    """The loop around an add that ran once for each of several modules.

    Args:
        place: the method.
        add: the add in its text.
        weights: per pass the path, from the owner, of the module with the branch's last weight; on the static route
            one path with "*" for the element.
    """
    around = list(_around(place, add))
    held = _list(weights, len(around))
    if isinstance(held, Refused):
        return held
    name, positions = held
    me = code.self_name(place)
    statement = next((loop for loop in around if _mentions(loop, me, name)), None)
    if statement is None:
        return f"the add runs for each element of {name}, but in no `for` statement over it"
    return _walk(statement, place.file, me, name, positions)


def _list(weights: Sequence[str], loops: int) -> tuple[str, list[int] | None] | Refused:
    """The module list whose elements the paths lie in, and their positions (None if not known)."""
    parts = [path.split(".") for path in weights]
    if len(parts) == 1 and "*" in parts[0]:
        if parts[0].count("*") > 1 and loops > 1:  # in one loop, the second is what a pass unpacks
            return "the add is in nested loops over modules"
        return ".".join(parts[0][: parts[0].index("*")]), None
    for depth in range(min(map(len, parts))):
        names = [path[depth] for path in parts]
        if len(set(names)) == 1:
            continue
        if len(set(names)) < len(names):
            return "the add is in nested loops over modules"
        if depth == 0 or not all(name.isdigit() for name in names):
            return f"one add for the branches of {weights[0]} and {weights[1]}, which are not elements of one list"
        return ".".join(parts[0][:depth]), [int(name) for name in names]
    return "the passes of the loop end in the same module, but differ"


def _around(place: Place, add: Span) -> Iterator[ast.For]:
    """The `for` statements of the method around a span, innermost first."""
    try:
        definition = sources.function(place)
    except ConversionError:
        return
    if definition is None:
        return
    found = [node for node in ast.walk(definition) if isinstance(node, ast.For)]
    around = [node for node in found if sources.span_of(place.file, node).contains(add)]
    yield from sorted(around, key=lambda node: node.lineno, reverse=True)


def _mentions(loop: ast.For, me: str, name: str) -> bool:
    return any(code.is_path(node, me, name) for node in ast.walk(loop))


def _walk(loop: ast.For, file: str, me: str, name: str, positions: list[int] | None) -> Loop | Refused:
    """How the alphas go along with the list that a loop walks."""
    passes = None if positions is None else len(positions)
    start = 0 if positions is None else positions[0]
    if positions is not None and positions != list(range(start, start + len(positions))):
        return f"not every pass of the loop over {name} adds its branch"
    walked = _walked(loop.iter, me, name)
    variable = _count_variable(loop)
    if walked is None:
        indexed = any(
            isinstance(node, ast.Subscript)
            and code.is_path(node.value, me, name)
            and isinstance(node.slice, ast.Name)
            and node.slice.id == variable
            for node in ast.walk(loop)
        )
        if not variable or not indexed or start:
            return f"the loop walks {name} in a way that a list of alphas cannot be walked beside"
        return Loop(sources.span_of(file, loop), name, variable, passes)
    written = sources.segment(sources.span_of(file, walked)).removeprefix(f"{me}.")
    return Loop(sources.span_of(file, loop), written, variable, passes)


def _walked(walk: ast.expr, me: str, name: str) -> ast.expr | None:
    """The list, or the slice of it, that an iterable goes through from its first element on."""
    if code.is_path(walk, me, name):
        return walk
    if isinstance(walk, ast.Subscript) and code.is_path(walk.value, me, name) and isinstance(walk.slice, ast.Slice):
        return walk if walk.slice.step is None else None
    if isinstance(walk, ast.Call) and isinstance(walk.func, ast.Name) and walk.func.id in ("zip", "enumerate"):
        args = walk.args if walk.func.id == "zip" else walk.args[:1]
        return next((found for arg in args if (found := _walked(arg, me, name)) is not None), None)
    return None


def _count_variable(loop: ast.For) -> str:
    """The variable that counts the passes of a loop from 0, "" if it has none."""
    call, target = loop.iter, loop.target
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords or len(call.args) != 1:
        return ""
    if call.func.id == "range" and isinstance(target, ast.Name):
        return target.id
    if call.func.id == "enumerate" and isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name):
        return target.elts[0].id
    return ""
