"""A model of a zoo with inputs on which it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rezero_convert.capture import normalize_inputs
from rezero_convert.validation.running import run_model

LARGEST_REAL = 400_000_000
"""Parameters; larger models are not built with numbers."""


class NotRunnable(Exception):
    """The model cannot be built, or does not run unconverted."""


@dataclass(frozen=True)
class Made:
    """A model that ran unconverted on these inputs."""

    model: nn.Module
    inputs: Any
    note: str = ""

    @property
    def real(self) -> bool:
        return not any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers()))

    def run(self, model: nn.Module) -> list[Tensor]:
        args, kwargs = normalize_inputs(copy.deepcopy(self.inputs))
        return run_model(model, args, kwargs, training=False, gradients=False)[0]


@dataclass(frozen=True)
class Attempt:
    """One way to build a model, and ways to make inputs for it."""

    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[nn.Module], Any], ...]
    note: str = ""


def first_that_runs(attempts: Iterable[Attempt], device: str, built_on: str | None = None) -> Made:
    """The first attempt that can be built and then runs on a device.

    Raises:
        NotRunnable: none does; gives all errors.
    """
    why: dict[str, None] = {}
    for attempt in attempts:
        try:
            if device != "meta":
                _check_size(attempt)
            with torch.device(built_on or device):
                model = attempt.build().eval().to(device)
        except Exception as error:  # whatever a model raises
            why[_told(attempt, error)] = None
            continue
        for make in attempt.inputs:
            try:
                with torch.device(device):
                    made = Made(model, make(model), f"{attempt.note} {device}".strip())
                made.run(model)
            except Exception as error:
                why[_told(attempt, error)] = None
                continue
            return made
    raise NotRunnable(" | ".join(why))


def _told(attempt: Attempt, error: Exception) -> str:
    return f"{attempt.note}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_size(attempt: Attempt) -> None:
    """Refuse what is too large to be built with numbers; what does not build on meta is taken to be small."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in attempt.build().parameters())
    except Exception:  # of a constructor that needs values; the build with numbers comes next and tells what it raises
        return
    if size > LARGEST_REAL:
        raise NotRunnable(f"{size / 1e6:.0f} million parameters")


def structural(attempts: Iterable[Attempt]) -> Made:
    """A model on the meta device; where it cannot be built there, moved to it; where it does not run, with numbers."""
    listed = tuple(attempts)
    for device, built_on in (("meta", "meta"), ("meta", "cpu")):
        try:
            return first_that_runs(listed, device, built_on)
        except NotRunnable:
            continue
    return first_that_runs(listed, "cpu")
