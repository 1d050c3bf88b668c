import torch
from torch import nn
from torch.nn import functional as F


class Objective(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.decode = nn.Linear(width, width)

    def forward(self, x, mean, logvar):
        out = self.decode(x)
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return F.mse_loss(out, x) + kl
