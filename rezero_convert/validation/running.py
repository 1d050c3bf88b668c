"""Running a model as it stands, the same way every time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..capture.guard import substitute, untouched, weights_kept
from ..capture.recorded import fresh_inputs, tensors_in

SEED = 0


def run_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, gradients: bool
) -> tuple[list[Tensor], dict[str, nn.Parameter]]:
    """The tensors that a model returns, from a fixed random state; it is left as it was."""
    with untouched(model, training=training, gradients=gradients), weights_kept(model):
        substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
        torch.manual_seed(SEED)
        args, kwargs = fresh_inputs((args, kwargs))
        return list(tensors_in(model(*args, **kwargs))), dict(model.named_parameters())


def identical(one: Tensor, other: Tensor) -> bool:
    """Bit-identical up to the payload of NaNs."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
