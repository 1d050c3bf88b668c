import torch
from torch import nn


def noop(x=None, *args, **kwargs):
    "Do nothing"
    return x


class ConvLayer(nn.Sequential):
    def __init__(self, ni, nf, ks=3, act=True):
        layers = [nn.Conv2d(ni, nf, ks, padding=ks // 2), nn.BatchNorm2d(nf)]
        if act:
            layers.append(nn.ReLU())
        super().__init__(*layers)


class ResBlock(nn.Module):
    """As fastai has it."""

    def __init__(self, ni, nf, stride=1):
        super().__init__()
        self.convpath = nn.Sequential(ConvLayer(ni, nf), ConvLayer(nf, nf, act=False))
        self.alpha = nn.Parameter(torch.zeros(1))
        self.idpath = noop if ni == nf else ConvLayer(ni, nf, 1, act=False)
        self.pool = noop if stride == 1 else nn.AvgPool2d(2, ceil_mode=True)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.alpha * self.act(self.convpath(x)) + self.idpath(self.pool(x))
