import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.ones(width))

    def join(self, x, residual):
        return residual + F.relu(x + self.bias)

    def forward(self, x):
        x = self.join(self.fc1(x), x)
        return self.join(self.fc2(x), x)
