from torch import nn
from torch.nn import functional as F


class DecoderLayer(nn.Module):
    """As in torchscale: the skip is scaled, and a layer may have no cross-attention."""

    def __init__(self, width, heads, layers, cross=True):
        super().__init__()
        self.alpha = (2 * layers) ** 0.25
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = nn.MultiheadAttention(width, heads) if cross else None
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.p = 0.1

    def residual_connection(self, x, residual):
        x = F.dropout(x, self.p, self.training)
        return residual * self.alpha + x

    def forward(self, x, encoder_out):
        x = self.residual_connection(self.self_attn(x, x, x)[0], x)
        x = self.self_attn_layer_norm(x)
        if self.encoder_attn is not None:
            found = self.encoder_attn(x, encoder_out, encoder_out)[0]
            x = self.residual_connection(residual=x, x=found)
            x = self.encoder_attn_layer_norm(x)
        x = self.residual_connection(self.fc2(F.relu(self.fc1(x))), x)
        return self.final_layer_norm(x)
