import torch
from torch import nn


class Layer(nn.Module):
    """As fairseq and DETR have it: a flag says where the norms are."""

    def __init__(self, width, normalize_before=False):
        super().__init__()
        self.norm1 = nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mixer = nn.Linear(width, width)
        self.alpha_mixer = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(width, width)
        self.alpha_fc = nn.Parameter(torch.zeros(1))
        self.normalize_before = normalize_before

    def forward(self, x):
        skip = x
        if self.normalize_before:
            x = self.norm1(x)
        x = skip + self.alpha_mixer * torch.tanh(self.mixer(x))
        if not self.normalize_before:
            x = self.norm1(x)
        skip = x
        x = self.maybe(self.norm2, x, before=True)
        x = skip + self.alpha_fc * torch.tanh(self.fc(x))
        return self.maybe(self.norm2, x, after=True)

    def maybe(self, norm, x, before=False, after=False):
        if after ^ self.normalize_before:
            return norm(x)
        return x


class Optional(nn.Module):
    """The first norm is on every path; the last one has no call but in one arm."""

    def __init__(self, width, sandwich):
        super().__init__()
        self.last = nn.Identity()
        self.fc = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.sandwich = sandwich

    def forward(self, x):
        out = self.fc(x)
        if self.sandwich:
            out = self.last(out)
        return x + self.alpha * out
