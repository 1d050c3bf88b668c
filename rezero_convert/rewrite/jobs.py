"""What a plan asks of the classes of one file."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass

from ..errors import ConversionError
from ..plan import Gate, Norm, Operand, Plan, Repair, Site, Span
from .classes import attribute_chain, last_name, nested_suites
from .norms import NormStays
from .splice import Function, Source, class_at

Asked = tuple[Span | None, Repair]
"""A repair, and the add of whose branch it is."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """What a plan asks of one file's classes, given by number; duplicates merged, in the order of the text."""

    gates: tuple[tuple[int, Gate, bool], ...]
    """A new alpha, and whether its branch cannot run without the child it belongs to."""
    existing: tuple[tuple[int, Gate], ...]
    arms: tuple[tuple[int, str], ...]
    """Attributes that a branch with a conditional LayerScale calls."""
    dropped: tuple[tuple[int, str, frozenset[Span]], ...]
    """A norm's attribute, and its calls, which go."""
    slots: tuple[tuple[int, str, frozenset[Span]], ...]
    """The path of a norm in a container, and its calls, which stay and do nothing."""
    biases: tuple[tuple[int, str], ...]
    repairs: tuple[tuple[int, str, str, tuple[Asked, ...]], ...]
    """Parameter, how, and what asked for it."""
    starts: tuple[tuple[int, str, str, float], ...] = ()
    """Parameter, how it is to start, and a factor."""


def collect(source: Source, plan: Plan, file: str) -> Jobs:
    gates: dict[tuple[int, str], tuple[Gate, bool]] = {}
    existing: dict[tuple[int, str], Gate] = {}
    arms: dict[tuple[int, str], None] = {}
    dropped: dict[tuple[int, str], set[Span]] = {}
    slots: dict[tuple[int, str], set[Span]] = {}
    biases: dict[tuple[int, str], None] = {}
    repairs: dict[tuple[int, str, str], list[Asked]] = {}
    starts: dict[tuple[int, str], tuple[str, float]] = {}
    for site in sorted(plan.edited, key=lambda s: (s.span is None, s.span or Span("", 0, 0, 0, 0))):
        gates_of = sorted(site.gates, key=lambda g: (g.at is None, g.at.span if g.at else Span("", 0, 0, 0, 0)))
        for gate in (*gates_of, *site.shifts):
            if gate.at is not None and gate.at.span.file == file and not gate.existing:
                index = _owner(source, gate.at.span, f"the gate of {gate.branch}")
                known = gates.get((index, gate.alpha))
                if known is not None and _start(known[0]) != _start(gate):
                    raise ConversionError(f"{gate.at.span}: {gate.alpha} has two start values or shapes")
                bound = _evaluated_before(source, gate)
                gates[index, gate.alpha] = (known[0] if known else gate, bound and (known is None or known[1]))
                if gate.conditional:
                    arms.update(dict.fromkeys((index, name) for name in _called(source, gate.at)))
            elif gate.existing and site.span is not None and site.span.file == file:
                path = _of_all_passes(site, gate)
                index = _instance_class(source, site, path)
                if gate.of_norm:
                    starts[index, path] = ("zeros", 1.0)
                else:
                    existing.setdefault((index, path), dataclasses.replace(gate, alpha=path))
        for norm in site.norms:
            _norm_jobs(source, site, norm, dropped, slots, biases)
        for repair in site.repairs if site.span is not None and site.span.file == file else ():
            _repair_job(source, site, repair, repairs, starts)
    return Jobs(
        tuple((index, gate, bound) for (index, _), (gate, bound) in gates.items()),
        tuple((index, gate) for (index, _), gate in existing.items()),
        tuple(arms),
        tuple((*key, frozenset(calls)) for key, calls in dropped.items()),
        tuple((*key, frozenset(calls)) for key, calls in slots.items()),
        tuple(biases),
        tuple((*key, tuple(asked)) for key, asked in repairs.items()),
        tuple((*key, *how) for key, how in starts.items()),
    )


