import functools

from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return functools.reduce(lambda value, block: value + block(value), self.blocks, x)
