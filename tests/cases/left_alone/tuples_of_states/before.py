from torch import nn


class Stack(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x, all_states):
        states = () if all_states else None
        for layer in self.layers:
            x = layer(x)
            if all_states:
                states = states + (x,)
        return tuple(value for value in [x, states] if value is not None)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = Stack(width, 4)
        self.decoder = Stack(width, 2)

    def forward(self, x, all_states):
        encoded = self.encoder(x, all_states)
        decoded = self.decoder(encoded[0], all_states)
        return decoded[0], encoded[1] + decoded[1]
