import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        h = x
        return x + self.alpha_attn * torch.tanh(self.attn(h)) + self.alpha_mlp * self.mlp(h)
