from torch import nn


class Embeddings(nn.Module):
    def __init__(self, size, width, length):
        super().__init__()
        self.word = nn.Embedding(size, width)
        self.position = nn.Embedding(length, width)
        self.kind = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, positions, kinds):
        return self.norm(self.word(ids) + self.position(positions) + self.kind(kinds))
