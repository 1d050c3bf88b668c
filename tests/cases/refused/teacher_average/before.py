import torch
from torch import nn


class Average(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.student = nn.Linear(width, width)
        self.teacher = nn.Linear(width, width)

    def forward(self, x):
        return 0.9 * torch.relu(self.teacher(x)) + 0.1 * torch.relu(self.student(x))
