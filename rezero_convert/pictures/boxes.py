"""One box of a stream as SVG: a block with its branches, operations on the way, another join."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement

from ..colours import colour
from ..listing import compact
from .ink import ARROW, LINE, MORE, Row, extent, label, operations, rect, stroke, titled, wrapped, write
from .records import Box, Branch, Step

PAD = 8
SHORTCUT = 104
"""Room for a projection on the stream."""
REACH = 40
"""From the stream to the branches beside it."""
TIMES = "\N{MULTIPLICATION SIGN}"
_LEAST = 150
"""Width of the narrowest branch."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where a stream is drawn."""

    x: float
    right: float
    stream: float
    """The stream's own x."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """The layers of a stream's drawing, from back to front, and what is known of it so far."""

    names: tuple[str, ...]
    """Of all streams."""
    frames: Element
    ways: Element
    things: Element
    places: dict[int, float] = field(default_factory=dict)
    """Where the value at a position is made."""
    reads: list[tuple[int, float, float]] = field(default_factory=list)
    """Streams that are read, and where."""


def named(box: Box) -> str:
    """Paths and class of a box."""
    cls = box.cls.rpartition(".")[2]
    return "  ".join(part for part in (compact(box.paths) if any(box.paths) or not cls else "", cls) if part)


def draw(canvas: Canvas, column: Column, box: Box, y: float) -> float:
    """A box from `y` on; the y of its end."""
    if box.kind == "block":
        made = end = _block(canvas, column, box, y)
        end += PAD
    elif box.kind == "merge":
        made, end = _merge(canvas, column, box, y)
    else:
        made = end = _plain(canvas, column, box, y)
    canvas.places.update(dict.fromkeys(box.at, made))
    return end


def _block(canvas: Canvas, column: Column, box: Box, y: float) -> float:
    """A block, its branches side by side, as many as there is room for; the y of its sum."""
    group = _group(canvas, box)
    room = column.right - column.stream - REACH
    beside = max(1, min(len(box.branches), int((room + PAD) / (_LEAST + PAD))))
    top = y
    for start in range(0, len(box.branches), beside):
        y = _abreast(canvas, column, box, start, start + beside, y + 4, group)
    if box.shortcut:
        _projection(group, column, box.shortcut, top + 4, y)
    return y


def _abreast(canvas: Canvas, column: Column, box: Box, start: int, stop: int, y: float, group: Element) -> float:
    """Branches beside each other, from the stream and back to it; the y of the sum."""
    branches, left = box.branches[start:stop], column.stream + REACH
    width = (column.right - left - (len(branches) - 1) * PAD) / len(branches)
    texts = [_told(canvas, box, branch, width - 2 * PAD, first=branch is box.branches[0]) for branch in branches]
    high = max(map(len, texts)) * LINE + 2 * PAD - 2
    top, sum_y, kind = y + 6, y + high + 12, colour(box.verdict)
    inside = [f"inside: {note.text}\n{note.full}" for note in box.notes]
    middle = left
    for number, (branch, rows) in enumerate(zip(branches, texts, strict=True)):
        x = left + number * (width + PAD)
        middle = x + width / 2
        part = SubElement(group, "g", {"class": "box"})
        titled(part, named(box), _steps(branch.steps), _gate(branch), box.full, *inside)
        rect(part, x, top, width, high, f"face s-{kind}", dashed=kind == "refused")
        _write(part, x + PAD, top + PAD + 9, rows, bold=branch is box.branches[0])
        stroke(canvas.ways, f"M{middle:g} {y:g}V{top:g}M{middle:g} {top + high:g}V{sum_y:g}", f"way s-{kind}")
        canvas.reads.extend((source, x, top + high / 2) for source in branch.reads)
    tip = column.stream + 8
    stroke(canvas.ways, f"M{column.stream:g} {y:g}H{middle:g}M{middle:g} {sum_y:g}H{tip:g}", f"way s-{kind}")
    stroke(canvas.ways, f"M{tip + 6:g} {sum_y - 4:g}L{tip:g} {sum_y:g}L{tip + 6:g} {sum_y + 4:g}", f"way s-{kind}")
    _join(group, column.stream, sum_y, kind)
    return sum_y


def _told(canvas: Canvas, box: Box, branch: Branch, width: float, *, first: bool) -> list[Row]:
    """What is written in the box of a branch; in the first one also what is to be said of all."""
    kind = f"f-{colour(box.verdict)}"
    rows = [label(named(box), width)] if first else []
    rows += operations(branch.steps, width)
    rows += [label(f"reads {canvas.names[source]}", width, "f-reads") for source in branch.reads]
    rows += [label(f"{TIMES} {_gate(branch)}", width, kind)] if branch.gate else []
    if first and box.text:
        rows += wrapped(box.text, width, kind, 2)
    if first:
        rows += [label(f"inside: {note.text}", width, f"f-{colour(note.verdict)}") for note in box.notes]
    return rows


