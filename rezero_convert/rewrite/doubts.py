"""Zero initializations that may be those of a branch, where the text does not tell whether they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from ..plan import Gate, Plan, Site
from ..zeroing import called, fills_zero, held
from .classes import attribute_chain, chain_of_elements, last_name, lineage, makers, methods_of, self_name, set_by
from .splice import Function, Source, class_at, statements

_DEAD = "then neither it nor alpha ever gets a gradient: --model and --inputs decide it"
_LAYERS = re.compile(r"Linear|_?Conv(Transpose)?([123N]d|1D)")
_WALKS = ("modules", "named_modules", "children")


def doubts(source: Source, plan: Plan) -> list[str]:
    """A note for each class and line where a branch that gets a gate may be filled with zeros unseen."""
    found: dict[str, None] = {}
    for site in plan.edited:
        index = class_at(source, site.span) if site.span is not None and site.span.file == source.file else None
        if index is None or site.repairs:
            continue
        for gate in (gate for gate in site.gates if not gate.existing and gate.child):
            for line in _lines(source, source.classes[index], gate, site):
                found[f"{source.file}:{line}: the branch of {site.cls} may start at zero by this; {_DEAD}"] = None
    return list(found)


def _lines(source: Source, cls: ast.ClassDef, gate: Gate, site: Site) -> Iterator[int]:
    for made in makers(source, cls, gate.child):
        if isinstance(made.value, ast.Call) and called(made.value) == "Parameter" and _has_zeros(made.value):
            yield made.value.lineno
    for function in (function for host in lineage(source, cls) for function in methods_of(host)):
        yield from _own(function, gate.child)
    for code, names, receiver in _applied(source):
        if len(receiver) < 2 or receiver[1] == gate.child:
            yield from _of_any_layer(code, names)


def _own(function: Function, child: str) -> Iterator[int]:
    """Lines of a method that fill the attribute itself, or a layer in a local variable of which it is not known whose.

    And those that give a layer of the attribute a weight of zeros.
    """
    me, places = self_name(function), held(function)
    local = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - set(places)
    for stmt in statements(function.body):
        if isinstance(stmt, ast.Assign) and _has_zeros(stmt.value):
            targets = [chain_of_elements(target) or () for target in stmt.targets]
            if any(target[:2] == (me, child) and target[2:] and target[-1] in ("weight", "data") for target in targets):
                yield stmt.lineno
        call = stmt.value if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call) else None
        if call is None or not fills_zero(call):
            continue
        target = set_by(call) or ()
        itself = bool(call.args) and attribute_chain(call.args[0]) == (me, child)
        if itself or (len(target) > 2 and target[0] in local and target[-1] == "weight" and target[1] != "weight"):
            yield stmt.lineno


def _applied(source: Source) -> Iterator[tuple[ast.AST, set[str], tuple[str, ...]]]:
    """Code that runs for many modules, the names of the module in it, and the path whose modules they are."""
    functions = {node.name: node for node in source.nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    given: dict[str, tuple[str, ...]] = {"_init_weights": ()} if "_init_weights" in functions else {}
    for node in source.nodes:
        if isinstance(node, ast.Call) and called(node) == "apply" and len(node.args) == 1:
            receiver = chain_of_elements(node.func.value) or () if isinstance(node.func, ast.Attribute) else ()
            if isinstance(node.args[0], ast.Lambda):
                yield node.args[0], {argument.arg for argument in node.args[0].args.args}, receiver
            given[last_name(node.args[0])] = receiver
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and called(node.iter) in _WALKS:
            walked = chain_of_elements(node.iter.func.value) if isinstance(node.iter.func, ast.Attribute) else ()
            yield node, {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}, walked or ()
    for name, receiver in given.items():
        if name in functions:
            yield functions[name], {argument.arg for argument in functions[name].args.args} - {"self"}, receiver


def _of_any_layer(code: ast.AST, names: set[str]) -> Iterator[int]:
    """Lines that fill the weight of a module of these names, unless it is tested to be something else than a layer."""
    if isinstance(code, ast.If) and (tested := _tested(code.test)):
        layers = any(map(_LAYERS.fullmatch, tested))
        for part in (*(code.body if layers else ()), *code.orelse):
            yield from _of_any_layer(part, names)
        return
    if isinstance(code, ast.Call) and fills_zero(code):
        target = set_by(code) or ()
        if target[1:] == ("weight",) and target[0] in names:
            yield code.lineno
    for part in ast.iter_child_nodes(code):
        yield from _of_any_layer(part, names)


def _tested(test: ast.expr) -> list[str]:
    """The classes that a condition asks for, `type(m).__name__ == "Linear"` included."""
    named = any(isinstance(node, ast.Attribute) and node.attr == "__name__" for node in ast.walk(test))
    constants = [node.value for node in ast.walk(test) if named and isinstance(node, ast.Constant)]
    found = [value for value in constants if isinstance(value, str)]
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and called(node) == "isinstance" and len(node.args) == 2:
            classes = node.args[1].elts if isinstance(node.args[1], ast.Tuple) else [node.args[1]]
            found += [last_name(cls) for cls in classes]
    return found


def _has_zeros(value: ast.expr) -> bool:
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    return any(called(call) in ("zeros", "zeros_like") for call in calls)
