import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.alpha_first = nn.Parameter(torch.zeros(1))
        self.second = nn.Linear(width, width)
        self.alpha_second = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        entry = x
        x = x + self.alpha_first * F.relu(self.first(x))
        x = x + self.alpha_second * F.relu(self.second(x))
        return x + entry
