"""A post-norm transformer encoder with a classifier on top.

`python examples/encoder.py` converts it to ReZero, prints what was done and trains it a few steps.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        attended, _ = self.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Classifier(nn.Module):
    def __init__(self, vocab_size: int = 64, width: int = 64, layers: int = 4, classes: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 128, width))
        self.layers = nn.ModuleList(EncoderLayer(width, 4, 4 * width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


def make_model() -> Classifier:
    return Classifier()


def example_inputs() -> tuple[torch.Tensor]:
    return (torch.randint(0, 64, (2, 32)),)


def main(steps: int = 40) -> None:
    import rezero_convert as rz

    torch.manual_seed(0)
    model = rz.convert(make_model(), example_inputs())
    print(rz.audit(model))

    # The question: does token 1 occur more often than token 0?
    alphas = [alpha for _, alpha in rz.alphas(model)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.randint(0, 8, (64, 32))
        labels = ((ids == 1).sum(1) > (ids == 0).sum(1)).long()
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            mean = torch.cat([alpha.detach().flatten() for alpha in alphas]).abs().mean().item()
            print(f"step {step:3d}: loss {loss.item():.3f}, mean|alpha| {mean:.4f}")


if __name__ == "__main__":
    main()
