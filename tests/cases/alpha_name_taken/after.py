import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.rezero_alpha = nn.Parameter(torch.zeros(1))
        self.alpha = 1.0

    def forward(self, x):
        return x + self.alpha * 2 + self.rezero_alpha * F.relu(self.linear(x))
