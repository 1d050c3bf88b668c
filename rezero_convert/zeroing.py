"""What fills parameters with zeros, as written in a file's text."""

from __future__ import annotations

import ast
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef

_ARGUMENTS = {"normal_": ("mean", "std"), "xavier_uniform_": ("gain",),
              "xavier_normal_": ("gain",), "orthogonal_": ("gain",)}  # fmt: skip
"""The arguments of initialisers that fill with zeros if these are 0; a mean is 0 if it is not given."""


def fills_zero(call: ast.Call) -> bool:
    """Whether a call of an initialiser fills with zeros: `zeros_(w)`, `w.fill_(0)`, `xavier_uniform_(w, gain=0)`."""
    name = called(call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("zeros_", "zero_"):
        return True
    if name in ("constant_", "fill_", "mul_"):
        return any(map(_is_zero, (*call.args[-1:], *(given[key] for key in ("val", "value") if key in given))))
    if name not in _ARGUMENTS:
        return False
    of_tensor = bool(call.args) and not isinstance(call.args[0], ast.Constant)
    given |= dict(zip(_ARGUMENTS[name], call.args[of_tensor:], strict=False))
    return all(_is_zero(given[key]) if key in given else key == "mean" for key in _ARGUMENTS[name])


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value == 0


def called(call: ast.Call) -> str:
    """The last name of what a call calls."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def filled_by(loop: ast.For) -> list[tuple[ast.expr, tuple[str, ...]]]:
    """What a loop over parameters fills with zeros: the expressions that it goes through, with names below them.

    `for p in m.parameters(): p.zero_()` fills `m`'s weight and bias, `for p in (m.weight, m.bias): ...` what it says.
    """
    calls = [node for node in ast.walk(loop) if isinstance(node, ast.Call) and fills_zero(node)]
    read = {node.id for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)}
    if not isinstance(loop.target, ast.Name) or loop.target.id not in read:
        return []
    if isinstance(loop.iter, (ast.Tuple, ast.List)):
        return [(part, ()) for part in loop.iter.elts]
    walked = loop.iter.func if isinstance(loop.iter, ast.Call) else None
    if isinstance(walked, ast.Attribute) and walked.attr == "parameters":
        return [(walked.value, ("weight",)), (walked.value, ("bias",))]
    return []


def zeroes(function: Function) -> bool:
    """Whether a function fills all parameters of its argument with zeros, in a loop over `module.parameters()`."""
    loops = (node for node in ast.walk(function) if isinstance(node, ast.For))
    return any(names for loop in loops for _, names in filled_by(loop))


def held(function: Function) -> dict[str, tuple[str, ...]]:
    """Where a method puts its local variables, as paths below `self`: `self.net = nn.Sequential(first, last)`."""
    places: dict[str, list[tuple[str, ...]]] = {}
    stored: list[str] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.append(node.id)
        match node:
            case ast.Assign([ast.Attribute(ast.Name(me), attribute)], value) if me in _first(function):
                for name, below in _variables(value):
                    places.setdefault(name, []).append((attribute, *below))
    return {name: found[0] for name, found in places.items() if len(found) == 1 == stored.count(name)}


def _first(function: Function) -> list[str]:
    return [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)][:1]


def _variables(value: ast.expr) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(value, ast.Name):
        yield value.id, ()
    if isinstance(value, ast.Call) and called(value) == "Sequential":
        for number, part in enumerate(value.args):
            if isinstance(part, ast.Starred):
                return
            if isinstance(part, ast.Name):
                yield part.id, (str(number),)
