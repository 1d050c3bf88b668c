"""Small modules for tests: children by keyword, and what to ask of a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rezero_convert import sources
from rezero_convert.capture import capture
from rezero_convert.detect import detect
from rezero_convert.options import options as make_options
from rezero_convert.plan import Plan, Site

W = 8


class Net(nn.Module):
    """Children by keyword; subclasses define `forward`."""

    def __init__(self, **children: nn.Module | Tensor | float) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Parallel(nn.Module):
    """Two branches are added to one skip."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x)) + torch.tanh(self.b(x))


class Walked(nn.Module):
    """Adds in a loop over its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Linears(Net):
    """Two linear layers to compute with."""

    def __init__(self, **children: Any) -> None:
        super().__init__(a=nn.Linear(W, W), b=nn.Linear(W, W), **children)


def plan(model: nn.Module, *inputs: Any, **options: Any) -> Plan:
    return detect(capture(model, inputs), make_options(**options))


def segment(site: Site) -> str:
    return "" if site.span is None else sources.segment(site.span)


def only(found: Plan, text: str = "") -> Site:
    """The one site whose add contains a text."""
    sites = [site for site in found.sites if text in segment(site)]
    assert len(sites) == 1, [(site.verdict, site.code, site.reason, segment(site)) for site in found.sites]
    return sites[0]


def vectors(*leading: int) -> Tensor:
    return torch.randn(*(leading or (2, 3)), W)


def images(channels: int = W) -> Tensor:
    return torch.randn(2, channels, 8, 8)
