import torch
from torch import nn


class ChannelAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width))

    def forward(self, x):
        mean, top = self.mlp(x.mean((2, 3))), self.mlp(x.amax((2, 3)))
        return x * torch.sigmoid(mean + top)[:, :, None, None]
