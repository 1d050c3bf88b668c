"""Drawings of readings, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError

if TYPE_CHECKING:
    from .tracker import Reading

_LABELS = {
    "alpha": "alpha",
    "rms": "root mean square of alpha",
    "ratio": "|alpha F(x)| / |x|",
    "effect": "change of the loss without the branch, first order",
    "ablation": "change of the loss with alpha at 0",
}
_SIGNED = frozenset({"alpha", "effect", "ablation"})


def plotted(readings: Sequence[Reading], path: Path, what: str, kind: str) -> Path:
    """Draw readings to a file; see `AlphaTracker.plot`."""
    if what not in _LABELS or kind not in ("lines", "heatmap"):
        raise ConversionError(f'what must be one of {", ".join(_LABELS)}; kind must be "lines" or "heatmap"')
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConversionError("drawing takes matplotlib: pip install 'rezero-convert[plot]'") from error
    gates = list(dict.fromkeys(reading.gate for reading in readings))
    values = {(one.gate, one.step): getattr(one, what) for one in readings if getattr(one, what) is not None}
    steps = sorted({step for _, step in values})
    if not values:
        raise ConversionError(f"nothing to draw: {what} was not measured at any step")
    rows = [[values.get((gate, step), math.nan) for step in steps] for gate in gates]
    height = 4.5 if kind == "lines" else min(12.0, max(3.0, 1.2 + 0.22 * len(gates)))
    figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    (_lines if kind == "lines" else _heatmap)(figure, axes, gates, steps, rows, what)
    axes.set_xlabel("step")
    figure.savefig(path)
    return path


def _lines(figure: Any, axes: Any, gates: list[str], steps: list[int], rows: list[list[float]], what: str) -> None:
    """A line for each gate, coloured by its depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depth = Normalize(0, max(1, len(gates) - 1))
    for at, (gate, row) in enumerate(zip(gates, rows, strict=True)):
        axes.plot(steps, row, color=colormaps["viridis"](depth(at)), lw=1.2, label=gate, marker="." * (len(steps) == 1))
    if what in _SIGNED:
        axes.axhline(0, color="0.6", lw=0.8, zorder=0)
    axes.set_ylabel(_LABELS[what])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(gates) <= 8:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        bar = figure.colorbar(ScalarMappable(depth, colormaps["viridis"]), ax=axes, pad=0.02)
        bar.set_ticks([0, len(gates) - 1], labels=[gates[0], gates[-1]], fontsize=8)
        bar.set_label("gate, from the first to the last", labelpad=-20)


def _heatmap(figure: Any, axes: Any, gates: list[str], steps: list[int], rows: list[list[float]], what: str) -> None:
    """A row for each gate, the first at the top; colours in proportion to the value."""
    finite = [abs(value) for row in rows for value in row if math.isfinite(value)]
    most = max(finite, default=0.0) or 1.0
    signed = what in _SIGNED
    limits = {"vmin": -most if signed else 0.0, "vmax": most}
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="RdBu_r" if signed else "viridis", **limits)
    every = max(1, math.ceil(len(gates) / 48))
    axes.set_yticks(range(0, len(gates), every), labels=gates[::every], fontsize=7)
    marks = sorted({round(at * (len(steps) - 1) / 7) for at in range(8)})
    axes.set_xticks(marks, labels=[str(steps[at]) for at in marks])
    figure.colorbar(image, ax=axes, label=_LABELS[what], pad=0.02)
