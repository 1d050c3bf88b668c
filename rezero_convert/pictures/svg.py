"""A picture as SVG: one self-contained file without scripts, in colours that follow the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..colours import KINDS, colour
from ..listing import compact
from .boxes import PAD, SHORTCUT, TIMES, Canvas, Column, draw
from .ink import LINE, SIZE, Row, extent, label, rect, stroke, titled, wrapped, write
from .records import Box, Fold, Picture, Stream, boxes

WIDTH = 1000
_NARROW = 800
"""Of a drawing of one stream."""
_MARGIN = 20
_GUTTER = 36
"""Between two streams."""
_GAP = 20
_LANE = 12
"""Between two long skips."""
_LANES = 4
_LEFT = 24
"""From a column's edge to its stream, where nothing is drawn there."""
_FONTS = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace"


def svg(picture: Picture) -> str:
    """The text of an SVG file, at most `WIDTH` wide: well-formed, whatever the names in it."""
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONTS, "font-size": str(SIZE)})
    titled(root, f"{picture.title}: residual streams")
    SubElement(root, "style").text = _style()
    SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    whole = WIDTH if len(picture.streams) > 1 else _NARROW
    width = whole - 2 * _MARGIN
    y = _heading(root, picture, width)
    for first in range(0, len(picture.streams), 2):
        y = _side_by_side(root, picture, first, width, y) + _GAP
    height = f"{_beside(root, picture, width, y) + _MARGIN:g}"
    root.attrib.update({"width": f"{whole}", "height": height, "viewBox": f"0 0 {whole} {height}", "role": "img"})
    for element in root.iter():
        if element.tag in ("g", "rect", "path"):
            element.tail = "\n"
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _style() -> str:
    shades = [(kind, light, dark) for kind, (_, light, dark) in KINDS.items()]
    light = "".join(f".s-{kind}{{stroke:{shade}}}.f-{kind}{{fill:{shade}}}" for kind, shade, _ in shades)
    dark = "".join(f".s-{kind}{{stroke:{shade}}}.f-{kind}{{fill:{shade}}}" for kind, _, shade in shades)
    return (
        ".paper{fill:#ffffff}.ink{fill:#1f2328}.soft{fill:#57606a}.face{fill:#f6f8fa}"
        ".way,.stream,.frame{fill:none}.way{stroke-width:1.4}.stream{stroke:#57606a;stroke-width:3}"
        f".frame{{stroke:#8c959f}}{light}"
        "@media (prefers-color-scheme:dark){"
        ".paper{fill:#0d1117}.ink{fill:#e6edf3}.soft{fill:#9aa4ae}.face{fill:#161b22}"
        f".stream{{stroke:#9aa4ae}}.frame{{stroke:#6e7681}}{dark}}}"
    )


# Above and below the streams


def _heading(root: Element, picture: Picture, width: float) -> float:
    """Title, counts and legend; the y of their end."""
    y = _MARGIN + 8.0
    write(root, _MARGIN, y, label(picture.title, width), bold=True)
    for row in wrapped(picture.counts, width, "soft", 3):
        y += LINE
        write(root, _MARGIN, y, row)
    y += LINE + 4
    x = float(_MARGIN)
    legend = SubElement(root, "g", {"class": "legend"})
    shown = _shown(picture)
    entries = [(kind, Row(((name, "soft", False),))) for kind, (name, _, _) in KINDS.items() if kind in shown]
    entries += [("", Row((("norm", "soft", True), (" dropped", "soft", False))))] if "dropped" in shown else []
    for kind, row in entries:
        if x + extent([row]) + 16 > _MARGIN + width:
            x, y = float(_MARGIN), y + LINE
        if kind:
            rect(legend, x, y - 9, 11, 11, f"f-{kind}")
        write(legend, x + (16 if kind else 0), y, row)
        x += extent([row]) + 34
    return y + _GAP


def _shown(picture: Picture) -> set[str]:
    """What the legend has to explain."""
    all_of = [box for stream in picture.streams for box in boxes(stream.members)]
    notes = [*picture.beside, *(note for box in all_of for note in box.notes)]
    found = {colour(verdict) for verdict in (*(box.verdict for box in all_of), *(note.verdict for note in notes))}
    found |= {"shortcut" for box in all_of if _is_projected(box)}
    found |= {"reads" for box in all_of for branch in box.branches if branch.reads}
    steps = [step for box in all_of for part in (box.shortcut, *(one.steps for one in box.branches)) for step in part]
    return found | {"dropped" for step in steps if step.dropped}


def _is_projected(box: Box) -> bool:
    return box.kind == "block" and bool(box.shortcut)


def _beside(root: Element, picture: Picture, width: float, y: float) -> float:
    """The adds that lie on no stream; the y of their end."""
    if not picture.beside:
        return y
    y += LINE
    write(root, _MARGIN, y, label("Beside the streams", width), bold=True)
    for note in picture.beside:
        y += LINE + 2
        group = SubElement(root, "g", {"class": "beside", "data-sites": str(len(note.sites))})
        titled(group, note.text, note.full)
        write(group, _MARGIN, y, label(note.text, width, f"f-{colour(note.verdict)}"))
    return y


# Streams


