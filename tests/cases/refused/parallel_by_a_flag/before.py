from torch import nn


class Layer(nn.Module):
    """As Falcon has it: attention and MLP beside each other or one behind the other, no reversible pair."""

    def __init__(self, width, parallel):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.after = nn.LayerNorm(width)
        self.attention = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.drop = nn.Dropout(0.1)
        self.parallel = parallel

    def forward(self, x):
        skip = x
        normed = self.norm(x)
        attended = self.attention(normed)
        if not self.parallel:
            skip = skip + self.drop(attended)
            normed = self.after(skip)
        out = self.mlp(normed)
        if self.parallel:
            out += attended
        return skip + self.drop(out)
