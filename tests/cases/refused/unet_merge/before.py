from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        deep = F.relu(self.middle(F.relu(self.down(x))))
        return x + self.narrow(self.up(deep))