def _repair_job(
    source: Source,
    site: Site,
    repair: Repair,
    repairs: dict[tuple[int, str, str], list[Asked]],
    starts: dict[tuple[int, str], tuple[str, float]],
) -> None:
    asked = (site.span, repair)
    if repair.owner is not None:
        path, cls = repair.owner
        site = dataclasses.replace(site, path=path, cls=cls, span=None)
    index = _instance_class(source, site, repair.parameter)
    parameter = _relative(site, repair.parameter)
    if repair.how in ("zeros", "scaled"):
        how = (repair.how, repair.factor)
        if starts.setdefault((index, parameter), how) != how:
            raise ConversionError(f"{site.span}: {parameter} is to start from different values, but shares one text")
        return
    repairs.setdefault((index, parameter, repair.how), []).append(asked)


def _start(gate: Gate) -> tuple[object, ...]:
    return gate.init, gate.size or gate.shape, gate.trainable


def _of_all_passes(site: Site, gate: Gate) -> str:
    """A gate's path; "*" for the elements of a list, `layers.*.scale`, where each pass of a loop ends in its own."""
    parts = gate.alpha.split(".")
    others = [other for other in site.gates if gate.existing and other.existing and other != gate]
    alike = [other.alpha.split(".") for other in others if site.calls > 1]
    alike = [other for other in alike if len(other) == len(parts)]
    differ = [{number for number, (a, b) in enumerate(zip(parts, other, strict=True)) if a != b} for other in alike]
    passes = {number for places in differ for number in places if all(parts[n].isdigit() for n in places)}
    return ".".join("*" if number in passes else part for number, part in enumerate(parts))


def _norm_jobs(
    source: Source,
    site: Site,
    norm: Norm,
    dropped: dict[tuple[int, str], set[Span]],
    slots: dict[tuple[int, str], set[Span]],
    biases: dict[tuple[int, str], None],
) -> None:
    if norm.action == "keep" or not norm.path:
        return
    if _file_of(site, norm) != source.file:
        return
    calls = {norm.at.span} if norm.at is not None else set()
    if norm.action == "bypass" and norm.at is not None and norm.attribute:
        key = _owner(source, norm.at.span, f"the call of {norm.attribute}"), norm.attribute
        dropped.setdefault(key, set()).update(calls)
    elif norm.action == "slot":
        slots.setdefault((_instance_class(source, site, norm.path), _relative(site, norm.path)), set()).update(calls)
    elif norm.action == "unfuse":
        raise NormStays(f"{norm.type} also applies an activation: take it apart by hand", calls)
    if norm.bias:
        biases[_instance_class(source, site, norm.bias), _relative(site, norm.bias)] = None


def _file_of(site: Site, norm: Norm) -> str:
    """Where a norm is taken out: at its call, or where the owner of the block makes the container that holds it."""
    if norm.at is not None and norm.action != "slot":
        return norm.at.span.file
    return site.span.file if site.span is not None else ""


def _owner(source: Source, span: Span, what: str) -> int:
    index = class_at(source, span)
    if index is None:
        raise ConversionError(f"{span}: {what} is not in a class; there is no module to hold what it needs")
    return index


def _instance_class(source: Source, site: Site, what: str) -> int:
    """The class of the instance that owns the add, if the file has it, else the one whose text holds the add."""
    name = site.cls.replace(".<locals>", "").rpartition(".")[2]
    for index in reversed(range(len(source.classes))):
        if source.classes[index].name == name:
            return index
    if site.span is None:
        raise ConversionError(f"{source.file}: {what} belongs to no statement of this file")
    return _owner(source, site.span, what)


def _relative(site: Site, path: str) -> str:
    if not site.path:
        return path
    if not path.startswith(site.path + "."):
        raise ConversionError(f"{site.span}: {path} is not inside {site.path}, the module that owns the add")
    return path[len(site.path) + 1 :]


def check_agreement(plan: Plan, file: str) -> None:
    """One text serves all instances of a class: what was decided for one add, norm or activation must agree."""
    said: dict[tuple[str, Span], tuple[object, str]] = {}
    for site in plan.converted:
        decisions: list[tuple[str, Span, object]] = []
        if site.span is not None and site.gates:
            made = {(g.at, _of_all_passes(site, g), g.existing, g.scale) for g in site.gates}
            decisions.append(("gates", site.span, (frozenset(made), site.skip_gate and site.skip_gate.scale)))
        decisions += [(f"norm {n.attribute}", n.at.span, n.action) for n in site.norms if n.at is not None]
        if site.move is not None:
            decisions.append(("move of the norm", site.move.at.span, site.move))
        if site.activation is not None:
            decisions.append(("activation", site.activation.at.span, site.activation.action))
        for what, span, decision in decisions:
            if span.file != file:
                continue
            known = said.setdefault((what, span), (decision, site.path))
            if known[0] != decision:
                raise ConversionError(
                    f"{span}: the {what} of {known[1] or 'the root'} and {site.path or 'the root'} were decided "
                    "differently, but they share this text"
                )


