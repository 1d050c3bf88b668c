import torch
from torch import nn


class FeedForward(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.add_module("norm", nn.LayerNorm(width))
        self.add_module("up", nn.Linear(width, 4 * width))
        self.add_module("act", nn.GELU())
        self.add_module("down", nn.Linear(4 * width, width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = FeedForward(width)

    def forward(self, x):
        return x + self.mlp(x)
