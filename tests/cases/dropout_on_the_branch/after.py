import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, drop=0.1):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.alpha * self.drop(F.gelu(self.linear(x)))
