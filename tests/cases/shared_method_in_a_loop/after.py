import torch
from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.alpha_layers = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in self.layers])
        self.out = nn.Linear(width, width)
        self.alpha_out = nn.Parameter(torch.zeros(1))

    @staticmethod
    def add(x, y, p=0.0):
        return x + F.dropout(y, p)

    def forward(self, x):
        for layer, alpha_layers in zip(self.layers, self.alpha_layers):
            x = self.add(x, alpha_layers * F.relu(layer(x)))
        return self.add(x, self.alpha_out * self.out(x), 0.1)
