from torch import nn


class Conformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ff1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.ff2 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        x = x + 0.5 * self.ff1(x)
        x = x + 0.5 * self.ff2(x)
        return x
