from torch import nn


class Residual:
    """No module: it has no parameters."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return x + self.net(x)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.residuals = [Residual(self.fc)]
        self.shift = lambda x, block: x + block(x)

    def forward(self, x):
        for residual in self.residuals:
            x = residual(x)
        return x
