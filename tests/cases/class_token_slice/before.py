import torch
from torch import nn


class ClassAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        token = x[:, :1]
        token = token + self.mlp(self.norm(token))
        return torch.cat((token, x[:, 1:]), dim=1)
