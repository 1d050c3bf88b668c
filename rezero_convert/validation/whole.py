"""The validation of a converted model as a whole: both modes, all blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..capture import check_model, without_inputs
from ..capture.guard import untouched
from ..capture.inputs import PASS_INPUTS, infer_inputs, resolve_inputs
from ..capture.recorded import record
from ..capture.trace import Trace
from ..errors import ConversionError
from ..listing import compact, number
from ..plan import Options, Site
from ..rewrite import modules
from ..rewrite.changes import starts
from .carried import carried, carrying
from .looks import (
    Look,
    Subject,
    all_of,
    asleep_gates,
    joined,
    look_at,
    parameter_at,
    plain_gates,
    several,
    structure,
    trainable,
)
from .measured import MORTAL, with_numbers
from .placed import asked, placed
from .results import BlockResult, Check, Validation
from .running import SEED
from .sealed import seals


def validate(model: nn.Module, example_inputs: Any = None, *, options: Options | None = None) -> Validation:
    """Check a converted model, block by block; works at any value of the gates, and leaves the model as it was.

    Args:
        model: converted by `convert`, from a converted file, or hand-written with gates of one number.
        example_inputs: as for `convert`.
        options: what the conversion was asked for, where the model holds no record of it (a converted file).

    Returns:
        The result; `.ok` is relative to the plan: what was kept by choice does not count as a failure.

    Raises:
        ConversionError: the model cannot be captured, or has no gate at all.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> result = rz.validate(rz.convert(layer, x), x)
        >>> result.ok, len(result.blocks)
        (True, 2)
    """
    check_model(model)
    symbolic = example_inputs is None and infer_inputs(model) is None
    args, kwargs = ((), {}) if symbolic else resolve_inputs(model, example_inputs)
    plans = tuple((path, plan) for path, module in model.named_modules() if (plan := modules.record(module)))
    sites: dict[str, list[Site]] = {}
    for prefix, plan in plans:
        for site in plan.converted:
            for gate in site.gates:
                for name in gate.parameters():
                    sites.setdefault(joined(prefix, site.path, name), []).append(site)
    registered, broken = _registered(model, sites)
    options = options or Options()
    same = dict.fromkeys(registered, options.preserve) if not plans else {}
    same |= {
        joined(prefix, site.path, name): plan.options.preserve
        for prefix, plan in plans
        for site in plan.converted
        for gate in site.gates
        for name in gate.parameters()
    }
    preserved = frozenset(name for name, preserve in same.items() if preserve)
    subject = Subject(model, args, kwargs, registered, sites, plans, preserved, options, symbolic)
    with untouched(model):  # the random states among others
        torch.manual_seed(SEED)
        return _validated(subject, broken)


def _registered(model: nn.Module, planned: Iterable[str]) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The gates by name, each parameter once; and the names that are to be gates but are no parameters."""
    names = [
        joined(prefix, name)
        for prefix, module in model.named_modules()
        for name in module.__dict__.get("rezero_gates", ())
    ]
    found: dict[str, nn.Parameter] = {}
    broken: list[str] = []
    seen: set[int] = set()
    for name in dict.fromkeys([*names, *planned]):
        parameter = parameter_at(model, name)
        if parameter is None:
            broken.append(name)
        elif id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found, broken


def _values(subject: Subject, notes: list[str]) -> Iterator[Check]:
    """Gates without a finite value; a note where they are not at the start: a reset may have done it."""
    real = {name: gate.detach() for name, gate in subject.named.items() if not gate.is_meta}
    wrong = [name for name, gate in real.items() if not gate.isfinite().all()]
    if wrong:
        yield Check("finite", "structure", False, several("is not finite", wrong))
    start = {
        joined(prefix, name): value
        for prefix, module in subject.model.named_modules()
        for name, value in starts(module).items()
    }
    moved = {name: gate for name, gate in real.items() if name in start and bool((gate != start[name]).any())}
    if moved:
        largest = max(float(gate.abs().max()) for gate in moved.values())
        notes.append(
            f"{len(moved)} of {len(start)} gates are not at their start values (largest: {largest:.3g}): "
            "trained, loaded, or overwritten since the conversion"
        )


def _trace(subject: Subject, *, training: bool) -> Trace:
    if subject.symbolic:
        return without_inputs(subject.model, training=training)
    return record(subject.model, subject.args, subject.kwargs, training=training)


