import torch
from torch import nn
from torch.nn import functional as F


class Adapted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.delta = nn.Parameter(torch.zeros(width, width))

    def forward(self, x):
        return F.linear(x, self.weight + self.delta)
