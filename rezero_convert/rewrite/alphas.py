"""The lines in `__init__` that make new alphas."""

from __future__ import annotations

import ast
import re

from ..errors import ConversionError
from ..plan import Gate
from . import carries
from .classes import (
    REGISTER,
    Names,
    assigned_values,
    attribute_chain,
    bases_of,
    descendants,
    is_folded,
    last_name,
    literal,
    method_of,
    new_method,
    self_name,
    unfolded,
)
from .jobs import Jobs
from .splice import Edit, Function, Source, after, insert, statements


def alpha_edits(source: Source, jobs: Jobs, names: Names) -> list[Edit]:
    edits: list[Edit] = []
    by_class: dict[int, list[tuple[Gate, bool]]] = {}
    for index, gate, bound in jobs.gates:
        by_class.setdefault(index, []).append((gate, bound))
    for index, gates in by_class.items():
        for cls in alpha_makers(source, source.classes[index]):
            edits += _alphas_of(source, cls, gates, names)
    return edits


def unfold_edits(source: Source, jobs: Jobs) -> list[Edit]:
    """One-line constructors that get alphas, over several lines: other edits of the same line are left room."""
    makers = {cls: None for index, *_ in jobs.gates for cls in alpha_makers(source, source.classes[index])}
    inits = [(cls, init) for cls in makers for name in _MAKING if (init := method_of(cls, name)) is not None]
    return [unfolded(source, cls, init, []) for cls, init in inits if is_folded(source, init)]


_MAKING = ("__init__", "__post_init__")


def alpha_makers(source: Source, cls: ast.ClassDef) -> list[ast.ClassDef]:
    """Whose `__init__` must make the alphas of a method of `cls`: its own, and those that do not run it."""
    below = [
        other
        for other in descendants(source, cls)
        if (init := method_of(other, "__init__")) is not None and not _calls_base(init)
    ]
    mixin = (
        not [base for base in cls.bases if last_name(base) not in ("object", "ABC")]
        and method_of(cls, "__init__") is None
    )
    if not mixin:
        return [cls, *below]
    heirs = [other for other in descendants(source, cls) if cls in bases_of(source, other)]
    if not heirs:
        raise ConversionError(f"{source.file}:{cls.lineno}: {cls.name} has no base class that makes it a module")
    return heirs


def _calls_base(init: Function) -> bool:
    """Whether an `__init__` runs that of a base class other than `nn.Module`."""
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
            value = node.func.value
            if isinstance(value, ast.Call) and last_name(value.func) == "super":
                return True
            if last_name(value) != "Module":
                return True
    return False


def _alphas_of(source: Source, cls: ast.ClassDef, gates: list[tuple[Gate, bool]], names: Names) -> list[Edit]:
    init = method_of(cls, "__init__")
    if (
        any(last_name(d.func if isinstance(d, ast.Call) else d) == "dataclass" for d in cls.decorator_list)
        and init is None
    ):
        init = method_of(cls, "__post_init__")
        if init is None:
            raise ConversionError(
                f"{source.file}:{cls.lineno}: dataclass {cls.name} has no __post_init__ for its alphas"
            )
    if init is None:
        lines = [line for gate, _ in gates for line in _lines(gate, "", names, "self")]
        return [
            new_method(
                source, cls, ["def __init__(self, *args, **kwargs):"], "super().__init__(*args, **kwargs)", lines
            )
        ]
    edits = []
    for gate, bound in gates:
        place, stmt = alpha_place(source, init, gate, bound)
        me = self_name(init)
        lines = _lines(gate, _factory(source, init, gate.child), names, me)
        edits.append(insert(source, place, source.indent(stmt.lineno), lines))
    return edits


def _lines(gate: Gate, factory: str, names: Names, me: str) -> list[str]:
    """The statements that make a gate."""
    if gate.init is None:
        raise ConversionError(f"{gate.at.span if gate.at else ''}: {gate.alpha} is new and has no start value")
    size = f"{me}.{gate.size}" if gate.size and not gate.loops else ", ".join(map(str, gate.shape))
    if gate.carries is not None:
        return carries.written(gate, gate.init, size, factory, names.nn, me)
    return [f"{me}.{gate.alpha} = {_parameter(gate, size, factory, names, me)}"]


