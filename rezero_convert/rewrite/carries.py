"""The layer that computes the gate of a highway block: from and to the channels of the skip."""

from __future__ import annotations

import torch
from torch import nn

from ..plan import Gate

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""By the number of dimensions that follow that of the channels."""


def made(gate: Gate, bias: float, like: torch.Tensor) -> nn.Module:
    """The layer, its weights drawn by its class, its bias constant; of the dtype and on the device of a tensor."""
    (channels,) = gate.shape
    size = (1,) if gate.scale.trailing else ()
    layer: nn.Module = _LAYERS[gate.scale.trailing](channels, channels, *size, device=like.device, dtype=like.dtype)
    assert isinstance(layer.bias, torch.Tensor)
    nn.init.constant_(layer.bias, bias)
    return layer


def written(gate: Gate, bias: float, channels: str, factory: str, nn_name: str, me: str) -> list[str]:
    """The lines that make it in a constructor."""
    size = ", 1" if gate.scale.trailing else ""
    layer = f"{nn_name}.{_LAYERS[gate.scale.trailing].__name__}({channels}, {channels}{size}{factory})"
    return [f"{me}.{gate.alpha} = {layer}", f"{nn_name}.init.constant_({me}.{gate.alpha}.bias, {bias!r})"]
