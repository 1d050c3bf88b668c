import torch
from torch import nn


class Parts(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)


class Block(Parts):
    def forward(self, x):
        return x + self.fc(self.norm(x))


class Pooled(Parts):
    def forward(self, x):
        return torch.cat([self.norm(x), self.fc(x)], dim=-1)
