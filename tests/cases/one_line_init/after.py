import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, d):
        super().__init__(); self.fc = nn.Linear(d, d)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * torch.relu(self.fc(x))
