"""Carries out a Plan on source text, as a careful engineer would have written it.

The function bodies are `rewrite.text`'s; here are the classes: the alphas' lines in `__init__`, the start values of
gates that were there, the norms' constructors, `_init_weights` of transformers' models. Classes keep their order in
both passes, so a class is known by its number in the file.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from ..plan import Plan, Site
from .alphas import alpha_edits, unfold_edits
from .classes import spelling
from .doubts import doubts
from .gates import arm_edits, existing_edits
from .jobs import Asked, Jobs, check_agreement, collect, elsewhere, undecided
from .leftovers import leftovers
from .norms import Gone, bias_edits, check_lists, check_reads, drop, repair, slot_edits, unassigned
from .pretrained import pretrained_edits
from .splice import Edit, Source, apply, parse, remove
from .starts import start_edits
from .text import edit as edit_functions
from .text import product


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A file's new text, and what its reader should know: names that became unused, what was left as it is."""

    text: str
    notes: tuple[str, ...] = ()
    idle: frozenset[Asked] = frozenset()
    """The repairs for which no statement is found."""
    doubts: tuple[str, ...] = ()
    """Where a branch may start at zero, which only a run can tell."""


def rewrite(text: str, plan: Plan, file: str) -> Rewritten:
    """`text`, the content of `file`, with the plan's converted sites of that file carried out.

    Everything that is not edited stays as it is: line ends, byte order mark, comments, a missing last line end. A file
    for which nothing is converted comes back identical. The result parses.

    Raises:
        ConversionError: the text does not parse, the plan asks for what cannot be written, or the instances of one
            class were decided differently; the message says what and where.
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text[len(mark) :].replace("\r\n", "\n").replace("\r", "\n")
    original = parse(body, file)
    check_agreement(plan, file)
    jobs = collect(original, plan, file)
    check_lists(original, jobs.slots)
    edited = _edit_bodies(original, plan)
    if edited == body and jobs == Jobs((), (), (), (), (), (), ()):
        return Rewritten(text)
    source = parse(edited, file)
    if unfolding := unfold_edits(source, jobs):
        source = parse(apply(source, unfolding), file)
    edits, notes, idle = _class_edits(source, jobs)
    result = apply(source, edits)
    if not body.endswith("\n") and result.endswith("\n"):
        result = result[:-1]
    new = parse(result, file)
    notes += leftovers(original, new) + undecided(plan, file) + elsewhere(plan, file)
    text = mark + _with_line_ends(text[len(mark) :], body, result)
    return Rewritten(text, tuple(dict.fromkeys(notes)), idle, tuple(doubts(original, without(plan, idle))))


def without(plan: Plan, idle: frozenset[Asked]) -> Plan:
    """The plan less repairs for which the text has no statement: another class may use the same name."""

    def settled(site: Site) -> Site:
        repairs = tuple(repair for repair in site.repairs if (site.span, repair) not in idle)
        return site if repairs == site.repairs else dataclasses.replace(site, repairs=repairs)

    return dataclasses.replace(plan, sites=tuple(map(settled, plan.sites)))


def _edit_bodies(source: Source, plan: Plan) -> str:
    """The text with its function bodies edited; only the top-level statements that change are parsed for that."""
    touched = {line for site in plan.edited for line in _lines(site, source.file)}
    edits = []
    for stmt in source.tree.body:
        first = min([stmt.lineno, *(d.lineno for d in getattr(stmt, "decorator_list", ()))])
        last = stmt.end_lineno or first
        if any(first <= line <= last for line in touched):
            start, end = source.line_start(first), source.line_start(last + 1)
            text = source.text[start:end]
            edits.append(
                Edit(start, end, edit_functions(text, plan.edited, product, file=source.file, first_line=first))
            )
    return apply(source, edits)


def _lines(site: Site, file: str) -> set[int]:
    operands = [gate.at for gate in (*site.gates, *site.shifts)] + [norm.at for norm in site.norms]
    operands += [site.move.at, *site.move.to] if site.move is not None else []
    operands += [site.skip_gate.at] if site.skip_gate is not None else []
    if site.activation is not None:
        operands.append(site.activation.at)
    return {operand.span.line for operand in operands if operand is not None and operand.span.file == file}


def _class_edits(source: Source, jobs: Jobs) -> tuple[list[Edit], list[str], frozenset[Asked]]:
    names = spelling(source)
    notes: list[str] = []
    idle: set[Asked] = set()
    edits = alpha_edits(source, jobs, names)
    for index, gate in jobs.existing:
        if gate.init is not None:
            edits += existing_edits(source, source.classes[index], gate.alpha, gate.init, names)
    for index, attribute in jobs.arms:
        edits += arm_edits(source, source.classes[index], attribute, names)
    for index, path, calls in jobs.slots:
        edits += slot_edits(source, source.classes[index], path, calls, names)
    for index, path in jobs.biases:
        edits += bias_edits(source, source.classes[index], path, names)
    leaves: set[ast.stmt] = set()
    reads: list[Gone] = []
    unmade: dict[ast.stmt, list[tuple[str, str]]] = {}
    for index, path, calls in jobs.dropped:
        found, said = drop(source, source.classes[index], path, calls, reads, unmade)
        leaves |= found
        notes += said
    for stmt, attributes in unmade.items():
        left = unassigned(source, stmt, attributes)
        leaves |= {stmt} if left is None else set()
        edits += [] if left is None else [left]
    for index, path, how, factor in jobs.starts:
        edits += start_edits(source, source.classes[index], path, how, factor, names)
    for index, path, how, asked in jobs.repairs:
        found, changed, said = repair(source, source.classes[index], path, how, names)
        leaves |= found
        edits += changed
        notes += said if any(repair.certain for _, repair in asked) else []
        idle |= set() if found or changed else set(asked)
    cuts, gone = remove(source, leaves)
    for one in reads:
        check_reads(source, one, gone)
    edits += cuts
    edits += pretrained_edits(source, jobs, names)
    if names.missing is not None and any(f"{names.torch}." in edit.text for edit in edits):
        edits.append(names.missing)
    return edits, notes, frozenset(idle)


def _with_line_ends(text: str, body: str, result: str) -> str:
    """`result` with the line ends of `text`, of which `body` is the copy with line feeds."""
    if "\r" not in text:
        return result
    ends = list(_line_ends(text))
    common = max(set(ends), key=ends.count)
    if len(set(ends)) == 1:
        return result.replace("\n", common)
    old, new = body.split("\n"), result.split("\n")
    chosen = [common] * len(new)
    for match in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
        for offset in range(match.size):
            if match.a + offset < len(ends):
                chosen[match.b + offset] = ends[match.a + offset]
    return "".join(line + end for line, end in zip(new[:-1], chosen, strict=False)) + new[-1]


def _line_ends(text: str) -> Iterator[str]:
    index = 0
    while index < len(text):
        if text[index] == "\r":
            end = "\r\n" if text[index + 1 : index + 2] == "\n" else "\r"
            yield end
            index += len(end)
        else:
            if text[index] == "\n":
                yield "\n"
            index += 1
