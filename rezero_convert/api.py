"""The public verbs: audit, convert, and their counterparts for source text. Each is the pipeline, readable in a row."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import sources
from .capture import capture, static
from .detect import detect
from .errors import ConversionError, NoEffectWarning
from .options import options as make_options
from .plan import Options, Plan, Site
from .report import Report
from .rewrite import modules, source
from .validation import validate


def audit(model: nn.Module, example_inputs: Any = None, **options: Any) -> Report:
    """Say for every add of a model what it is and what `convert` would do; nothing is changed.

    Args:
        model: any `nn.Module`; it is run once on fake tensors, never on its own weights if that can be avoided.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred.
        **options: as for `convert`.

    Returns:
        The report: `print` it, or take `.to_dict()`. For a converted model without `example_inputs`, what was done,
        with today's alphas.

    Raises:
        ConversionError: the model cannot be captured, or an option is not valid.
    """
    settings = make_options(**options)
    done = modules.record(model)
    if done is not None and example_inputs is None:
        return Report(done, title=type(model).__qualname__, alphas=_values(model), converted=True)
    plan = detect(capture(model, example_inputs), settings)
    return Report(plan, title=type(model).__qualname__, alphas=_values(model), converted=done is not None)


def convert(
    model: nn.Module, example_inputs: Any = None, *, inplace: bool = False, verify: bool = True, **options: Any
) -> nn.Module:
    """Rewrite the residual blocks of a model into ReZero form: `x + F(x)` becomes `x + alpha * F(x)`, alpha 0.

    The result is the user's model still: instances keep their class (as a subclass), methods, hooks, state-dict keys
    and control flow. Source: Bachlechner et al., "ReZero is All You Need", UAI 2021, eq. 1.

    Args:
        model: any `nn.Module`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred
            (transformers, timm) or the model traced symbolically.
        inplace: convert the given object, not a copy.
        verify: check the result (identity at the start, every alpha read and alive); on meta tensors only the structure.
        **options: `method`, `alpha_init`, `drop_norm`, `activation`, `include`, `exclude`, `share`, `long_skips`,
            `norm_types`; see `plan.Options`.

    Returns:
        The converted model.

    Raises:
        ConversionError: the model cannot be captured or rewritten, or the result is not what the plan says. The given
            model is then as it was.
    """
    settings = make_options(**options)
    plan = detect(capture(model, example_inputs), settings)
    if not plan.converted:
        warnings.warn(_nothing(plan), NoEffectWarning, stacklevel=2)
        return model if inplace else copy.deepcopy(model)
    result = model if inplace else copy.deepcopy(model)
    with modules.rewrite(result, plan) as undo:
        if verify:
            check = validate(result, example_inputs)
            if not check.ok:
                raise ConversionError(f"{type(model).__qualname__}: the conversion does not hold: {check.failures[0]}")
        undo.pop_all()
    return result


@dataclass(frozen=True, slots=True)
class SourceResult:
    """A file's new text and the report on it."""

    text: str
    report: Report
    notes: tuple[str, ...] = ()
    """What became unused by the rewriting, and what was left as it is."""


def convert_source(
    text: str, *, file: str = "<source>", model: nn.Module | None = None, example_inputs: Any = None, **options: Any
) -> SourceResult:
    """Rewrite the residual blocks in the text of a file; nothing is written, and nothing executed unless `model` is given.

    Args:
        text: the content of the file.
        file: its name, for the report; with `model`, the path that it was imported from.
        model: an instance of the file's classes: decides by a recorded run what the text alone leaves open.
        example_inputs: for `model`; as for `convert`.
        **options: as for `convert`.

    Raises:
        ConversionError: the text has a syntax error, or the model cannot be captured.
    """
    plan = _source_plan(text, file, model, example_inputs, make_options(**options))
    made = source.rewrite(text, plan, file)
    return SourceResult(made.text, Report(plan, title=file), made.notes)


def audit_source(
    text: str, *, file: str = "<source>", model: nn.Module | None = None, example_inputs: Any = None, **options: Any
) -> Report:
    """What `convert_source` would do, and why not elsewhere."""
    return Report(_source_plan(text, file, model, example_inputs, make_options(**options)), title=file)


def _source_plan(text: str, file: str, model: nn.Module | None, example_inputs: Any, options: Options) -> Plan:
    if model is not None:
        plan = detect(capture(model, example_inputs), options)
        own = os.path.realpath(file)
        here = [site for site in plan.sites if site.span is not None and os.path.realpath(site.span.file) == own]
        return dataclasses.replace(plan, sites=tuple(here))
    sources.register(file, text)
    plans = [detect(trace, options) for trace in static.traces(file)]
    sites = _by_place((site for plan in plans for site in plan.sites), file)
    notes = tuple(dict.fromkeys(note for plan in plans for note in plan.notes))
    return Plan(sites, options, "static", sum(plan.scalars for plan in plans), notes)


def _by_place(sites: Iterable[Site], file: str) -> tuple[Site, ...]:
    """One site per add of the file: seen from its own class first, else from a class that holds it."""
    best: dict[Any, Site] = {}
    for site in sites:
        if site.span is not None and site.span.file == file:
            best[site.span] = min(best.get(site.span, site), site, key=_distance)
    return tuple(best[span] for span in sorted(best))


def _distance(site: Site) -> tuple[bool, bool, bool]:
    """How far the context of a static finding is from its class; a block found from afar beats a refusal at home."""
    own = site.place is not None and site.place.cls == site.cls
    return site.verdict == "refused", site.path != "", not own


def _nothing(plan: Plan) -> str:
    gated = len(plan.of("gated"))
    if gated:
        return f"nothing was rewritten: {gated} residual blocks are gated already"
    return f"nothing was rewritten: no residual block among {len(plan.sites)} adds (audit() lists them with reasons)"


def _values(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(modules.alphas(model))
