import torch
from torch import nn


class FeedForward(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.add_module("norm", nn.Identity())
        self.add_module("up", nn.Linear(width, 4 * width))
        self.add_module("act", nn.GELU())
        self.add_module("down", nn.Linear(4 * width, width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = FeedForward(width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.mlp(x)
