from torch import nn


class Quantizer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x):
        h = self.project(x)
        return h + (h.round() - h).detach()
