from torch import nn


class Modulate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.condition(c).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift
