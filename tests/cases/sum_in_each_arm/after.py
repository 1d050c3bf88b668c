import torch
from torch import nn


class Position(nn.Module):
    """Stands inside a branch in both arms."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return x + self.conv(x)


class Block(nn.Module):
    def __init__(self, width, out, downsample):
        super().__init__()
        self.downsample = downsample
        self.pool = nn.MaxPool2d(2)
        self.proj = nn.Conv2d(width, out, 1)
        self.norm = nn.BatchNorm2d(width)
        self.position = Position(width)
        self.mixer = nn.Sequential(nn.Conv2d(width, out, 1), nn.GELU())
        self.alpha_mixer = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Conv2d(out, out, 1), nn.GELU())
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if self.downsample:
            x = self.proj(self.pool(x)) + self.alpha_mixer * self.mixer(self.position(self.norm(self.pool(x))))
        else:
            x = x + self.alpha_mixer * self.mixer(self.position(self.norm(x)))
        x = x + self.alpha_mlp * self.mlp(x)
        return x
