import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, norm_first):
        super().__init__()
        self.norm_first = norm_first
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.alpha_fc2 = nn.Parameter(torch.zeros(1))

    def feed_forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))

    def forward(self, x):
        if self.norm_first:
            x = x + self.alpha_fc2 * self.feed_forward(x)
        else:
            x = x + self.alpha_fc2 * self.feed_forward(x)
        return x
