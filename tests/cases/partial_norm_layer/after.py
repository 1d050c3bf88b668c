from functools import partial

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = act_layer()
        self.fc2 = nn.Linear(4 * width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.fc2(self.act(self.fc1(x)))
