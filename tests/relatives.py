"""Four small networks for the tests of methods: a ResNet, two Transformers, a stack of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            x = self.down(x)
        out += x
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        stages = [(8, 8, 1)] * depth + [(8, 16, 2)] + [(16, 16, 1)] * (depth - 1) + [(16, 24, 2)]
        self.blocks = nn.Sequential(*[Basic(*stage) for stage in [*stages, *[(24, 24, 1)] * (depth - 1)]])
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Pre(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Post(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class Dense(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.fc(x))


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module], depth: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.Sequential(*[kind(width) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network by name with double-precision weights, and inputs for it."""
    torch.manual_seed(0)
    nets = {"resnet": lambda: ResNet(), "pre": lambda: Stack(Pre, 2), "post": lambda: Stack(Post, 2)}
    model = (nets | {"dense": lambda: Stack(Dense, 3)})[name]().double()
    shape = {"resnet": (2, 3, 8, 8), "dense": (5, 4)}.get(name, (2, 3, 4))
    for parameter in model.parameters():  # biases and norms that do something
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model, torch.randn(shape, dtype=torch.float64)
