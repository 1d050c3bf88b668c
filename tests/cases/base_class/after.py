import torch
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.branch(x)


class Block(Base):
    def branch(self, x):
        return F.relu(self.inner(x))
