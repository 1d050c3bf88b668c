import torch
from torch import nn


class Coupling(nn.Module):
    """Its inverse recomputes the inputs from the outputs, so that no half may get a gate that this does not know."""

    def __init__(self, width, signed=False):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.g = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.signed = signed

    def forward(self, left, right):
        left = left - self.f(right) if self.signed else left + self.f(right)
        right = right + self.g(left)
        return left, right

    def inverse(self, left, right):
        right = right - self.g(left)
        left = left + self.f(right) if self.signed else left - self.f(right)
        return left, right
