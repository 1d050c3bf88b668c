from torch import nn


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attention = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden_states):
        attn_output = self.attention(self.ln1(hidden_states))
        mlp_output = self.mlp(self.ln2(hidden_states))
        hidden_states = mlp_output + attn_output + hidden_states
        return hidden_states
