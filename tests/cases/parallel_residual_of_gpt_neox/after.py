import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.alpha_attention = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.alpha_mlp = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states):
        attn_output = self.attention(hidden_states)
        mlp_output = self.mlp(hidden_states)
        hidden_states = self.alpha_mlp * mlp_output + self.alpha_attention * attn_output + hidden_states
        return hidden_states
