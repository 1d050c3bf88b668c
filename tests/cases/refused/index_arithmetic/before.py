from torch import nn


class Windows(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.size = size
        self.table = nn.Embedding(size * size, width)

    def forward(self, rows, columns):
        return self.table(rows * self.size + columns)
