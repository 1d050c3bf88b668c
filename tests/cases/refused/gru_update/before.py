import torch
from torch import nn


class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.update = nn.Linear(width, width)
        self.candidate = nn.Linear(width, width)

    def forward(self, x, h):
        z = torch.sigmoid(self.update(x))
        return (1 - z) * h + z * torch.tanh(self.candidate(x))
