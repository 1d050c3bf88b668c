"""What the user may ask for: checked and brought into the one form of `plan.Options`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, cast

from .errors import ConversionError
from .methods import METHODS
from .plan import NORM_KINDS, NormKind, Options


def options(**given: Any) -> Options:
    """The options of `convert` and `audit`, on every route.

    A missing option, or one given as None, has the method's default. With `alpha_init="preserve"` the defaults are
    `drop_norm="none"` and `activation="keep"`, so that a converted model computes what it computed before.

    Raises:
        ConversionError: an unknown option or value; the message lists the valid ones and names the nearest.
    """
    names = [field.name for field in fields(Options)]
    for name in given:
        if name not in names:
            raise ConversionError(unknown("option", name, names))
    given = {name: value for name, value in given.items() if value is not None}
    name = _one_of("method", given.get("method", "rezero"), tuple(METHODS))
    method = METHODS[name]
    start = None if callable(method.init) else method.init
    alpha_init = _alpha_init(given["alpha_init"]) if "alpha_init" in given else start
    preserve = alpha_init == "preserve"
    if preserve and not method.preserves:
        raise ConversionError(f"alpha_init='preserve': method {name!r} changes what a block computes at any gate")
    drop_norm = _drop_norm(given.get("drop_norm", "none" if preserve else method.drop_norm or "none"))
    if method.norm_gate and (drop_norm or given.get("alpha_init")):
        raise ConversionError(f"method {name!r} keeps the norms and starts at 0: no drop_norm, no alpha_init")
    idle = [option for option, without in _OF_GATES.items() if given.get(option, without[0]) not in without]
    idle = idle if method.placement else []
    if idle:
        raise ConversionError(f"method {name!r} moves the norms and makes no gates: no {' and no '.join(idle)}")
    activation = given.get("activation", "keep" if preserve else method.activation)
    activation = _one_of("activation", activation, ("branch", "keep"))
    granularity = _one_of("granularity", given.get("granularity", method.granularity), ("scalar", "channel"))
    if method.map == "carry" and granularity != "channel":
        raise ConversionError(f"method {name!r} has a gate for each channel: no granularity {granularity!r}")
    share = _one_of("share", given.get("share", "branch"), ("branch", "layer"))
    return Options(
        method=name,
        alpha_init=alpha_init,
        drop_norm=drop_norm,
        activation=cast(Literal["branch", "keep"], activation),
        include=_patterns("include", given.get("include", ())),
        exclude=_patterns("exclude", given.get("exclude", ())),
        share=cast(Literal["branch", "layer"], share),
        long_skips=_flag("long_skips", given.get("long_skips", False)),
        norm_types=_classes(given.get("norm_types", ())),
        granularity=cast(Literal["scalar", "channel"], granularity),
    )


_OF_GATES: dict[str, tuple[Any, ...]] = {
    "drop_norm": ("none", ["none"], ("none",)),
    "alpha_init": (0.0,),
    "activation": ("keep",),
    "share": ("branch",),
    "granularity": ("scalar",),
}
"""The options that a method without gates has no use for, with the values that ask for nothing."""


def unknown(what: str, name: object, valid: Iterable[str]) -> str:
    """One line that says `name` is not a valid `what`, what is valid, and which of those is nearest."""
    valid = sorted(valid) if not isinstance(valid, Sequence) else list(valid)
    near = get_close_matches(str(name).lower(), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r} (valid: {', '.join(valid)}){hint}"


def _one_of(option: str, value: object, valid: Sequence[str]) -> str:
    if value not in valid:
        raise ConversionError(unknown(option, value, valid))
    return str(value)


def _alpha_init(value: object) -> float | Literal["preserve"]:
    if value == "preserve":
        return "preserve"
    try:
        number = math.nan if isinstance(value, bool) else float(cast(float, value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConversionError(f"alpha_init must be a finite number or 'preserve', not {value!r}")
    return number


def _drop_norm(value: object) -> tuple[NormKind, ...]:
    kinds = _names("drop_norm", value)
    valid = (*NORM_KINDS, "none", "all")
    for kind in kinds:
        if kind not in valid:
            raise ConversionError(unknown("drop_norm", kind, valid))
    alone = {"none", "all"}.intersection(kinds)
    if alone and len(kinds) > 1:
        raise ConversionError(f"drop_norm: {sorted(alone)[0]!r} stands alone, not with {', '.join(kinds)!r}")
    if "all" in kinds:
        return NORM_KINDS
    return tuple(kind for kind in NORM_KINDS if kind in kinds)


def _patterns(option: str, value: object) -> tuple[str, ...]:
    patterns = _names(option, value)
    if "" in patterns:
        raise ConversionError(f"{option}: an empty pattern")
    return patterns


def _names(option: str, value: object) -> tuple[str, ...]:
    """A comma-separated string, or a sequence of such."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)):
        raise ConversionError(f"{option} must be a string or a sequence of strings, not {value!r}")
    found: list[str] = []
    for item in value:
        if not isinstance(item, str):
            raise ConversionError(f"{option} must hold strings, not {item!r}")
        found += _names(option, item)
    return tuple(found)


def _flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConversionError(f"{option} must be True or False, not {value!r}")
    return value


def _classes(value: object) -> tuple[Any, ...]:
    classes = (value,) if isinstance(value, type) else value
    if not isinstance(classes, Iterable) or isinstance(classes, (str, bytes)):
        raise ConversionError(f"norm_types must be a class or a sequence of classes, not {value!r}")
    classes = tuple(classes)
    for item in classes:
        if not isinstance(item, type):
            raise ConversionError(f"norm_types must hold classes, not {item!r}")
    return classes
