import torch
from torch import nn


class Additive(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)

    def forward(self, q, k):
        return self.score(torch.tanh(self.query(q)[:, :, None] + self.key(k)[:, None])).squeeze(-1)
