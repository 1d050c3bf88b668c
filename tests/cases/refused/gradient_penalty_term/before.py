from torch import nn


class Critic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, real, fake):
        return self.net(fake).mean() - self.net(real).mean() + 10.0 * (real - fake).pow(2).mean()
