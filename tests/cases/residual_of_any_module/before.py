from torch import nn


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return x + self.fn(x, **kwargs)


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(Residual(nn.Linear(width, width)), nn.ReLU(), Residual(nn.Linear(width, width)))

    def forward(self, x):
        return self.body(x)
