import torch
from torch import nn


class LayerNorm(nn.LayerNorm):
    """Works in single precision."""

    def forward(self, x):
        kept = x.dtype
        return super().forward(x.type(torch.float32)).type(kept)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.fc(x)
