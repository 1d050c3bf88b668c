import torch
from torch import nn


class LayerScale(nn.Module):
    def __init__(self, width, init_values=1e-5, device=None):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(width, device=device))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, init_values=1e-5, device=None):
        options = {"device": device}
        super().__init__()
        self.fc = nn.Linear(width, width, **options)
        self.scale = LayerScale(width, init_values, **options)

    def forward(self, x):
        return x + self.scale(torch.relu(self.fc(x)))
