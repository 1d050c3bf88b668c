import torch
from torch import nn


class Conformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ff1 = nn.Sequential(nn.Identity(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.alpha_ff1 = nn.Parameter(torch.zeros(1))
        self.ff2 = nn.Sequential(nn.Identity(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.alpha_ff2 = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x + self.alpha_ff1 * (0.5 * self.ff1(x))
        x = x + self.alpha_ff2 * (0.5 * self.ff2(x))
        return x
