from torch import nn


def noop(x=None, *args, **kwargs):
    "Do nothing"
    return x


class ConvLayer(nn.Sequential):
    def __init__(self, ni, nf):
        super().__init__(nn.Conv2d(ni, nf, 1), nn.ReLU())


class ResBlock(nn.Module):
    """A skip in one arm only: the other has an activation."""

    def __init__(self, ni, nf):
        super().__init__()
        self.convpath = nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1), nn.ReLU(), nn.Conv2d(nf, nf, 3, padding=1))
        self.idpath = noop if ni == nf else ConvLayer(ni, nf)

    def forward(self, x):
        return self.convpath(x) + self.idpath(x)
