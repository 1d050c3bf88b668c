import torch
import torch.nn.functional as F
from torch import nn


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.fc1.weight, gain=0.5)
        nn.init.xavier_uniform_(self.fc2.weight, gain=0.0)
        nn.init.constant_(self.fc2.bias, val=0)

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(x)))


class Deviation(nn.Module):
    def __init__(self, width, std=0.02):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.up.weight, 0, std)
        self.down.weight.data.normal_(0, 0)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))
