from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x, depth):
        for block in self.blocks[:depth]:
            x = x + F.relu(block(x))
        return x
