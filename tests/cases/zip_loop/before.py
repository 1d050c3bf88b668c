from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers):
            x = x + F.relu(layer(norm(x)))
        return x
