import torch
from torch import nn


class Parts(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)


class Block(Parts):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.fc(self.norm(x))


class Pooled(Parts):
    def forward(self, x):
        return torch.cat([self.norm(x), self.fc(x)], dim=-1)
