"""Residual adds wherever code puts them; a plain model file, also read by the source route."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def dropout_add(x, residual, prob, training):
    out = F.dropout(x, p=prob, training=training)
    out = residual + out
    return out


class Branch(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return F.gelu(self.linear(self.norm(x)))


class Pairs(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            self.layers.append(nn.ModuleList([Branch(width), Branch(width)]))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)


class Stack(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Branch(width) for _ in range(depth))


class Plain(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Enumerated(Stack):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = x + block(x) * (i + 1)
        return x


class Indexed(Stack):
    def forward(self, x):
        for i in range(len(self.blocks)):
            x = x + self.blocks[i](x)
        return x


class Sliced(Stack):
    def forward(self, x):
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = x + block(x)
        return x


class Zipped(Stack):
    def __init__(self, width=8, depth=3):
        super().__init__(width, depth)
        self.others = nn.ModuleList(Branch(width) for _ in range(depth))

    def forward(self, x):
        for first, second in zip(self.blocks, self.others, strict=True):
            x = x + first(x)
            x = x + torch.relu(second(x))
        return x


class Tied(Stack):
    def forward(self, x):
        for _ in range(3):
            x = x + self.blocks[0](x)
        return x


class Nested(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Branch(width) for _ in range(2)) for _ in range(2))

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = x + block(x)
        return x


class Two(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = Branch(width)
        self.b = Branch(width)
        self.g = nn.Parameter(torch.full((width,), 0.5))


class Comprehension(Two):
    def forward(self, x):
        first, second = [x + torch.relu(f(x)) for f in (self.a, self.b)]
        return first * second


class Helper(Two):
    def forward(self, x):
        x = dropout_add(self.a(x), x, 0.1, self.training)
        return dropout_add(self.b(x), residual=x, prob=0.1, training=self.training)


class Parallel(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.inner = nn.LayerNorm(width)

    def forward(self, x):
        h = self.inner(x)
        return x + self.a(h) + self.b(h)


class Subtracted(Two):
    def forward(self, x):
        return x - self.a(x)


class Addcmul(Two):
    def forward(self, x):
        return torch.addcmul(x, self.a(x), self.b(x))


class Lerp(Two):
    def forward(self, x):
        return torch.lerp(x, self.a(x), torch.full((1,), 0.5))


class Towards(Two):
    def forward(self, x):
        return x + self.g * (self.a(x) - x)


class ScaledAdd(Two):
    def forward(self, x):
        return torch.add(x, self.a(x), alpha=2)


class KeywordAdd(Two):
    def forward(self, x):
        return torch.add(input=x, other=self.a(x))


class InPlaceOnBranch(Two):
    def forward(self, x):
        y = self.a(x)
        y.add_(x)
        return y


class InPlaceOnSkip(Two):
    def forward(self, x):
        y = x.clone()
        y.add_(self.a(x))
        return y


class Statements(Two):
    def forward(self, x):
        y = x + self.a(x)
        y = y + self.b(x)
        return y


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **options):
        return self.fn(x, **options) + x


class Generic(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(Residual(Branch(width)), Residual(nn.Linear(width, width)))

    def forward(self, x):
        return self.net(x)


class Join(nn.Module):
    def forward(self, x, residual):
        return x + residual


class NormByCaller(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, width), Join()]) for _ in range(2)
        )

    def forward(self, x):
        for norm, block, join in self.layers:
            x = join(block(norm(x)), x)
        return x


class Checkpointed(Two):
    def forward(self, x):
        def run(h):
            return h + self.a(h)

        return checkpoint(run, x, use_reentrant=False)


class Reentrant(Two):
    def forward(self, x):
        def run(h):
            return h + self.a(h)

        return checkpoint(run, x, use_reentrant=True)


class Base(Two):
    def forward(self, x):
        return x + self.a(x)


class Child(Base):
    def forward(self, x):
        x = super().forward(x)
        return x + torch.relu(self.b(x))


class Dictionary(Two):
    def forward(self, x):
        state = {"h": x}
        state["h"] = state["h"] + self.a(state["h"])
        return state["h"]


class Tuples(Two):
    def inner(self, x):
        return self.a(x), None

    def forward(self, x):
        y, _ = self.inner(x)
        return (x + y, y)[0]


class Lambda(Two):
    def forward(self, x):
        return (lambda h: h + self.a(h))(x)


class Static(Two):
    @staticmethod
    def join(x, y):
        return x + y

    def forward(self, x):
        return self.join(x, self.a(x))


class Arms(Two):
    def forward(self, x):
        if self.training:
            return x + F.dropout(self.a(x), 0.1)
        else:
            return x + self.a(x)


class Walrus(Two):
    def forward(self, x):
        return x + y if (y := self.a(x)) is not None else x


class Summed(Two):
    def forward(self, x):
        return sum([x, self.a(x)])


class Holder:
    def __init__(self, module):
        self.module = module

    def run(self, x):
        return x + self.module(x)


class Held(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.holder = Holder(self.a)

    def forward(self, x):
        return self.holder.run(x)
