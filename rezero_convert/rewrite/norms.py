"""Norms that go, the biases they leave behind, zero initializations undone."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import ConversionError
from ..plan import Span
from ..zeroing import fills_zero
from .classes import (
    Made,
    Names,
    assigned_values,
    attribute_chain,
    constructor_calls,
    find_class,
    init_calls,
    last_name,
    literal,
    makers,
    methods_of,
    nested_suites,
    related,
    resolve,
    self_name,
)
from .gates import refilled
from .splice import Edit, Function, Source, after, insert, statements


class NormStays(ConversionError):
    """A norm that was to go cannot, says the message; the rest of the plan can be carried out with it at its place."""

    def __init__(self, message: str, calls: Collection[Span]) -> None:
        super().__init__(message)
        self.calls = frozenset(calls)


@dataclass(frozen=True, slots=True)
class Gone:
    """An attribute of some classes, as a path on `self`, that nothing may read any more."""

    family: list[ast.ClassDef]
    chain: tuple[str, ...]
    calls: frozenset[Span]
    """The calls of the norm, which the plan takes out."""


def drop(
    source: Source,
    cls: ast.ClassDef,
    path: str,
    calls: frozenset[Span],
    reads: list[Gone],
    unmade: dict[ast.stmt, list[tuple[str, str]]],
) -> tuple[set[ast.stmt], list[str]]:
    """Statements that go with a norm that is not called any more, and remarks.

    Args:
        reads: gets what must not be read any more.
        unmade: gets the assignments, with what goes of each: the names of `self` and of the attribute.
    """
    *above, attribute = path.split(".")
    hosts = [cls] if not above else _classes_at(source, cls, above)
    made = [item for host in hosts for item in makers(source, host, attribute)]
    if not made:
        note = f"{source.file}:{cls.lineno}: {path} of {cls.name} is not called now, but made elsewhere; it stays"
        return set(), [note]
    leaves: set[ast.stmt] = set()
    families = [related(source, made_in) for made_in in dict.fromkeys(item.host for item in made)]
    for family in families:
        reads.append(Gone(family, (attribute,), calls))
        for member in family:
            for function in methods_of(member):
                for stmt in statements(function.body):
                    own = (self_name(function), attribute)
                    if assigned_values(stmt, *own):
                        unmade.setdefault(stmt, []).append(own)
                    elif isinstance(stmt, ast.Assign) and all(_is_below(target, own) for target in stmt.targets):
                        leaves.add(stmt)  # self.norm.bias = None
            leaves |= {
                s for s in member.body if isinstance(s, ast.AnnAssign) and attribute_chain(s.target) == (attribute,)
            }
        leaves |= {call.stmt for call in init_calls(source, family, attribute)}
    if above:
        reads.append(Gone(related(source, cls), (*above, attribute), calls))
    return leaves, []


def _is_below(node: ast.expr, chain: tuple[str, ...]) -> bool:
    """Whether an expression is an attribute of what is at a path, or further down."""
    found = attribute_chain(node) or ()
    return len(found) > len(chain) and found[: len(chain)] == chain


def _classes_at(source: Source, cls: ast.ClassDef, parts: list[str]) -> list[ast.ClassDef]:
    found = []
    for _, value, _ in resolve(source, cls, parts):
        found += [
            c for c in (find_class(source, last_name(call.func)) for call in constructor_calls(value)) if c is not None
        ]
    return list(dict.fromkeys(found))


def unassigned(source: Source, stmt: ast.stmt, gone: Collection[tuple[str, str]]) -> Edit | None:
    """The statement without its assignments to these attributes; None if nothing else is left of it.

    Raises:
        ConversionError: the statement does more than that.
    """
    if not isinstance(stmt, ast.Assign):
        return None
    targets = [target for target in stmt.targets if attribute_chain(target) not in gone]
    if not targets:
        return None
    start, end = source.span(stmt)
    if len(targets) < len(stmt.targets):
        return Edit(start, end, " = ".join(source.segment(node) for node in (*targets, stmt.value)))
    target = targets[0]
    if len(targets) > 1 or not isinstance(target, ast.Tuple) or not isinstance(stmt.value, ast.Tuple):
        names = ", ".join(name for _, name in gone)
        raise ConversionError(f"{source.file}:{stmt.lineno}: {names} cannot be taken out of this assignment")
    left = [
        (source.segment(a), source.segment(b))
        for a, b in zip(target.elts, stmt.value.elts, strict=True)
        if attribute_chain(a) not in gone
    ]
    return Edit(start, end, f"{', '.join(a for a, _ in left)} = {', '.join(b for _, b in left)}") if left else None


def check_reads(source: Source, norm: Gone, gone: set[ast.stmt]) -> None:
    """See that an attribute that goes is not read outside of what goes with it.

    Raises:
        NormStays: it is; the message says where.
    """
    chain = norm.chain
    left_out = {id(node) for stmt in gone for node in ast.walk(stmt)}
    for cls in norm.family:
        for function in methods_of(cls):
            for node in ast.walk(function):
                if id(node) in left_out:
                    continue
                read = isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Load, ast.Del))
                named = (
                    isinstance(node, ast.Call)
                    and last_name(node.func) == "getattr"
                    and len(node.args) > 1
                    and (literal(node.args[1]),) == chain
                )
                if (read and attribute_chain(node) == (self_name(function), *chain)) or named:
                    line = getattr(node, "lineno", cls.lineno)
                    raise NormStays(f"it is still read at {source.file}:{line}", norm.calls)


def slot_edits(source: Source, cls: ast.ClassDef, path: str, calls: frozenset[Span], names: Names) -> list[Edit]:
    """The element at `path` becomes an identity, or what makes all elements of a list.

    Raises:
        NormStays: its text is not found.
    """
    edits = []
    for host, value, made in _slots(source, cls, path) or _elements_of(source, cls, path):
        if host not in related(source, cls):
            _check_only_user(source, host, cls, calls)
        where = made.value if made is not None else value
        edits.append(Edit(*source.span(where), f"{names.nn}.Identity()"))
    if not edits:
        raise NormStays("it is held in a list that is not written out", calls)
    return edits


def _slots(source: Source, cls: ast.ClassDef, path: str) -> list[tuple[ast.ClassDef, ast.expr, Made | None]]:
    return resolve(source, cls, path.split(".")) if "*" not in path else []


def _elements_of(source: Source, cls: ast.ClassDef, path: str) -> list[tuple[ast.ClassDef, ast.expr, Made | None]]:
    """What makes the elements of a list of the class's own, if it makes all of them alike."""
    attribute, *below = path.split(".")
    found = (
        resolve(source, cls, [attribute, "*"]) if len(below) == 1 and (below[0] == "*" or below[0].isdigit()) else []
    )
    made = {source.segment(value.func) for _, value, _ in found if isinstance(value, ast.Call)}
    return found if len(made) == 1 else []


