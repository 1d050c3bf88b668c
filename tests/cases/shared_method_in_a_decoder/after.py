import torch
from torch import nn
from torch.nn import functional as F


class DecoderLayer(nn.Module):
    """As in torchscale: the skip is scaled, and a layer may have no cross-attention."""

    def __init__(self, width, heads, layers, cross=True):
        super().__init__()
        self.alpha = (2 * layers) ** 0.25
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.alpha_self_attn = nn.Parameter(torch.zeros(1))
        self.encoder_attn = nn.MultiheadAttention(width, heads) if cross else None
        self.alpha_encoder_attn = nn.Parameter(torch.zeros(1))
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.alpha_fc2 = nn.Parameter(torch.zeros(1))
        self.p = 0.1

    def residual_connection(self, x, residual):
        x = F.dropout(x, self.p, self.training)
        return residual * self.alpha + x

    def forward(self, x, encoder_out):
        x = self.residual_connection(self.alpha_self_attn * self.self_attn(x, x, x)[0], x)
        if self.encoder_attn is not None:
            found = self.encoder_attn(x, encoder_out, encoder_out)[0]
            x = self.residual_connection(residual=x, x=self.alpha_encoder_attn * found)
        x = self.residual_connection(self.alpha_fc2 * self.fc2(F.relu(self.fc1(x))), x)
        return x
