from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, drop=0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.drop(F.gelu(self.linear(self.norm(x))))
