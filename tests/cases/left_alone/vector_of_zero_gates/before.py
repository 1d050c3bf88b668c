import torch
from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.alpha = nn.Parameter(torch.zeros(depth))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + self.alpha[i] * F.relu(layer(x))
        return x
