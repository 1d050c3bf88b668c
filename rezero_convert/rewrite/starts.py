"""Start values that a method sets, as statements at the end of a constructor: `nn.init.zeros_(self.bn2.weight)`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..errors import ConversionError
from ..plan import Gate
from .alphas import alpha_place
from .classes import Names, assigned_values, attribute_chain, makers, method_of, methods_of, self_name, set_by
from .splice import Edit, Source, insert, statements


def start_edits(source: Source, cls: ast.ClassDef, path: str, how: str, factor: float, names: Names) -> list[Edit]:
    """The parameter at `path` below a class is set to 0 (`how` is "zeros") or multiplied by `factor` ("scaled").

    Raises:
        ConversionError: the class does not certainly make it, or code of the file sets it again later.
    """
    child, *rest = path.split(".")
    where = f"{source.file}:{cls.lineno}: {path} of {cls.name}"
    init = method_of(cls, "__init__")
    made = makers(source, cls, child)
    if init is None or not made or any(one.function is not init for one in made) or "*" in rest:
        raise ConversionError(f"{where} is not made in its own constructor, where its start value could be set")
    given = [value for stmt in statements(init.body) for value in assigned_values(stmt, self_name(init), child)]
    if any(isinstance(value, (ast.Constant, ast.IfExp)) for value in given):
        raise ConversionError(f"{where} is made under a condition")
    again = next(_set_again(source, cls, init, path), None)
    if again is not None:
        raise ConversionError(f"{where} is to have another start value, but line {again} sets it later")
    me = self_name(init)
    target = me + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in (child, *rest))
    line = f"{names.nn}.init.zeros_({target})" if how == "zeros" else f"{target}.data.mul_({factor!r})"
    place, stmt = alpha_place(source, init, Gate(None, "", "", ""), bound=False)
    return [insert(source, place, source.indent(stmt.lineno), [line])]


def _set_again(source: Source, cls: ast.ClassDef, init: ast.AST, path: str) -> Iterator[int]:
    """The lines that may set a parameter when its constructor is done: of modules or parameters in a loop or by
    `apply`, or of the class's own in another method."""
    owners = {
        id(node): function for one in source.classes for function in methods_of(one) for node in ast.walk(function)
    }
    for node in source.nodes:
        if not isinstance(node, ast.Call):
            continue
        target = set_by(node) or (attribute_chain(node.args[0]) if node.args else None)
        called = attribute_chain(node.func) or ()
        initial = "init" in called[:-1] or (target is not None and target[-1] in ("weight", "bias"))
        if target is None or not initial or not (called and called[-1].endswith("_")):
            continue
        function = owners.get(id(node))
        own = function is not None and target[0] == self_name(function)
        same = own and ".".join(target[1:]) == path and function in methods_of(cls) and function is not init
        if same or not own:
            yield node.lineno
