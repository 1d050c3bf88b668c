"""Parameter groups for optimizers: the gates by themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ConversionError
from ..rewrite.modules import alphas


def param_groups(
    model: nn.Module,
    lr: float | None = None,
    alpha_lr: float | None = None,
    weight_decay: float | None = None,
    *,
    optimizer: type[torch.optim.Optimizer] | None = None,
) -> list[dict[str, Any]]:
    """Two parameter groups for any `torch.optim` optimizer: the weights, and the gates, which are never decayed.

    Decay pulls a gate back to the identity it starts from; under AdamW it does so while a gate's gradient is small. An
    optimizer that moves a parameter by at most its rate a step (Adam, AdamW, RMSprop) needs about 1/rate steps to open
    a gate: there 10 to 30 times `lr` is a good `alpha_lr`. torch's Adafactor moves it by at most a thousandth of its
    rate while it is near zero (it scales steps by the parameter's size, at least 1e-3) and wants 30 times or more. SGD
    gains little above `lr`, and diverges at 100 times. Adagrad did best with `lr` or less on nets of 32 layers, with 10
    to 30 times on one of 16: `lr` is the safe choice. `examples/alpha_rates.py` prints the figures for the latter.

    `torch.optim.Muon` refuses what is not a matrix: its gates need an optimizer of their own.

    Args:
        model: a converted model, or one around it (DistributedDataParallel).
        lr: learning rate of the weights; None leaves it to the optimizer.
        alpha_lr: learning rate of the gates; if None, `lr`, or what `optimizer` says.
        weight_decay: of the weights; None leaves it to the optimizer.
        optimizer: the class that the groups are for: with `lr` and no `alpha_lr`, gates get `lr` times 10 (Adam, its
            variants, RMSprop), 30 (Adafactor) or 1 (all others).

    Returns:
        The groups `[weights, gates]`, each a dict with the trainable parameters in `params`, each parameter once.

    Raises:
        ConversionError: the model has no trainable gate, or a rate is not a number of at least 0.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> groups = rz.param_groups(rz.convert(layer, x), lr=1e-3, alpha_lr=1e-2, weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(8, 0.001, 0.1), (2, 0.01, 0.0)]
    """
    for name, value in (("lr", lr), ("alpha_lr", alpha_lr), ("weight_decay", weight_decay)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConversionError(f"{name} must be a number of at least 0, not {value!r}")
    gates = [alpha for _, alpha in alphas(model) if alpha.requires_grad]
    if not gates:
        raise ConversionError(f"{type(model).__qualname__} has no trainable gate: convert the model first")
    ids = {id(gate) for gate in gates}
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in ids]
    if alpha_lr is None and lr is not None:
        alpha_lr = lr * _times(optimizer)
    first: dict[str, Any] = {"params": weights}
    second: dict[str, Any] = {"params": gates, "weight_decay": 0.0}
    first |= {key: value for key, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    second |= {"lr": alpha_lr} if alpha_lr is not None else {}
    return [first, second]


_TIMES: tuple[tuple[float, tuple[type[torch.optim.Optimizer], ...]], ...] = (
    (10.0, (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
            torch.optim.RMSprop)),
    (30.0, (torch.optim.Adafactor,)),
)  # fmt: skip
"""How many times the weights' rate is a good one for gates, by the optimizer's class."""


def _times(optimizer: type[torch.optim.Optimizer] | None) -> float:
    for times, family in _TIMES:
        if optimizer is not None and issubclass(optimizer, family):
            return times
    return 1.0
