import torch
from torch import nn


class Embedding(nn.Module):
    def __init__(self, size, width, length):
        super().__init__()
        self.token = nn.Embedding(size, width)
        self.position = nn.Parameter(torch.zeros(length, width))

    def forward(self, ids):
        return self.token(ids) + self.position
