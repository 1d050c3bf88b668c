import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        h = x
        x = x + self.alpha_attn * self.attn(h, h, h, need_weights=False)[0]
        x = x + self.alpha_mlp * self.mlp(x)
        return x
