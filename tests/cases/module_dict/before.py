from torch import nn
from torch.nn import functional as F


class Stack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, width)})

    def forward(self, x):
        for name, layer in self.layers.items():
            x = x + F.relu(layer(x))
        return x
