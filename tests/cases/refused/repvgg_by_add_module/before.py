from torch import nn


class ConvNorm(nn.Sequential):
    def __init__(self, width, kernel):
        super().__init__()
        self.add_module("conv", nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(width))


class RepVGG(nn.Module):
    def __init__(self, width, plain):
        super().__init__()
        self.conv = ConvNorm(width, 3)
        if plain:
            self.point = nn.Conv2d(width, width, 1)
        else:
            self.point = ConvNorm(width, 1)

    def forward(self, x):
        return self.conv(x) + self.point(x) + x
