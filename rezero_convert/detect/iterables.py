"""What a `for` clause walks: local variables and wrappers that change no element taken out of its text."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from .. import sources
from ..errors import ConversionError
from ..plan import Place

VALUES, ITEMS = ("values", "children"), ("items", "named_children")
"""Methods of a dictionary or module that walk its elements, by themselves and with their keys."""

_EXPANDED = (ast.Attribute, ast.Subscript, ast.Call, ast.Tuple, ast.List, ast.Dict)


@sources.cached
def variables(place: Place) -> Mapping[str, ast.expr]:
    """The local variables of a method that are set once and not changed after, with their values."""
    try:
        definition = sources.function(place)
    except ConversionError:
        return {}
    nodes = list(ast.walk(definition)) if definition is not None else []
    names = [node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    stored = Counter([*names, *(node.arg for node in nodes if isinstance(node, ast.arg))])
    changed = {name for node in nodes for name in _changed(node)}
    values: dict[str, ast.expr] = {}
    for node in nodes:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(target, ast.Name) and node.value is not None:
            values[target.id] = node.value
    return {name: value for name, value in values.items() if stored[name] == 1 and name not in changed}


def _changed(node: ast.AST) -> set[str]:
    """The variable whose content a statement or call changes: `layers[0] = ...`, `layers.append(...)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        held: ast.expr | None = node.func.value if node.func.attr not in ("keys", *VALUES, *ITEMS) else None
    else:
        held = node.value if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) else None
    return {held.id} if isinstance(held, ast.Name) else set()


def expanded(node: ast.expr, values: Mapping[str, ast.expr]) -> ast.expr:
    """An expression with the values of variables in their place, and without `list(...)` and `tuple(...)`.

    What is as in the text is the very node of the text; what is put together has no line.
    """
    if isinstance(node, ast.Name) and node.id in values:
        return expanded(values[node.id], {name: value for name, value in values.items() if name != node.id})
    inner = wrapped(node, "list") or wrapped(node, "tuple")
    if inner is not None:
        return expanded(inner, values)
    if not isinstance(node, _EXPANDED):
        return node
    fields = {name: value if name == "slice" else _expanded(value, values) for name, value in ast.iter_fields(node)}
    same = all(fields[name] is value for name, value in ast.iter_fields(node))
    made: Any = type(node)
    return node if same else cast(ast.expr, made(**fields))


def _expanded(value: object, values: Mapping[str, ast.expr]) -> object:
    """The field of an expression, expanded."""
    if isinstance(value, list):
        items = [_expanded(item, values) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    return expanded(value, values) if isinstance(value, ast.expr) else value


def wrapped(node: ast.expr, name: str) -> ast.expr | None:
    """The one argument of a call of a built-in function; None for anything else."""
    plain = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    if plain and isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
        return node.args[0]
    return None


def counts(node: ast.expr) -> tuple[int, int] | None:
    """First number and step of a `range` that counts up, or down to 0, the first as 0; None for anything else."""
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
    if not named or not isinstance(node, ast.Call) or node.keywords or not 1 <= len(node.args) <= 3:
        return None
    given = [_number(arg) for arg in node.args]
    if len(given) == 1:
        return 0, 1
    first, end, step = (*given, 1)[:3]
    if (end, step) == (-1, -1):
        return 0, 1
    return (first, step) if first is not None and first >= 0 and step is not None and step > 0 else None


def _number(node: ast.expr) -> int | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, int) else None
