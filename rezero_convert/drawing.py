"""`draw`: a model's residual streams as an SVG file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import nn

from .capture import capture, static
from .detect import detect
from .files import replace
from .options import options as make_options
from .pictures import picture, svg
from .plan import Plan
from .report import Report
from .rewrite.modules import alphas, record


def draw(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, **options: Any) -> Path:
    """Draw the residual streams of a model from input to output, and what `convert` does to them, as SVG.

    Args:
        model: any `nn.Module`, converted or not, also an `fx.GraphModule`; nothing is changed.
        path: the file to write, whole or not at all.
        example_inputs: as for `convert`.
        **options: as for `convert`.

    Returns:
        The path.

    Raises:
        ConversionError: the model cannot be captured, an option is not valid, or the file cannot be written.
    """
    file = Path(path)
    replace(file, drawn(model, example_inputs, **options).encode())
    return file


def drawn(model: nn.Module, example_inputs: Any = None, *, title: str = "", **options: Any) -> str:
    """The text of the drawing that `draw` writes.

    Raises:
        ConversionError: the model cannot be captured, or an option is not valid.
    """
    settings = make_options(**options)
    trace = capture(model, example_inputs)
    plan, done = detect(trace, settings), record(model)
    report = Report(
        plan if done is None else _with_dropped(plan, done),
        title=title or type(model).__name__,
        alphas=dict(alphas(model)),
        converted=done is not None,
    )
    return svg(picture((trace,), report))


def drawn_report(report: Report, model: nn.Module, example_inputs: Any = None) -> str:
    """The drawing of a report on source text that a run of the model decided.

    Raises:
        ConversionError: the model cannot be captured.
    """
    return svg(picture((capture(model, example_inputs),), report))


def drawn_text(report: Report, file: str) -> str:
    """The drawing of a report on source text alone: of the classes that show most of its adds.

    Raises:
        ConversionError: the file, which `sources` knows, cannot be read or has a syntax error.
    """
    return svg(picture(static.traces(file), report))


def _with_dropped(plan: Plan, done: Plan) -> Plan:
    """A converted model's blocks, with the norms that the conversion took from them."""
    norms = {(site.path, gate.alpha): site.norms for site in done.converted for gate in site.gates}
    sites = (
        dataclasses.replace(site, norms=norms.get((site.path, site.gates[0].alpha), ())) if site.gates else site
        for site in plan.sites
    )
    return dataclasses.replace(plan, sites=tuple(sites))
