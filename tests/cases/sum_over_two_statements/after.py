import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Linear(width, width)
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        a = torch.tanh(self.attn(x))
        m = F.relu(self.mlp(x))
        both = self.alpha_attn * a + self.alpha_mlp * m
        return x + both
