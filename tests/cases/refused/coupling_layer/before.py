import torch
from torch import nn


class Coupling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, 2 * width)

    def forward(self, x):
        first, second = x.chunk(2, dim=-1)
        shift, scale = self.net(first).chunk(2, dim=-1)
        return torch.cat((first, second * torch.exp(scale) + shift), dim=-1)
