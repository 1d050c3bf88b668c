from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1))
        self.pool = nn.AvgPool2d(2)
        self.project = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.project(self.pool(x)) + self.conv(x)
