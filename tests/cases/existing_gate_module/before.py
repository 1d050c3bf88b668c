import torch
from torch import nn
from torch.nn import functional as F


class LayerScale(nn.Module):
    def __init__(self, width, init=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = LayerScale(width)

    def forward(self, x):
        return x + self.scale(F.gelu(self.linear(x)))
