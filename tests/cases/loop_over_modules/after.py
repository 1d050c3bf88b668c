import torch
from torch import nn
from torch.nn import functional as F


class Transformer(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)]))
        self.alpha_layers = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in self.layers])
        self.alpha_layers_2 = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in self.layers])

    def forward(self, x):
        for (mixer, ff), alpha_layers, alpha_layers_2 in zip(self.layers, self.alpha_layers, self.alpha_layers_2):
            x = alpha_layers * torch.tanh(mixer(x)) + x
            x = alpha_layers_2 * F.gelu(ff(x)) + x
        return x