def _validated(subject: Subject, broken: list[str]) -> Validation:
    looks: list[Look] = []
    notes: list[str] = []
    for mode in ("eval", "train"):
        try:
            looks.append(look_at(subject, mode, _trace(subject, training=mode == "train")))
        except ConversionError as error:
            if mode == "eval":
                raise
            notes.append(f"not checked in train mode, where the model does not run: {error}")
    plain = sorted({name for look in looks for name in plain_gates(look.flow)}) if not subject.plans else []
    broken += plain
    if not subject.named:  # hand-written
        names = dict.fromkeys(name for look in looks for block in look.found for name in block.alphas)
        subject = replace(subject, named={name: subject.model.get_parameter(name) for name in names})
    if not (subject.named or broken or asked(subject) or carrying(subject)):
        raise ConversionError(
            f"{type(subject.model).__qualname__}: there is no gate to validate: nothing was converted"
        )
    checks = [check for look in looks for check in (*placed(subject, look), *carried(subject, look))]
    if not (subject.named or broken):
        return Validation(type(subject.model).__qualname__, (), tuple(checks), (), tuple(dict.fromkeys(notes)))
    checks += [
        Check("registered", "structure", not broken, several("is not a parameter", broken) or all_of(subject.named))
    ]
    checks += trainable(subject, notes)
    checks += _values(subject, notes)
    asleep: tuple[str, ...] = ()
    looks = _measured(subject, looks, notes)
    for look in looks:
        checks += structure(subject, look, looks, notes)
        if look.mode == "eval":
            asleep = asleep_gates(subject, look, notes)
            if subject.runs and look.found:
                checks += seals(subject, look, notes)
    missing = dict.fromkeys(path for look in looks for path in look.ungated)
    if missing and not subject.plans:
        notes.append(f"{number(len(missing), 'residual block')} without a gate: {compact(missing)}")
    return Validation(
        type(subject.model).__qualname__, _results(looks, notes), tuple(checks), asleep, tuple(dict.fromkeys(notes))
    )


def _measured(subject: Subject, looks: list[Look], notes: list[str]) -> list[Look]:
    """The looks with the checks that take numbers, where there are any."""
    if not subject.runs:
        why = f"without inputs: {PASS_INPUTS}" if subject.symbolic else "on meta tensors"
        notes.append(f"only the structure was checked, {why}")
        return looks
    measured = [found for look in looks if (found := with_numbers(subject, look, notes)) is not None]
    blind = next((look for look in measured if look.undifferentiable), None)
    if blind is not None and not any(look.mode == "train" for look in measured):
        raise ConversionError(f"the model cannot be differentiated in any mode: {blind.undifferentiable}")
    return measured


def _results(looks: list[Look], notes: list[str]) -> tuple[BlockResult, ...]:
    """The blocks of both modes; of a module that runs twice, every check must hold both times."""
    blocks: dict[tuple[str, tuple[str, ...], str], dict[tuple[str, str], Check]] = {}
    for look in looks:
        for block in look.found:
            checks = blocks.setdefault((block.path, block.alphas, block.where), {})
            gated = Check("gated", look.mode, not block.wrong, block.wrong)
            silent = any(check.name == "nonzero" and not check.ok for check in look.checks.get(block.sum, ()))
            for check in (gated, *look.checks.get(block.sum, ())):
                key = (check.name, check.mode)
                if key not in checks or (checks[key].ok and not check.ok):
                    chosen = not check.ok and check.name in block.chosen and (silent or check.name == "vjp")
                    checks[key] = replace(check, detail="" if check.ok else check.detail, choice=chosen)
    woken = [key[0] for key, checks in blocks.items() if _alive_in_training(checks)]
    if woken:
        notes.append(
            "the branch is zero in eval mode (has batch norm not seen data yet?) and alive in train mode: "
            f"{compact(woken)}"
        )
    return tuple(BlockResult(*key, tuple(checks.values())) for key, checks in blocks.items())


def _alive_in_training(checks: dict[tuple[str, str], Check]) -> bool:
    """Leave out what a block failed of the checks of liveness in eval mode alone; whether that was anything."""
    failed = [
        (name, mode) for (name, mode), check in checks.items() if name in MORTAL and mode == "eval" and not check.ok
    ]
    alive = all((name, "train") in checks and checks[name, "train"].ok for name in MORTAL)
    for key in failed if alive else ():
        del checks[key]
    return alive and bool(failed)
