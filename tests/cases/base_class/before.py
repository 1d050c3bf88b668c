from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.branch(x)


class Block(Base):
    def branch(self, x):
        return F.relu(self.inner(x))
