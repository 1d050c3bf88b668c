import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.query = nn.Conv2d(width, width, 1, stride=stride)
        self.output = nn.Sequential()
        if stride > 1:
            self.output.add_module("upsample", nn.Upsample(scale_factor=stride))
        self.output.add_module("proj", nn.Conv2d(width, width, 1))

    def forward(self, x):
        return self.output(self.query(x).sigmoid())


class Block(nn.Module):
    def __init__(self, width, stride=1):
        super().__init__()
        self.attention = Attention(width, stride)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.attention(x)
