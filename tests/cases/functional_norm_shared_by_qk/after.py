import torch
from torch import nn
from torch.nn import functional as F


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = norm(q), norm(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn = Attention(dim)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(dim, dim)
        self.alpha_fc = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x + self.alpha_attn * self.attn(x)
        return x + self.alpha_fc * self.fc(x)