def check_lists(source: Source, slots: Iterable[tuple[int, str, frozenset[Span]]]) -> None:
    """See that attributes, and lists whose elements go together, have no use but calls that the plan takes out.

    Args:
        source: the text as it was.
        slots: class, path below it, calls.

    Raises:
        NormStays: one has.
    """
    slots = tuple(slots)
    for index, path, calls in slots:
        cls, attribute = source.classes[index], path.partition(".")[0]
        if "." in path and (_slots(source, cls, path) or not _elements_of(source, cls, path)):
            continue
        taken = {span for number, other, spans in slots if (number, other.partition(".")[0]) == (index, attribute)
                 for span in spans}  # fmt: skip
        ends = {(span.end_line, span.end_col) for span in taken}
        for function in (function for member in related(source, cls) for function in methods_of(member)):
            other = _other_use(function, attribute, ends)
            if other is not None:
                raise NormStays(
                    f"{'its list' if '.' in path else 'it'} is also used at {source.file}:{other.lineno}", calls
                )


_WALKS = ("zip", "enumerate", "reversed")


def _other_use(function: Function, attribute: str, ends: Collection[tuple[int | None, int | None]]) -> ast.expr | None:
    """A use of a list of modules or of its elements that is neither a call with one of these ends nor a walk to one."""
    nodes = list(ast.walk(function))
    above = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    callees = {n.func for n in nodes if isinstance(n, ast.Call) and (n.end_lineno, n.end_col_offset) in ends}
    names = {callee.id for callee in callees if isinstance(callee, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            if node not in callees:
                return node
        elif isinstance(node, ast.Attribute) and attribute_chain(node) == (self_name(function), attribute):
            holder = above[node]
            use, holder = (holder, above[holder]) if isinstance(holder, ast.Subscript) else (node, holder)
            counted = isinstance(holder, ast.Call) and last_name(holder.func) == "len"
            built = isinstance(node.ctx, ast.Store) or (isinstance(holder, ast.Attribute) and holder.attr == "append")
            walked = isinstance(holder, (ast.For, ast.comprehension)) or (
                isinstance(holder, ast.Call) and last_name(holder.func) in _WALKS
            )
            if not (use in callees or counted or built or (walked and names)):
                return node
    return None


def _check_only_user(source: Source, host: ast.ClassDef, user: ast.ClassDef, calls: frozenset[Span]) -> None:
    inside = {id(node) for cls in (host, *related(source, user)) for node in ast.walk(cls)}
    for node in source.nodes:
        if isinstance(node, ast.Name) and node.id == host.name and id(node) not in inside:
            raise NormStays(f"{host.name}, which holds it, is also used at {source.file}:{node.lineno}", calls)


def bias_edits(source: Source, cls: ast.ClassDef, path: str, names: Names) -> list[Edit]:
    """The layer at `path` gets a bias: by its constructor's argument, or by a line of its own."""
    edits: list[Edit] = []
    for _, value, made in resolve(source, cls, path.split(".")):
        for call in constructor_calls(value):
            given = next((k.value for k in call.keywords if k.arg == "bias"), None)
            if given is None and last_name(call.func) == "Linear" and len(call.args) > 2:
                given = call.args[2]
            if given is not None:
                edits += [Edit(*source.span(given), "True")] if literal(given) is not True else []
            elif made is not None:
                suite = next(s for s in _suites_of(made.function) if made.stmt in s)
                layer = f"{self_name(made.function)}.{path}"
                line = f"{layer}.bias = {names.parameter}({names.torch}.zeros({layer}.weight.shape[0]))"
                edits.append(insert(source, after(source, made.stmt, suite), source.indent(made.stmt.lineno), [line]))
            else:
                raise ConversionError(f"{source.file}:{call.lineno}: no bias argument in {source.segment(call)}")
    if not edits and not resolve(source, cls, path.split(".")):
        raise ConversionError(
            f"{source.file}:{cls.lineno}: {path} of {cls.name}, which needs a bias, is not made in this file"
        )
    return edits


def _suites_of(function: Function) -> Iterator[list[ast.stmt]]:
    yield function.body
    for stmt in statements(function.body):
        yield from nested_suites(stmt)


def repair(
    source: Source, cls: ast.ClassDef, path: str, how: str, names: Names
) -> tuple[set[ast.stmt], list[Edit], list[str]]:
    """Undoes statements that zero a branch's last parameter; remarks if there is none in this file."""
    attribute, *rest = path.split(".")
    if how == "unwrap":
        wrapped = [_unwrapped(source, value) for _, value, _ in resolve(source, cls, path.split(".")[:-1])]
        return set(), [edit for edit in wrapped if edit is not None], []
    if how == "reset" and not rest:
        return set(), _filled_anew(source, cls, attribute, names), []
    family = related(source, cls)
    found = [
        call
        for call in init_calls(source, family, attribute)
        if fills_zero(call.call) and _is_element(call.rest, rest, source, cls, attribute)
    ]
    if how == "ones":
        found = [call for call in found if isinstance(call.stmt, ast.Expr)]
    if not found:
        note = f"{source.file}:{cls.lineno}: {path} of {cls.name} starts at zero, but not by a statement found here"
        return set(), [], [note]
    if how == "reset":
        return {call.stmt for call in found}, [], []
    return set(), [_refilled_like(source, call.call, names) for call in found], []


def _filled_anew(source: Source, cls: ast.ClassDef, attribute: str, names: Names) -> list[Edit]:
    """A parameter of the class's own, which no layer initializes, gets the start value that a linear layer has.

    Raises:
        ConversionError: its text is not found.
    """
    filled = f"{names.nn}.init.kaiming_uniform_({{}}, a=5**0.5)"
    calls = [call for call in init_calls(source, related(source, cls), attribute) if fills_zero(call.call)]
    own = [call.call for call in calls if not call.rest and call.call.args]
    if own:
        return [Edit(*source.span(call), filled.format(source.segment(call.args[0]))) for call in own]
    made = makers(source, cls, attribute)
    if len(made) != 1 or calls:
        raise ConversionError(f"{source.file}:{cls.lineno}: {attribute} of {cls.name} starts at zero, and stays so")
    (one,) = made
    suite = next(s for s in _suites_of(one.function) if one.stmt in s)
    line = filled.format(f"{self_name(one.function)}.{attribute}")
    return [insert(source, after(source, one.stmt, suite), source.indent(one.stmt.lineno), [line])]


def _is_element(written: Sequence[str], rest: list[str], source: Source, cls: ast.ClassDef, attribute: str) -> bool:
    """Whether a path as written, `-1.weight`, is one below an attribute."""
    if list(written) == rest or len(written) != len(rest) or not written or not written[0].startswith("-"):
        return list(written) == rest
    made = [call for _, value, _ in resolve(source, cls, [attribute]) for call in constructor_calls(value)]
    counts = {len(call.args) for call in made if not any(isinstance(arg, ast.Starred) for arg in call.args)}
    return len(counts) == 1 and [str(counts.pop() + int(written[0])), *written[1:]] == rest


def _unwrapped(source: Source, value: ast.expr) -> Edit | None:
    """`zero_module(nn.Linear(4, 4))` without the function."""
    given = value.args[0] if isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords else None
    return Edit(*source.span(value), source.segment(given)) if isinstance(given, ast.Call) else None


def _refilled_like(source: Source, call: ast.Call, names: Names) -> Edit:
    edit = refilled(source, call, 1.0, names)
    return Edit(edit.start, edit.end, "1") if edit.text == "1.0" and source.text[edit.start : edit.end] == "0" else edit
