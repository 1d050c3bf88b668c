from torch import nn


class Masked(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, causal, padding):
        return self.linear(x).masked_fill((causal + padding) > 0, 0.0)
