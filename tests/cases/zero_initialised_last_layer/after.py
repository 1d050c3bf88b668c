import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.bn = nn.BatchNorm2d(width)
        nn.init.ones_(self.bn.weight)

    def forward(self, x):
        return x + self.alpha * self.bn(self.conv(F.relu(x)))
