import torch
from torch import nn


class Fuse(nn.Module):
    def __init__(self, left, right, width):
        super().__init__()
        self.left = nn.Linear(left, width)
        self.right = nn.Linear(right, width)

    def forward(self, a, b):
        return torch.tanh(self.left(a) + self.right(b))
