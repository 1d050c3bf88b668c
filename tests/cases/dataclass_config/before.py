from dataclasses import dataclass

from torch import nn


@dataclass
class Config:
    width: int = 64
    heads: int = 4
    bias: bool = True


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = nn.MultiheadAttention(config.width, config.heads, bias=config.bias)

    def forward(self, x):
        h = self.norm(x)
        attended, _ = self.attn(h, h, h, need_weights=False)
        return x + attended
