"""The oracles that take the original model, or a second look: equality and idempotence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import capture
from ..capture.inputs import resolve_inputs
from ..capture.recorded import one_line
from ..detect import detect
from ..errors import ConversionError
from ..listing import number
from ..rewrite import modules
from .looks import (
    several,
)
from .results import Check
from .running import SEED, identical, run_model


def equality(original: nn.Module, preserved: nn.Module, example_inputs: Any = None) -> tuple[Check, ...]:
    """Whether a model converted with `alpha_init="preserve"` is the original: the first oracle.

    In eval and in train mode, from the same random state and with torch.nn's fused attention off on both sides: the
    outputs are bit-identical, and every parameter that both have gets the same gradient from a random cotangent, up
    to the order of summation. Both models are left as they were.

    Raises:
        ConversionError: one of the models raises on the example inputs in eval mode.
    """
    args, kwargs = resolve_inputs(original, example_inputs)
    checks: list[Check] = []
    for mode in ("eval", "train"):
        checks += _equal_in(mode, original, preserved, args, kwargs)
    return tuple(checks)


def _equal_in(
    mode: str, original: nn.Module, preserved: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Check]:
    results = []
    for name, model in (("the original", original), ("the converted model", preserved)):
        try:
            results.append(run_model(model, args, kwargs, training=mode == "train", gradients=True))
        except Exception as error:  # whatever a model raises
            if mode == "eval":
                raise ConversionError(f"{name} raised on the example inputs: {one_line(error)}") from error
            said = f"not compared, {name} does not run: {one_line(error)}"
            yield Check("outputs", mode, len(results) == 0, said)
            return
    (left, ours), (right, theirs) = results
    if len(left) != len(right):
        yield Check("outputs", mode, False, f"{len(left)} and {len(right)} tensors are returned")
        return
    apart = [
        index for index, pair in enumerate(zip(left, right, strict=True)) if not identical(*(t.detach() for t in pair))
    ]
    names = several("differs", [f"output {index}" for index in apart])
    yield Check("outputs", mode, not apart, names or f"{number(len(left), 'output')}, bit-identical")
    if not apart:
        yield _equal_gradients(mode, left, right, ours, theirs)


def _equal_gradients(
    mode: str, left: list[Tensor], right: list[Tensor], ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]
) -> Check:
    shared = [name for name, value in ours.items() if value.requires_grad and name in theirs]
    missing = [name for name in ours if name not in theirs]
    if missing:
        return Check("gradients", mode, False, several("is missing in the converted model", missing))
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one.requires_grad]
    if not pairs or not shared:
        return Check("gradients", mode, True, "nothing to compare: no output has a gradient")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        cotangents = [torch.randn_like(one) for one, _ in pairs]
    sides: list[tuple[Tensor | None, ...]] = []
    errors: list[str] = []
    for side, names in ((0, ours), (1, theirs)):
        try:
            sides.append(
                torch.autograd.grad(
                    [pair[side] for pair in pairs], [names[name] for name in shared], cotangents, allow_unused=True
                )
            )
        except RuntimeError as error:  # it overwrites what the gradient needs (RWKV's state, in eval mode)
            errors.append(one_line(error))
    if errors:
        which = "only one model" if sides else "neither model"
        return Check("gradients", mode, not sides, f"{which} can be differentiated in this mode: {errors[0]}")
    largest = max((_largest(grad) for grad in sides[0] if grad is not None), default=0.0)
    both = list(zip(shared, *sides, strict=True))
    apart = [name for name, one, other in both if not _close(one, other, largest)]
    exact = sum(_both(one, other, torch.equal) for _, one, other in both)
    detail = f"{number(len(shared), 'parameter')}, {exact} bit-identical, the others up to rounding"
    return Check("gradients", mode, not apart, several("gets another gradient", apart) or detail)


def _both(one: Tensor | None, other: Tensor | None, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    return equal(one, other) if one is not None and other is not None else one is other


def _close(one: Tensor | None, other: Tensor | None, largest: float) -> bool:
    """Equal up to the order of summation; noise is measured by the largest gradient of all.

    What is not finite has to be the same: a model may have such gradients of its own (Gemma 3n's, where it is scaled
    by a root at zero).
    """

    def near(left: Tensor, right: Tensor) -> bool:
        precision = torch.finfo(left.dtype).eps
        bound = precision**0.5 * _largest(left) + 100 * precision * largest
        return left.shape == right.shape and torch.allclose(left, right, rtol=0.0, atol=bound, equal_nan=True)

    return _both(one, other, near)


def _largest(value: Tensor) -> float:
    finite = value[value.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def idempotence(model: nn.Module, example_inputs: Any = None) -> Check:
    """Whether looking at a converted model again finds nothing to convert: the seventh oracle.

    Asked with the options of the conversion, if the model holds a record of them.

    Raises:
        ConversionError: the model cannot be captured.
    """
    record_ = modules.record(model)
    plan = detect(capture(model, example_inputs), record_.options if record_ is not None else None)
    left = [f"{site.path or 'the model'} ({site.span})" for site in plan.converted]
    detail = several("would be converted", left) or f"{number(len(plan.of('gated')), 'block')} gated already"
    return Check("idempotence", "structure", not left, detail)
