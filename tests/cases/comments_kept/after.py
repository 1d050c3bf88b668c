import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A block."""

    def __init__(self, width):
        super().__init__()
        # one layer
        self.linear = nn.Linear(width, width)  # square
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        # the residual branch
        h = F.relu(self.linear(x))  # nonlinear
        return (
            x  # the skip
            + self.alpha * h  # the branch
        )
