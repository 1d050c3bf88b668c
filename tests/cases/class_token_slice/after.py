import torch
from torch import nn


class ClassAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        token = x[:, :1]
        token = token + self.alpha * self.mlp(token)
        return torch.cat((token, x[:, 1:]), dim=1)
