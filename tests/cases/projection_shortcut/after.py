import torch
from torch import nn
from torch.nn import functional as F


class Down(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x):
        return self.shortcut(x) + self.alpha * F.relu(self.conv2(F.relu(self.conv1(x))))
