from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.alpha = 1.0

    def forward(self, x):
        return x + self.alpha * 2 + F.relu(self.linear(x))
