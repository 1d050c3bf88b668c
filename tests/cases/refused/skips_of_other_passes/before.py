import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dim, depth):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(dim, dim) for _ in range(depth)])
        self.weights = nn.Parameter(torch.ones(depth // 2))

    def forward(self, x):
        skips = []
        half = len(self.weights)
        for i in range(len(self.blocks)):
            if i >= half:
                x = x + self.weights[i - half] * skips.pop()
            x = self.blocks[i](x)
            if i < half:
                skips.append(x)
        return x
