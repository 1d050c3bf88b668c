from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.after = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.after(F.relu(self.linear(self.before(x))))
