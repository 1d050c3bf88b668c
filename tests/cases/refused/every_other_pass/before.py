from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i % 2:
                x = x + block(x)
            else:
                x = block(x)
        return x


class Skipping(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i == 2:
                continue
            x = x + block(x)
        return x
