import torch
from torch import nn


class ScaledNorm(nn.Module):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True) + 1e-5).sqrt(), None


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.norm = ScaledNorm()

    def forward(self, x):
        y, _ = self.norm(x + self.alpha * torch.relu(self.linear(x)))
        return y
