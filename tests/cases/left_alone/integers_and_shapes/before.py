from torch import nn
from torch.nn import functional as F


class Patches(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.patch = patch
        self.project = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x):
        height = x.shape[-2] + (-x.shape[-2]) % self.patch
        width = x.shape[-1] + (-x.shape[-1]) % self.patch
        return self.project(F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])))
