import torch
from torch import nn


class DecoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.alpha_self_attn = nn.Parameter(torch.zeros(1))
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(1))

    def forward(self, x, memory):
        h = x
        x = x + self.alpha_self_attn * self.self_attn(h, h, h)[0]
        h = x
        x = x + self.alpha_cross_attn * self.cross_attn(h, memory, memory)[0]
        return x
