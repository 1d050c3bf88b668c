"""A ResNet of basic or bottleneck blocks with projection shortcuts, for small images.

`python examples/resnet.py` converts it to ReZero, prints what was done and trains it a few steps.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, ...], classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        self.channels = width
        self.stem = nn.Sequential(conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        stages = [self._stage(block, width * 2**i, count, stride=1 if i == 0 else 2) for i, count in enumerate(layers)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(self.channels, classes)

    def _stage(self, block: type[BasicBlock] | type[Bottleneck], width: int, count: int, stride: int) -> nn.Sequential:
        outputs = width * block.expansion
        downsample = None
        if stride != 1 or self.channels != outputs:
            downsample = nn.Sequential(conv1x1(self.channels, outputs, stride), nn.BatchNorm2d(outputs))
        blocks = [block(self.channels, width, stride, downsample)]
        self.channels = outputs
        blocks += [block(outputs, width) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(x))
        return self.head(x.mean((2, 3)))


def make_model() -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2))


def make_bottleneck_model() -> ResNet:
    return ResNet(Bottleneck, (2, 2))


def example_inputs() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, 32, 32),)


def main(steps: int = 30) -> None:
    import rezero_convert as rz

    torch.manual_seed(0)
    model = rz.convert(make_model(), example_inputs())
    print(rz.audit(model))

    # Ten classes of noisy pictures, each around a pattern of its own.
    patterns = torch.randn(10, 3, 32, 32)
    alphas = [alpha for _, alpha in rz.alphas(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        labels = torch.randint(0, 10, (32,))
        loss = F.cross_entropy(model(patterns[labels] + torch.randn(32, 3, 32, 32)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            mean = torch.cat([alpha.detach().flatten() for alpha in alphas]).abs().mean().item()
            print(f"step {step:3d}: loss {loss.item():.3f}, mean|alpha| {mean:.4f}")


if __name__ == "__main__":
    main()
