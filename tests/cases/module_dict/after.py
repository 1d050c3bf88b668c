import torch
from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, width)})
        self.alpha = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in self.layers.items()])

    def forward(self, x):
        for (name, layer), alpha in zip(self.layers.items(), self.alpha):
            x = x + alpha * F.relu(layer(x))
        return x
