from torch import nn
from torch.nn import functional as F


class Pyramid(nn.Module):
    def __init__(self, low, high, width):
        super().__init__()
        self.lateral = nn.Conv2d(low, width, 1)
        self.inner = nn.Conv2d(high, width, 1)

    def forward(self, fine, coarse):
        top = self.inner(coarse)
        return self.lateral(fine) + F.interpolate(top, size=fine.shape[-2:])
