import torch
from torch import nn


class Positions(nn.Module):
    def __init__(self, width, length):
        super().__init__()
        self.register_buffer("table", torch.randn(length, width))

    def forward(self, x):
        return x + self.table[: x.shape[1]]
