"""Drawings of readings, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError

if TYPE_CHECKING:
    from .racing import Race
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
    gates = list(dict.fromkeys(reading.gate for reading in readings))
    values = {(one.gate, one.step): getattr(one, what) for one in readings if getattr(one, what) is not None}
    steps = sorted({step for _, step in values})
    if not values:
        raise ConversionError(f"nothing to draw: {what} was not measured at any step")
    rows = [[values.get((gate, step), math.nan) for step in steps] for gate in gates]
    height = 4.5 if kind == "lines" else min(12.0, max(3.0, 1.2 + 0.22 * len(gates)))
    figure = _figure(8, height)
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


def raced(race: Race, path: Path, title: str) -> Path:
    """Draw the curves of a race to a file; see `Race.plot`."""
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    for method in race.methods:
        runs = race.of(method)
        curves = [dict(run.curve) for run in runs]
        steps = sorted({step for curve in curves for step in curve})
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        whole = [at for at, column in enumerate(values) if len(column) == len(runs)]
        label = f"{method}, lr {runs[0].lr:g}" if len(race.lrs) > 1 else method
        (line,) = axes.plot(
            [steps[at] for at in whole], [sum(values[at]) / len(runs) for at in whole], lw=1.4, label=label
        )
        low, high = [min(values[at]) for at in whole], [max(values[at]) for at in whole]
        axes.fill_between([steps[at] for at in whole], low, high, color=line.get_color(), alpha=0.18, lw=0)
        ends = [run.curve[-1] for run in runs if run.diverged is not None and run.curve]
        axes.plot(*zip(*ends, strict=True), "x", color=line.get_color()) if ends else None
    for threshold in race.thresholds:
        axes.axhline(threshold, color="0.6", lw=0.8, ls="--", zorder=0)
    finite = [value for run in race.runs for _, value in run.curve if value > 0]
    if finite and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=race.measured, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConversionError("drawing takes matplotlib: pip install 'rezero-convert[plot]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")
