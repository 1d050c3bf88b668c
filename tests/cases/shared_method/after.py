import torch
from torch import nn
from torch.nn import functional as F


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, normalize_before=False):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.alpha_self_attn = nn.Parameter(torch.zeros(1))
        self.self_attn_layer_norm = nn.Identity()
        self.dropout_module = nn.Dropout(0.1)
        self.normalize_before = normalize_before
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.alpha_fc2 = nn.Parameter(torch.zeros(1))
        self.final_layer_norm = nn.Identity()

    def residual_connection(self, x, residual):
        return residual + x

    def forward(self, x):
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(x, x, x, need_weights=False)
        x = self.dropout_module(x)
        x = self.residual_connection(self.alpha_self_attn * x, residual)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)

        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        x = self.dropout_module(x)
        x = self.residual_connection(self.alpha_fc2 * x, residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x
