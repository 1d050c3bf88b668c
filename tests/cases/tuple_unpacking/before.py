from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(width, width)

    def forward(self, x, state):
        out, state = self.rnn(x, state)
        x, state = x + out, state
        return x, state