def undecided(plan: Plan, file: str) -> list[str]:
    """Instances for which the same text was not to be rewritten."""
    done = {site.span for site in plan.converted}
    others: dict[tuple[Span, str], list[str]] = {}
    for site in plan.of("refused", "long-skip", "interior"):
        if site.span in done and site.span is not None and site.span.file == file:
            others.setdefault((site.span, site.reason), []).append(site.path or "the root")
    return [
        f"{span}: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} run this text too, but were not to be "
        f"converted: {reason}"
        for (span, reason), paths in others.items()
    ]


def _called(source: Source, at: Operand) -> list[str]:
    """Attributes of `self` that the operand's expression calls."""
    start, end = (at.span.line, at.span.col), (at.span.end_line, at.span.end_col)
    found = []
    for node in source.nodes:
        if isinstance(node, ast.Call) and start <= (node.lineno, node.col_offset):
            chain = attribute_chain(node.func)
            if chain is not None and len(chain) == 2 and (node.end_lineno or 0, node.end_col_offset or 0) <= end:
                found.append(chain[1])
    return found


def _evaluated_before(source: Source, gate: Gate) -> bool:
    """Whether the child of a gate was certainly used when the gate is reached, so that it must exist."""
    if gate.at is None or not gate.child:
        return False
    span = gate.at.span
    start, end = (span.line, span.col), (span.end_line, span.end_col)

    def holds(node: ast.stmt) -> bool:
        return (node.lineno, node.col_offset) <= start and end <= (node.end_lineno or 0, node.end_col_offset or 0)

    function = next((f for f in source.nodes if isinstance(f, Function) and holds(f)), None)
    if function is None or not function.args.args:
        return False
    chain = (function.args.args[0].arg, gate.child.partition(".")[0])
    body: list[ast.stmt] = function.body
    while body:
        inner: list[ast.stmt] = []
        for stmt in body:
            if (stmt.lineno, stmt.col_offset) > start:
                break
            if any(_uses(part, chain) for part in _own_expressions(stmt)):
                return True
            if holds(stmt):
                inner = [s for suite in nested_suites(stmt) if any(map(holds, suite)) for s in suite]
        body = inner
    return False


def _own_expressions(stmt: ast.stmt) -> list[ast.expr]:
    """The expressions of a statement that run whenever it does."""
    if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return []
    return [node for node in ast.iter_child_nodes(stmt) if isinstance(node, ast.expr)]


def _uses(node: ast.AST, chain: tuple[str, ...]) -> bool:
    """Whether evaluating `node` certainly calls the attribute or hands it to a call."""
    if isinstance(node, ast.Call):
        if attribute_chain(node.func) is not None and (attribute_chain(node.func) or ())[: len(chain)] == chain:
            return True
        tail = last_name(node.func)
        if tail not in ("hasattr", "getattr", "isinstance") and any(attribute_chain(a) == chain for a in node.args):
            return True
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return False
    if isinstance(node, ast.IfExp):
        return _uses(node.test, chain)
    if isinstance(node, ast.BoolOp):
        return _uses(node.values[0], chain)
    return any(_uses(child, chain) for child in ast.iter_child_nodes(node))


def elsewhere(plan: Plan, file: str) -> list[str]:
    """Norms of this file's blocks that are called in other files: they stay until those are rewritten too."""
    found: dict[str, list[str]] = {}
    for site in plan.converted:
        if site.span is not None and site.span.file == file:
            for norm in site.norms:
                if norm.action != "keep" and norm.at is not None and _file_of(site, norm) != file:
                    found.setdefault(str(norm.at.span), []).append(norm.path or norm.type)
    notes = []
    for where, paths in found.items():
        more = f" and {len(paths) - 1} more" if paths[1:] else ""
        notes.append(f"{file}: {paths[0]}{more} should go, but the call is in another file: {where}")
    return notes
