import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, scale=0.2):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.scale = scale

    def forward(self, x):
        return x + self.alpha * (self.scale * F.relu(self.conv(x)))