def _projection(group: Element, column: Column, steps: Sequence[Step], top: float, bottom: float) -> None:
    """The projection on the skip, on the stream."""
    part = SubElement(group, "g", {"class": "shortcut box"})
    titled(part, _steps(steps))
    names = [step.label.rpartition(":")[2].rpartition(".")[2] for step in steps]
    most = max(1, int((bottom - top - 30) // LINE))
    if len(names) > most:
        names = [*names[: most - 1], f"{MORE} {len(names) - most + 1} more"]
    rows = [label(name, SHORTCUT - 26, "f-shortcut") for name in names]
    width, high = extent(rows) + 10, len(rows) * LINE + 6
    x, y = column.stream + min(-width / 2, REACH - 4 - width), (top + bottom - high) / 2
    rect(part, x, y, width, high, "face s-shortcut")
    _write(part, x + 5, y + 13, rows)


def _plain(canvas: Canvas, column: Column, box: Box, y: float) -> float:
    """Operations on the stream; the y of their end."""
    part = SubElement(canvas.things, "g", {"class": "plain box"})
    titled(part, _steps(box.shortcut))
    left = column.stream - 14
    rows = operations(box.shortcut, column.right - left - 2 * PAD)
    high = len(rows) * LINE + 7
    rect(part, left, y, extent(rows) + 2 * PAD, high, "face s-plain")
    _write(part, left + PAD, y + 15, rows)
    return y + high


def _merge(canvas: Canvas, column: Column, box: Box, y: float) -> tuple[float, float]:
    """Another sum, or a concatenation; the y of the join, and of the end."""
    group, kind = _group(canvas, box), colour(box.verdict)
    part = SubElement(group, "g", {"class": "box"})
    left = column.stream + 20
    room = column.right - left - 2 * PAD
    rows = [label(named(box) if box.sites else box.text, room)]
    if box.sites and box.text:
        rows += wrapped(box.text, room, f"f-{kind}", 2)
    for branch in box.branches:
        rows += _told(canvas, box, branch, room, first=False)
    high = len(rows) * LINE + 6
    rect(part, left, y, extent(rows) + 2 * PAD, high, f"face s-{kind}", dashed=True)
    _write(part, left + PAD, y + 14, rows)
    middle = y + high / 2
    stroke(canvas.ways, f"M{left:g} {middle:g}H{column.stream:g}", f"way s-{kind}")
    _join(group, column.stream, middle, kind, adds=bool(box.sites))
    canvas.reads.extend((source, left, middle) for branch in box.branches for source in branch.reads)
    return middle, y + high


def _group(canvas: Canvas, box: Box) -> Element:
    kind = f"{box.kind} {box.verdict}".strip()
    group = SubElement(canvas.things, "g", {"class": kind, "data-sites": str(len(box.sites))})
    titled(group, named(box), box.text, box.full)
    return group


def _join(parent: Element, x: float, y: float, kind: str, *, adds: bool = True) -> None:
    """The sign of an add, or of a concatenation, on the stream."""
    circle = {"cx": f"{x:g}", "cy": f"{y:g}", "r": "7", "stroke-width": "1.6"}
    SubElement(parent, "circle", {"class": f"face s-{kind}", **circle})
    plus = f"M{x - 4:g} {y:g}H{x + 4:g}M{x:g} {y - 4:g}V{y + 4:g}"
    bars = f"M{x - 2:g} {y - 3:g}V{y + 3:g}M{x + 2:g} {y - 3:g}V{y + 3:g}"
    stroke(parent, plus if adds else bars, f"way s-{kind}")


def _write(part: Element, x: float, y: float, rows: Sequence[Row], *, bold: bool = False) -> None:
    for number, row in enumerate(rows):
        write(part, x, y + number * LINE, row, bold=bold and not number)


def _steps(steps: Iterable[Step]) -> str:
    return ARROW.join(f"{step.full} dropped" if step.dropped else step.full for step in steps)


def _gate(branch: Branch) -> str:
    """A gate and its value, or what its values lie between."""
    if not branch.gate or not branch.values:
        return branch.gate
    low, high = min(branch.values), max(branch.values)
    return f"{branch.gate} = {low:.4g}" if low == high else f"{branch.gate} = {low:.3g} to {high:.3g}"
