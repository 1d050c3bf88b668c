import torch
from torch import nn


class Zipped(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))
        self.gammas = nn.ParameterList([nn.Parameter(1e-5 * torch.ones(width)) for _ in range(depth)])

    def forward(self, x):
        for layer, gamma in zip(self.layers, self.gammas):
            x = x + gamma * layer(x)
        return x


class Counted(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))
        self.gammas = nn.ParameterList([nn.Parameter(1e-5 * torch.ones(width)) for _ in range(depth)])

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + self.gammas[i] * layer(x)
        return x


class AlsoReadElsewhere(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))
        self.gammas = nn.ParameterList([nn.Parameter(1e-5 * torch.ones(width)) for _ in range(depth)])

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + self.gammas[i] * layer(x)
        return x / self.gammas[-1]
