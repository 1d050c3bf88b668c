"""`draw` and `page`: a model's residual streams as an SVG file, and all that is known of its adds as a page of HTML."""

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
from .report import Record, Report
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

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> import pathlib, tempfile
        >>> path = rz.draw(layer, pathlib.Path(tempfile.mkdtemp()) / "layer.svg", x)
        >>> path.read_text().startswith("<svg")
        True
    """
    file = Path(path)
    replace(file, drawn(model, example_inputs, **options)[1].encode())
    return file


def page(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    validation: Record | None = None,
    isometry: Record | None = None,
    **options: Any,
) -> Path:
    """Write what `audit` says as a page of HTML: the drawing of the residual streams, and a table of all adds.

    The page is one file that needs no network; names and source lines in it are escaped.

    Args:
        model: any `nn.Module`, converted or not, also an `fx.GraphModule`; nothing is changed.
        path: the file to write, whole or not at all.
        example_inputs: as for `convert`.
        validation: what `validate` returned, to be shown as well.
        isometry: what `isometry` returned, to be shown as well.
        **options: as for `convert`.

    Returns:
        The path.

    Raises:
        ConversionError: the model cannot be captured, an option is not valid, or the file cannot be written.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> import pathlib, tempfile
        >>> path = rz.page(layer, pathlib.Path(tempfile.mkdtemp()) / "layer.html", x)
        >>> path.read_text().startswith("<!DOCTYPE html>")
        True
    """
    file = Path(path)
    report, drawing = drawn(model, example_inputs, **options)
    replace(file, report.to_html(drawing=drawing, validation=validation, isometry=isometry).encode())
    return file


def drawn(model: nn.Module, example_inputs: Any = None, *, title: str = "", **options: Any) -> tuple[Report, str]:
    """The report of `audit`, and the text of the drawing that `draw` writes, by one capture.

    Raises:
        ConversionError: the model cannot be captured, or an option is not valid.
    """
    settings = make_options(**options)
    trace = capture(model, example_inputs)
    plan, done = detect(trace, settings), record(model)
    report = Report(
        plan, title=title or type(model).__qualname__, alphas=dict(alphas(model)), converted=done is not None
    )
    if done is None:
        return report, svg(picture((trace,), report))
    drawing = svg(picture((trace,), dataclasses.replace(report, plan=_with_dropped(plan, done))))
    return (report if example_inputs is not None else dataclasses.replace(report, plan=done)), drawing


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
