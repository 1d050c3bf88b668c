import torch
from torch import nn


class Mixed(nn.ModuleDict):
    """A convolution for each group of channels; what it walks within itself concerns no block around it."""

    def __init__(self, width, kernels):
        super().__init__()
        for number, kernel in enumerate(kernels):
            self.add_module(str(number), nn.Conv2d(width // len(kernels), width // len(kernels), kernel, padding="same"))

    def forward(self, x):
        parts = torch.chunk(x, len(self), 1)
        return torch.cat([conv(part) for conv, part in zip(self.values(), parts)], 1)


def make_conv(width, kernel):
    return Mixed(width, kernel) if isinstance(kernel, list) else nn.Conv2d(width, width, kernel, padding="same")


class Block(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.expand = nn.Conv2d(width, width, 1)
        self.conv = make_conv(width, kernel)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        shortcut = x
        x = torch.relu(self.expand(x))
        x = self.conv(x)
        x = self.alpha * x + shortcut
        return x
