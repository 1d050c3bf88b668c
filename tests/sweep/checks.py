"""The oracles on one model of a zoo; a record comes out whatever happens."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import pickle
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rezero_convert as rz
from rezero_convert import validation
from rezero_convert.plan import Plan, Site
from rezero_convert.rewrite import modules
from rezero_convert.validation.running import identical

from . import zoos
from .made import Made, NotRunnable
from .record import Kind, Record

_LIBRARIES = ("torch", "torchvision", "timm", "transformers")
VERSIONS = {name: importlib.metadata.version(name) for name in _LIBRARIES}
_PACKAGE = str(Path(rz.__file__).parent)

torch.set_num_threads(1)


def examine(zoo: str, name: str, kind: Kind) -> Record:
    """Build, convert and check one model."""
    start = time.monotonic()
    record = Record(zoo, name, kind, "ok", versions=VERSIONS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            made = zoos.ZOOS[zoo].make(name, kind)
            record = replace(record, note=made.note, parameters=sum(p.numel() for p in made.model.parameters()))
            record = _examined(record, made)
    except NotRunnable as error:
        record = replace(record, status="does not run", reasons=(str(error),))
    except Exception as error:
        record = replace(record, status="failed", reasons=(f"sweep: {_one_line(error)}",), where=_where(error))
    if kind == "numbers":
        gc.collect()
    return replace(record, seconds=round(time.monotonic() - start, 2))


def _examined(record: Record, made: Made) -> Record:
    """All oracles that apply; one that raises does not keep the others from being tried."""
    model, inputs = made.model, made.inputs
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    start = time.monotonic()
    try:
        converted, warned = _convert(model, inputs)
    except Exception as error:
        return replace(record, status="failed", reasons=(f"convert: {_one_line(error)}",), where=_where(error))
    took = round(time.monotonic() - start, 2)
    plan = modules.record(converted)
    plan = plan if plan is not None else rz.audit(model, inputs).plan
    record = replace(
        record,
        convert_seconds=took,
        gates=len(list(rz.alphas(converted))),
        sites=_counts(plan),
        signature=_signature(plan),
    )
    reasons: list[str] = []
    places: list[str] = []
    checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("original", lambda: _unchanged(model, before)),
        ("no effect", lambda: _said_so(converted, warned)),
        ("state dict", lambda: _accounted(model, before, converted, plan)),
    ]
    if record.gates:
        checks += [
            ("validate", lambda: iter(rz.validate(converted, inputs).failures)),
            ("idempotence", lambda: _twice(converted, inputs)),
            ("pickle", lambda: _pickled(converted, made)),
        ]
    if record.kind == "numbers" and plan.converted:
        checks.append(("preserve", lambda: _preserved(model, inputs)))
    for title, check in checks:
        try:
            reasons += [f"{title}: {found}" for found in check()]
        except Exception as error:
            reasons.append(f"{title}: {_one_line(error)}")
            places.append(_where(error))
    return replace(record, status="failed" if reasons else "ok", reasons=tuple(reasons), where="; ".join(places))


def _convert(model: nn.Module, inputs: Any, **options: Any) -> tuple[nn.Module, bool]:
    """The model converted but not verified, and whether convert warned that there was nothing to do."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = rz.convert(model, inputs, verify=False, **options)
    return converted, any(issubclass(one.category, rz.NoEffectWarning) for one in caught)


# The checks: each yields what is wrong


def _unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> Iterator[str]:
    now = model.state_dict()
    if now.keys() != before.keys():
        yield "the given model has other keys now"
    yield from (
        f"{key} of the given model changed" for key in before if key in now and not _same(now[key], before[key])
    )


def _said_so(converted: nn.Module, warned: bool) -> Iterator[str]:
    plan = modules.record(converted)
    if warned != (plan is None or not plan.converted):
        yield "convert warned of having no effect and has one" if warned else "convert has no effect and does not warn"


