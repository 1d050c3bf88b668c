import torch
from torch import nn


class Refine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.offset = nn.Linear(width, 2)

    def forward(self, features, reference):
        return torch.sigmoid(self.offset(features) + reference)