def _side_by_side(root: Element, picture: Picture, first: int, whole: float, y: float) -> float:
    """Two streams next to each other, and the ways from one to the other; the y of their end."""
    streams = picture.streams[first : first + 2]
    width = (whole - (len(streams) - 1) * _GUTTER) / len(streams)
    names = tuple(stream.name for stream in picture.streams)
    frames, ways, things = (SubElement(root, "g") for _ in range(3))
    ends: dict[int, tuple[float, float]] = {}
    for number, stream in enumerate(streams):
        canvas = Canvas(names, frames, ways, things)
        column = _column(stream, _MARGIN + number * (width + _GUTTER), width)
        ends[first + number] = (column.stream, _stream(canvas, column, stream, y))
        for source, x, at in canvas.reads:
            if source in ends and source < first + number:
                _way(canvas, *ends[source], column.x - _GUTTER / 2, x, at)
    return max(end for _, end in ends.values()) + 6


def _way(canvas: Canvas, start: float, end: float, gutter: float, x: float, y: float) -> None:
    """From the end of a stream to a branch of the one on its right."""
    stroke(canvas.ways, f"M{start:g} {end:g}V{end + 6:g}H{gutter:g}V{y:g}H{x:g}", "way s-reads", dashed=True)
    stroke(canvas.ways, f"M{x - 7:g} {y - 4:g}L{x:g} {y:g}L{x - 7:g} {y + 4:g}", "way s-reads")


def _column(stream: Stream, x: float, width: float) -> Column:
    """Room on the left for long skips and for projections."""
    all_of = boxes(stream.members)
    lanes = min(_LANES, sum(box.start is not None for box in all_of))
    projected = any(_is_projected(box) for box in all_of)
    return Column(x, x + width, x + _LEFT + lanes * _LANE + (SHORTCUT / 2 + 8 if projected else 0))


def _stream(canvas: Canvas, column: Column, stream: Stream, top: float) -> float:
    """A stream from its inputs to its end; the y of that."""
    write(canvas.things, column.x, top + 4, label(stream.name, column.right - column.x), bold=True)
    y = top + _GAP
    line = stroke(canvas.ways, "", "stream")
    if stream.begin:
        y = _pill(canvas, column, stream.begin, y)
    y = _members(canvas, column, stream.members, y, (), 0)[0] + _GAP / 2
    if stream.ends:
        y = _pill(canvas, column, "output", y)
    line.set("d", f"M{column.stream:g} {top + _GAP:g}V{y:g}")
    _long_skips(canvas, column, stream)
    return y


def _pill(canvas: Canvas, column: Column, text: str, y: float) -> float:
    """A beginning or an end of a stream; the y of its own end."""
    group = SubElement(canvas.things, "g", {"class": "pill box"})
    titled(group, text)
    left = column.stream - 14
    row = label(text, column.right - left - 2 * PAD, "soft")
    rect(group, left, y, extent([row]) + 2 * PAD, 20, "face s-plain")
    write(group, left + PAD, y + 14, row)
    return y + 20


def _members(
    canvas: Canvas, column: Column, members: Sequence[Box | Fold], y: float, shape: tuple[int, ...], depth: int
) -> tuple[float, tuple[int, ...]]:
    """Boxes and folds below each other, with shapes where they change; the y of their end, and the shape there."""
    for one in members:
        y += _GAP / 2
        if isinstance(one, Fold):
            y, shape = _fold(canvas, column, one, y, shape, depth)
            continue
        y = draw(canvas, column, one, y)
        if one.shape and one.shape != shape:
            shape = one.shape
            size = label("x".join(map(str, shape)), column.right - column.stream - 12, "soft")
            write(canvas.things, column.stream + 12, y + 11, size)
            y += PAD
    return y, shape


def _fold(
    canvas: Canvas, column: Column, fold: Fold, y: float, shape: tuple[int, ...], depth: int
) -> tuple[float, tuple[int, ...]]:
    """Equal boxes in a frame; the y of its end, and the shape there."""
    inside = boxes((fold,))
    group = SubElement(canvas.frames, "g", {"class": "fold", "data-times": str(fold.times)})
    paths = compact(path for box in inside if box.kind != "plain" for path in box.paths)
    titled(group, f"{TIMES} {fold.times}: {paths}")
    inner = replace(column, right=column.right - PAD)
    end, shape = _members(canvas, inner, fold.members, y + LINE, shape, depth + 1)
    end += _GAP / 2
    left = column.stream - (SHORTCUT / 2 + 9 if any(map(_is_projected, inside)) else 22) + 3 * depth
    rect(group, left, y, column.right - left, end - y, "frame", dashed=True)
    times = Row(((f"{TIMES} {fold.times}", "ink", False),))
    x = column.right - extent([times]) - PAD
    write(group, x, y + 14, times, bold=True)
    write(group, column.stream + 12, y + 14, label(paths, x - column.stream - 24, "soft"))
    canvas.places[inside[-1].at[-1]] = end - 5  # the value that comes out of the last
    return end, shape


def _long_skips(canvas: Canvas, column: Column, stream: Stream) -> None:
    """Long skips, refused sums and concatenations, on the left of the stream."""
    all_of = boxes(stream.members)
    near = column.stream - (SHORTCUT / 2 + 10 if any(map(_is_projected, all_of)) else 24)
    for number, box in enumerate(box for box in all_of if box.start is not None):
        top, bottom = canvas.places[box.at[0] - (box.start or 0)] + 5, canvas.places[box.at[0]]
        x = near - _LANE * (number % _LANES)
        way = f"M{column.stream:g} {top:g}H{x + 6:g}L{x:g} {top + 6:g}V{bottom - 6:g}L{x + 6:g} {bottom:g}"
        group = SubElement(canvas.ways, "g", {"class": "long"})
        titled(group, box.text)
        stroke(group, f"{way}H{column.stream - 8:g}", f"way s-{colour(box.verdict)}", dashed=True)
