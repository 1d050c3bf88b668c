from torch import nn
from torch.nn import functional as F


class Propagate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.own = nn.Linear(width, width)
        self.neighbours = nn.Linear(width, width, bias=False)

    def forward(self, x, adjacency):
        return F.relu(self.own(x) + adjacency @ self.neighbours(x))
