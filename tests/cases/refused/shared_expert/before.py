from torch import nn
from torch.nn import functional as F


class Experts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.routed = nn.Linear(width, width)
        self.shared = nn.Linear(width, width)

    def forward(self, x):
        return F.gelu(self.routed(x)) + F.gelu(self.shared(x))
