import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, skip_after_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
        self.mlp = Mlp(width)
        self.skip_after_norm = skip_after_norm

    def forward(self, x):
        normed = self.norm(x)
        if self.skip_after_norm:
            skip = normed
        else:
            skip = x
        return self.mlp(torch.relu(self.fc(normed)), skip)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x, skip):
        return skip + torch.relu(self.fc(x))
