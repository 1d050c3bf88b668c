from torch import nn


class DecoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x, memory):
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h)[0]
        h = self.norm2(x)
        x = x + self.cross_attn(h, memory, memory)[0]
        return x
