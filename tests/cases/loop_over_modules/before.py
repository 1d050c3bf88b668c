import torch
from torch import nn
from torch.nn import functional as F


class Transformer(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)]))

    def forward(self, x):
        for mixer, ff in self.layers:
            x = torch.tanh(mixer(x)) + x
            x = F.gelu(ff(x)) + x
        return x
