from torch import nn


class Inception(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, width, (1, 3), padding=(0, 1)), nn.ReLU())
        self.tall = nn.Sequential(nn.Conv2d(width, width, (3, 1), padding=(1, 0)), nn.ReLU())

    def forward(self, x):
        return self.wide(x) + self.tall(x)
