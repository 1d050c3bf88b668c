from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, norm_first):
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def feed_forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def forward(self, x):
        if self.norm_first:
            x = x + self.feed_forward(self.norm(x))
        else:
            x = self.norm(x + self.feed_forward(x))
        return x
