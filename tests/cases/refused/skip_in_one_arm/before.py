import torch
from torch import nn


class PreActivation(nn.Module):
    def __init__(self, width, down):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        if down:
            self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x):
        out = torch.relu(self.norm(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        return torch.tanh(self.conv(out)) + shortcut
