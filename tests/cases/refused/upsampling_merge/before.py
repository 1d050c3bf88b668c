from torch import nn
from torch.nn import functional as F


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x):
        return x + self.up(F.relu(self.down(x)))
