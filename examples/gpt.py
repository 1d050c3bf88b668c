"""A compact GPT: pre-norm blocks of causal self-attention and MLP, tied embeddings, `generate`.

`python examples/gpt.py` converts it to ReZero, prints what was done and trains it a few steps.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 256
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.proj = nn.Linear(4 * config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.tokens(ids) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Append `count` sampled tokens."""
        for _ in range(count):
            logits = self(ids[:, -self.config.context :])[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return ids


def make_model() -> GPT:
    return GPT(GPTConfig())


def example_inputs() -> tuple[torch.Tensor]:
    return (torch.randint(0, 256, (2, 64)),)


def main(steps: int = 60) -> None:
    import rezero_convert as rz

    torch.manual_seed(0)
    model = rz.convert(make_model(), example_inputs())
    print(rz.audit(model))

    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    alphas = [alpha for _, alpha in rz.alphas(model)]
    others = [parameter for parameter in model.parameters() if not any(parameter is alpha for alpha in alphas)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": alphas, "lr": 1e-2, "weight_decay": 0.0}], lr=2e-3)
    for step in range(steps):
        starts = torch.randint(0, len(text) - 65, (16,))
        batch = torch.stack([text[start : start + 65] for start in starts.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}: loss {loss.item():.3f}, mean|alpha| {_mean_abs(alphas):.4f}")
    model.eval()
    sample = model.generate(text[None, :16], 48)[0]
    print(repr(bytes(sample.tolist()).decode(errors="replace")))


def _mean_abs(alphas: list[nn.Parameter]) -> float:
    return torch.cat([alpha.detach().flatten() for alpha in alphas]).abs().mean().item()


if __name__ == "__main__":
    main()
