import torch
from torch import nn


class Grouped(nn.ModuleList):
    def forward(self, x):
        return torch.cat([conv(part) for part, conv in zip(x.chunk(len(self), 1), self)], 1)


def make_conv(width, out, sizes):
    if isinstance(sizes, list):
        return Grouped(nn.Conv2d(width, out, size) for size in sizes)
    return nn.Conv2d(width, out, sizes)


class Block(nn.Module):
    def __init__(self, width, out, kind, make_norm=None):
        super().__init__()
        make_norm = make_norm or nn.BatchNorm2d
        self.same = make_conv(width, out, 1) if kind == "same" else None
        self.half = nn.Conv2d(width, out, 1, stride=2) if kind == "half" else None
        self.conv = make_conv(width, out, 3)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.norm = make_norm(out)

    def forward(self, x):
        if self.same is not None:
            shortcut = self.same(x)
        elif self.half is not None:
            shortcut = self.half(x)
        else:
            shortcut = x
        return shortcut + self.alpha * torch.relu(self.norm(self.conv(x)))


class Pooled(nn.Module):
    """The class token goes past the pool, where there is one."""

    def __init__(self, width, token, pool):
        super().__init__()
        self.token = token
        self.pool = nn.MaxPool1d(2) if pool else None
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.alpha = nn.Parameter(torch.zeros(1))

    def shortcut(self, x):
        if self.pool is None:
            return x
        if self.token:
            token, x = x[:, :1], x[:, 1:]
        else:
            token = None
        x = self.pool(x.transpose(1, 2)).transpose(1, 2)
        if token is not None:
            x = torch.cat((token, x), dim=1)
        return x

    def forward(self, x):
        return self.shortcut(x) + self.alpha * self.mlp(x)


class Given(nn.Module):
    """What comes before the projection, and the projection, may each be there or not."""

    def __init__(self, width, drop, downsample):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.drop = drop
        self.downsample = downsample

    def forward(self, x):
        shortcut = x
        out = torch.relu(self.conv(x))
        if self.drop is not None:
            x = self.drop(x)
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out = self.alpha * out + shortcut
        return out
