from functools import partial

from torch import nn


class Block(nn.Module):
    def __init__(self, width, norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.GELU):
        super().__init__()
        self.norm = norm_layer(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = act_layer()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))
