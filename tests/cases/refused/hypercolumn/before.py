from torch import nn
from torch.nn import functional as F


class Merge(nn.Module):
    def __init__(self, widths, out):
        super().__init__()
        self.first = nn.Conv2d(widths[0], out, 1)
        self.second = nn.Conv2d(widths[1], out, 1)
        self.third = nn.Conv2d(widths[2], out, 1)

    def forward(self, a, b, c):
        size = a.shape[-2:]
        return self.first(a) + F.interpolate(self.second(b), size) + F.interpolate(self.third(c), size)
