from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def join(self, x, residual):
        return residual + x, x.square().mean()

    def forward(self, x):
        x, loss = self.join(F.relu(self.fc1(x)), x)
        x, more = self.join(F.relu(self.fc2(x)), x)
        return x, loss + more
