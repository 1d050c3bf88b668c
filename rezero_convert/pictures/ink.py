"""Text that keeps within its width, and the shapes around it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from ..listing import clean
from .records import Step

SIZE = 11
LINE = 15
ARROW = " \N{RIGHTWARDS ARROW} "
MORE = "\N{HORIZONTAL ELLIPSIS}"
_CHARACTER = 0.61
"""Width of a character of a monospaced font, as a part of its size; none of those asked for is wider."""
_ROWS = 5
"""Lines of operations in a box."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of text: pieces, each with its class, and whether it is struck through."""

    pieces: tuple[tuple[str, str, bool], ...]

    @property
    def length(self) -> int:
        return sum(len(piece) for piece, _, _ in self.pieces)


def extent(rows: Iterable[Row]) -> float:
    """The width of lines of text."""
    return max(row.length for row in rows) * SIZE * _CHARACTER


def label(text: str, width: float, kind: str = "ink") -> Row:
    """One line, cut where the width ends."""
    return Row(((_cut(text, _room(width)), kind, False),))


def wrapped(text: str, width: float, kind: str, most: int) -> tuple[Row, ...]:
    """A sentence over several lines, the last one cut."""
    room = _room(width)
    found = textwrap.wrap(text, room) or [""]
    if len(found) > most:
        found = [*found[: most - 1], _cut(" ".join(found[most - 1 :]), room)]
    return tuple(Row(((one, kind, False),)) for one in found)


def operations(steps: Sequence[Step], width: float) -> tuple[Row, ...]:
    """Operations in a row, dropped ones struck through, over as many lines as are allowed; the rest is counted."""
    room = _room(width)
    rows: list[Row] = []
    for number, step in enumerate(steps):
        name = (_cut(step.label, room - len(ARROW)), "soft" if step.dropped else "ink", step.dropped)
        if not number:
            rows.append(Row((name,)))
        elif rows[-1].length + len(ARROW) + len(name[0]) <= room:
            rows[-1] = Row((*rows[-1].pieces, (ARROW, "soft", False), name))
        elif len(rows) == _ROWS:
            return (*rows, label(f"{MORE} {len(steps) - number} more", width, "soft"))
        else:
            rows.append(Row(((ARROW.lstrip(), "soft", False), name)))
    return tuple(rows)


def write(parent: Element, x: float, y: float, row: Row, *, bold: bool = False) -> None:
    """A line of text; `y` is its base line."""
    text = SubElement(parent, "text", {"x": f"{x:g}", "y": f"{y:g}", "xml:space": "preserve"})
    if bold:
        text.set("font-weight", "bold")
    for piece, kind, struck in row.pieces:
        span = SubElement(text, "tspan", {"class": kind})
        if struck:
            span.set("text-decoration", "line-through")
        span.text = clean(piece)


def titled(group: Element, *lines: str) -> None:
    """What is shown under the pointer."""
    text = "\n".join(line for line in lines if line)
    if text:
        SubElement(group, "title").text = clean(text)


def rect(parent: Element, x: float, y: float, width: float, height: float, kind: str, *, dashed: bool = False) -> None:
    """A box with round corners."""
    sizes = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}", "rx": "5"}
    SubElement(parent, "rect", {"class": kind, **sizes, **({"stroke-dasharray": "4 3"} if dashed else {})})


def stroke(parent: Element, way: str, kind: str, *, dashed: bool = False) -> Element:
    """A line."""
    return SubElement(parent, "path", {"class": kind, "d": way, **({"stroke-dasharray": "6 4"} if dashed else {})})


def _room(width: float) -> int:
    """The characters that fit a width."""
    return max(1, int(width / (SIZE * _CHARACTER)))


def _cut(text: str, room: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= room else text[: max(0, room - 1)] + MORE
