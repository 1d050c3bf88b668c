from torch import nn
from torch.nn import functional as F


class RepVGG(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))
