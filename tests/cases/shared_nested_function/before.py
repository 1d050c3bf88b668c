from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        def add(residual, branch):
            out = F.dropout(branch, 0.1, self.training)
            return residual + out

        scaled = lambda y, x: x + 0.5 * y
        h = self.norm1(x)
        x = add(x, self.attn(h, h, h)[0])
        x = add(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return scaled(F.relu(self.fc2(F.relu(self.fc1(x)))), x)
