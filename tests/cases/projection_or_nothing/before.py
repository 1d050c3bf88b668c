import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, out, make_norm):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        if width == out:
            self.shortcut = nn.Sequential()
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1), nn.BatchNorm2d(out))

    def forward(self, x):
        return torch.relu(self.conv(x)) + self.shortcut(x)


class Pooled(nn.Module):
    """The projection's class is not known to the text, but that there may be none is."""

    def __init__(self, width, out, make_projection):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        self.shortcut = Down(width, out, make_projection) if width != out else nn.Identity()

    def forward(self, x):
        return torch.relu(self.conv(x)) + self.shortcut(x)


class Down(nn.Module):
    def __init__(self, width, out, make_projection):
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.project = make_projection(width, out)

    def forward(self, x):
        return self.project(self.pool(x))
