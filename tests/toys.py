"""The Transformer of the authors' notebook on signal propagation: width 16, xavier weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class Layer(nn.Module):
    """Attention and a feed-forward net, each on the residual stream."""

    def __init__(self, kind: Literal["post", "pre", "rezero"], alpha: float = 0.1) -> None:
        super().__init__()
        self.kind = kind
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        if kind == "rezero":
            self.resweight = nn.Parameter(torch.full((1,), alpha))
        else:
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "post":
            x = self.norm1(x + self.mix(x))
            return self.norm2(x + self.think(x))
        if self.kind == "pre":
            x = x + self.mix(self.norm1(x))
            return x + self.think(self.norm2(x))
        x = x + self.resweight * self.mix(x)
        return x + self.resweight * self.think(x)

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def think(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def toy(kind: Literal["post", "pre", "rezero"], depth: int, seed: int, alpha: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(*(Layer(kind, alpha) for _ in range(depth)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return model
