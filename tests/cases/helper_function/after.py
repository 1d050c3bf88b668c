import torch
from torch import nn
from torch.nn import functional as F


def dropout_add(x, residual, p, training):
    out = F.dropout(x, p=p, training=training)
    out = residual + out
    return out


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return dropout_add(self.alpha * F.gelu(self.dense(x)), x, 0.1, self.training)
