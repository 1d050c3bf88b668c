import torch
from torch import nn


class Snake(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(width, 1))

    def forward(self, x):
        return x + torch.sin(self.frequency * x) ** 2 / self.frequency
