from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        entry = x
        x = x + F.relu(self.first(x))
        x = x + F.relu(self.second(x))
        return x + entry
