import torch
from torch import nn


class GRN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        scale = x.norm(dim=(1, 2), keepdim=True)
        scale = scale / (scale.mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale) + self.bias + x
