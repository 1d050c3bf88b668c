import torch
from torch import nn
from torch.nn import functional as F


class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.type_as(x))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4 * dim, bias=False)
        self.proj = nn.Linear(4 * dim, dim, bias=False)
        self.proj.weight.data.zero_()  # zero init

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)))


class Mixer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        self.proj = CastedLinear(dim, dim)
        self.proj.weight.detach().zero_()

    def forward(self, x):
        return self.proj(torch.tanh(self.mix(x)))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mixer = Mixer(dim)
        self.mlp = MLP(dim)

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.mlp(x)