def _parameter(gate: Gate, size: str, factory: str, names: Names, me: str) -> str:
    if not gate.shape:
        raise ConversionError(f"{gate.at.span if gate.at else ''}: {gate.alpha} must not have zero dimensions")
    if gate.init in (0.0, 1.0):
        value = f"{names.torch}.{'ones' if gate.init else 'zeros'}({size}{factory})"
    elif len(gate.shape) == 1 and gate.shape != (1,):
        value = f"{gate.init!r} * {names.torch}.ones({size}{factory})"
    else:
        value = f"{names.torch}.full(({size}{',' if len(gate.shape) == 1 else ''}), {gate.init!r}{factory})"
    made = f"{names.parameter}({value}{'' if gate.trainable else ', requires_grad=False'})"
    if not gate.loops:
        return made
    made = f"{names.parameter}List([{made} for _ in {_renamed(gate.loops[-1].modules, me)}])"
    for loop in reversed(gate.loops[:-1]):
        made = f"{names.nn}.ModuleList([{made} for {loop.variable} in {_renamed(loop.modules, me)}])"
    return made


def _renamed(modules: str, me: str) -> str:
    return modules if me == "self" else re.sub(r"\bself\b", me, modules)


def _factory(source: Source, init: Function, child: str) -> str:
    """The device and dtype arguments that the branch's module is made with, to be repeated for the alpha."""
    me = self_name(init)
    values = [
        v
        for s in statements(init.body)
        for v in (assigned_values(s, me, child.partition(".")[0]) if child else _any_value(s, me))
    ]
    factories = {
        name
        for stmt in statements(init.body)
        if isinstance(stmt, ast.Assign) and _is_factory(stmt.value)
        for name, *rest in filter(None, map(attribute_chain, stmt.targets))
        if not rest
    }
    for node in (n for value in values for n in ast.walk(value)):
        if isinstance(node, ast.Call):
            spread = [
                k for k in node.keywords if k.arg is None and isinstance(k.value, ast.Name) and k.value.id in factories
            ]
            given = [k for k in node.keywords if k.arg in ("device", "dtype")]
            if spread:
                return f", **{source.segment(spread[0].value)}"
            if given:
                return "".join(f", {k.arg}={source.segment(k.value)}" for k in given)
    return ""


def _any_value(stmt: ast.stmt, me: str) -> list[ast.expr]:
    if isinstance(stmt, ast.Assign) and any((attribute_chain(t) or ("",))[0] == me for t in stmt.targets):
        return [stmt.value]
    return []


def _is_factory(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict):
        keys: set[object] = {literal(key) if key is not None else None for key in value.keys}
    elif isinstance(value, ast.Call) and last_name(value.func) == "dict" and not value.args:
        keys = {keyword.arg for keyword in value.keywords}
    else:
        return False
    return bool(keys) and keys <= {"device", "dtype"}


def alpha_place(source: Source, init: Function, gate: Gate, bound: bool) -> tuple[Edit, ast.stmt]:
    """Where the alpha's line goes, and a statement that has its indentation."""
    child = gate.child.partition(".")[0]
    makers = [
        stmt
        for stmt in statements(init.body)
        for value in (assigned_values(stmt, self_name(init), child) if child else ())
        if not (isinstance(value, ast.Constant) and value.value is None)
    ]
    if gate.loops:  # the list may be filled after it is made
        users = [stmt for stmt in init.body if _mentions(stmt, self_name(init), gate.loops[0].modules)]
        if users:
            return after(source, users[-1], init.body), users[-1]
    if makers:
        top = next(s for s in init.body if s.lineno <= makers[-1].lineno and makers[-1].lineno <= (s.end_lineno or 0))
        suite = _arm(top, makers) if bound else None
        if suite is not None and suite[0].lineno > top.lineno:
            return after(source, makers[-1], suite), makers[-1]
        return after(source, top, init.body), top
    last = len(init.body)
    while last and (_is_finish(init.body[last - 1], self_name(init)) or isinstance(init.body[last - 1], ast.Return)):
        last -= 1
    if not last:
        line = init.body[0].lineno
        while source.is_comment(line - 1):
            line -= 1
        return Edit(source.line_start(line), source.line_start(line), ""), init.body[0]
    return after(source, init.body[last - 1], init.body), init.body[last - 1]


def _mentions(stmt: ast.stmt, me: str, modules: str) -> bool:
    names = re.findall(r"\bself\.(\w+)", modules)
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == me
        for node in ast.walk(stmt)
    )


def _arm(top: ast.stmt, makers: list[ast.stmt]) -> list[ast.stmt] | None:
    """The one arm of an `if` in which all the statements are."""
    if not isinstance(top, ast.If):
        return None
    for suite in (top.body, top.orelse):
        if all(stmt in suite for stmt in makers):
            return suite
        for inner in suite:
            found = _arm(inner, makers)
            if found is not None:
                return found
    return None


def _is_finish(stmt: ast.stmt, me: str) -> bool:
    """A call of a method on the finished module: `self.post_init()`, `self.apply(...)`."""
    if not isinstance(stmt, ast.Expr) or not isinstance(stmt.value, ast.Call):
        return False
    chain = attribute_chain(stmt.value.func)
    return chain is not None and len(chain) == 2 and chain[0] == me and chain[1] not in REGISTER
