from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def _residual(self, x):
        return x + self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x):
        return self._residual(x)