def _accounted(model: nn.Module, before: dict[str, torch.Tensor], converted: nn.Module, plan: Plan) -> Iterator[str]:
    """Every key of the state dict is as before, or the plan says why not; a shared tensor has several keys."""
    old, new = model.state_dict(keep_vars=True), converted.state_dict(keep_vars=True)
    sites = plan.edited
    gates = [(site.path, gate) for site in sites for gate in site.gates]
    made = {_join(path, name) for path, gate in gates if not gate.existing for name in gate.parameters()}
    reset = {_join(path, gate.alpha) for path, gate in gates if gate.existing and gate.init is not None}
    reset |= {repair.parameter for site in sites for repair in site.repairs}
    gone = [norm for site in sites for norm in site.norms if norm.action != "keep" and norm.path]
    biases = {f"{norm.bias}.bias" for norm in gone if norm.bias}
    dropped = {key for norm in gone for key in old if key.startswith(f"{norm.path}.")}
    added, left, changed = new.keys() - old.keys(), old.keys() - new.keys(), old.keys() & new.keys()
    yield from (f"{key} was added, the plan does not say so" for key in added - _aliases(new, made | biases))
    yield from (f"{key} is in the plan and was not added" for key in made - new.keys())
    yield from (f"{key} is gone, the plan does not say so" for key in left - _aliases(old, dropped))
    own = {f"{norm.path}.{name}" for norm in gone for name in ("weight", "bias")}
    yield from (f"{key} of a dropped norm is there" for key in own & changed)
    yield from (
        f"{key} has another value or form"
        for key in changed - _aliases(new, reset)
        if not _same(new[key].detach(), before[key])
    )


def _aliases(state: dict[str, torch.Tensor], names: set[str]) -> set[str]:
    """All names in a state dict of the tensors of these names."""
    wanted = {id(state[name]) for name in names if name in state}
    return {name for name, value in state.items() if id(value) in wanted}


def _twice(converted: nn.Module, inputs: Any) -> Iterator[str]:
    again, warned = _convert(converted, inputs)
    if not warned:
        yield "converting the converted model has an effect"
    if [type(module) for module in again.modules()] != [type(module) for module in converted.modules()]:
        yield "other classes after the second conversion"
    if again.state_dict().keys() != converted.state_dict().keys():
        yield "other keys after the second conversion"


def _pickled(converted: nn.Module, made: Made) -> Iterator[str]:
    """Pickles of converted models are models alike; where the original cannot be pickled nothing is asked."""
    try:
        pickle.dumps(made.model)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):  # RuntimeError: parametrized modules
        return
    other = pickle.loads(pickle.dumps(converted))
    if [type(module) for module in other.modules()] != [type(module) for module in converted.modules()]:
        yield "other classes"
    if [name for name, _ in rz.alphas(other)] != [name for name, _ in rz.alphas(converted)]:
        yield "other alphas"
    if made.real:
        for (_, one), (_, two) in zip(rz.alphas(converted), rz.alphas(other), strict=True):
            with torch.no_grad():
                two.copy_(one.normal_())
        left, right = (made.run(model) for model in (converted, other))
        if len(left) != len(right) or not all(map(identical, left, right)):
            yield "other outputs"


def _preserved(model: nn.Module, inputs: Any) -> Iterator[str]:
    preserved, _ = _convert(model, inputs, alpha_init="preserve")
    for check in validation.equality(model, preserved, inputs):
        if not check.ok:
            yield f"{check.name} ({check.mode}): {check.detail}"


# What a record says of the plan


def _counts(plan: Plan) -> dict[str, int]:
    said = Counter(f"refused {site.code}" if site.verdict == "refused" else site.verdict for site in plan.sites)
    return dict(sorted(said.items()))


def _signature(plan: Plan) -> str:
    parts = sorted({_decision(site) for site in plan.sites})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _decision(site: Site) -> str:
    norms = sorted({(norm.kind, norm.position, norm.action) for norm in site.norms})
    gates = [(gate.existing, gate.init) for gate in site.gates]
    return repr((str(site.span), site.verdict, site.code, site.form, norms, gates, site.activation is not None))


# Small things


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.is_meta or identical(one, other)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:500]}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    return f"{Path(own[-1].filename).relative_to(_PACKAGE)}:{own[-1].lineno} {own[-1].name}" if own else ""
