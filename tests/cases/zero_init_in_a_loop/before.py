import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.reset()

    def reset(self):
        nn.init.xavier_uniform_(self.fc1.weight)
        for parameter in self.fc2.parameters():
            parameter.detach().zero_()

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(x)))


class Convolutions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 1))
        with torch.no_grad():
            for p in (self.net[-1].bias, self.net[-1].weight):
                p.fill_(0)

    def forward(self, x):
        return x + self.net(x)
