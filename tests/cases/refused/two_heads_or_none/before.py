import torch
from torch import nn


class Head(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, classes)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


class Classifier(nn.Module):
    """With distillation: the mean of two heads, of which none may be there."""

    def __init__(self, width, classes):
        super().__init__()
        self.head = Head(width, classes) if classes > 0 else nn.Identity()
        self.head_dist = Head(width, classes) if classes > 0 else nn.Identity()

    def forward(self, x):
        return (self.head(x) + self.head_dist(x)) / 2
