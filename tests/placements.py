"""Residual adds wherever code puts them; a plain model file, also read by the source route."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def residual(block, x):
    return x + block(x)


def dropout_add(x, residual, prob, training):
    out = F.dropout(x, p=prob, training=training)
    out = residual + out
    return out


def scaled_add(skip, branch, skip_scale, branch_scale):
    return skip * skip_scale + branch_scale * F.dropout(branch, 0.1, training=False) / 2


def depth_add(branch, skip, depth):
    scale = 1 / depth**0.5
    return branch * scale + skip


def balanced_add(skip, branch, scale):
    return skip * scale + branch * scale


def squared_add(skip, branch):
    return skip + branch * branch


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


class NestedPairs(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.downs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.ModuleList([Branch(width), Branch(width)]) for _ in range(depth)) for depth in (1, 2)
        )

    def forward(self, x):
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = down(x)
            for attn, ff in stage:
                x = x + attn(x)
                x = x + ff(x)
        return x


class Stage(Stack):
    def __init__(self, width, depth):
        super().__init__(width, depth)
        self.down = nn.Linear(width, width)


class NestedAttribute(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stages = nn.ModuleList(Stage(width, depth) for depth in (2, 1))

    def forward(self, x):
        for stage in self.stages:
            x = stage.down(x)
            for block in stage.blocks:
                x = x + block(x)
        return x


class NestedNumbered(Nested):
    def forward(self, x):
        for i, stage in enumerate(self.stages):
            for j in range(len(stage)):
                x = x + self.stages[i][j](x)
        return x


class NestedRepeats(Stack):
    def forward(self, x):
        for _ in range(2):
            for block in self.blocks:
                x = x + block(x)
        return x


class NestedThrice(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.trees = nn.ModuleList(
            nn.Sequential(nn.Sequential(Branch(width), Branch(width)), nn.Sequential(Branch(width))) for _ in range(2)
        )

    def forward(self, x):
        for tree in self.trees:
            for stage in tree:
                for block in stage:
                    x = x + block(x)
        return x


class NestedBackwards(Nested):
    def forward(self, x):
        for stage in self.stages:
            for block in reversed(stage):
                x = x + block(x)
        return x


class SomePasses(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x) if block is self.blocks[2] else x + block(x)
        return x


class SlicedByInput(Stack):
    def forward(self, x):
        depth = x.shape[0]
        for block in self.blocks[:depth]:
            x = x + block(x)
        return x


class Backwards(Stack):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = x + block(x)
        return x


class BackwardsByNumber(Stack):
    def forward(self, x):
        for i in reversed(range(len(self.blocks))):
            x = x + self.blocks[i](x)
        return x


class BackwardsPairs(Pairs):
    def forward(self, x):
        for i, (attn, ff) in enumerate(reversed(self.layers)):
            x = x + attn(x)
            x = x + ff(x) * (i + 1)
        return x


class BackwardsZipped(Stack):
    def forward(self, x):
        for block, factor in reversed(list(zip(self.blocks, (1.0, 2.0, 3.0), strict=True))):
            x = x + block(x) * factor
        return x


class OnePass(Stack):
    def __init__(self):
        super().__init__(depth=1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class EverySecond(Stack):
    def forward(self, x):
        for block in self.blocks[::2]:
            x = x + block(x)
        for block in self.blocks[1::2]:
            x = torch.tanh(block(x))
        return x


class LocalList(Stack):
    def forward(self, x):
        blocks = self.blocks
        for block in blocks[1:]:
            x = x + block(x)
        return self.blocks[0](x)


class LocalNumbered(Stack):
    def forward(self, x):
        blocks, passes = list(self.blocks), 3
        layers = tuple(self.blocks)
        for i, block in enumerate(layers):
            x = x + block(x) * passes
            x = torch.tanh(blocks[i](x))
        return x


class LocalPairs(nn.Module):
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Branch(width), Branch(width)]) for _ in range(depth))

    def forward(self, x, factor=2.0):
        args = [({"factor": factor}, None)] * len(self.layers)
        pairs = list(zip(self.layers, args, strict=True))
        for (attn, ff), (options, _) in pairs:
            x = x + attn(x) * options["factor"]
            x = x + ff(x)
        return x


class Appended(Stack):
    def forward(self, x):
        blocks = list(self.blocks)
        blocks.reverse()
        for block in blocks:
            x = x + block(x)
        return x


class Rebound(Stack):
    def forward(self, x):
        blocks = self.blocks
        if x.dim() == 3:
            blocks = blocks[:2]
        for block in blocks:
            x = x + block(x)
        return x


class Counted(Stack):
    def forward(self, x):
        i = 0
        while i < len(self.blocks):
            x = x + self.blocks[i](x)
            i += 1
        return x


class AlphaTaken(Stack):
    def forward(self, x, alpha=0.5):
        for block in self.blocks:
            x = x + alpha * block(x)
        return x


class LayerDrop(Stack):
    def forward(self, x):
        for block in self.blocks:
            if self.training and torch.rand(()) < 0.3:
                continue
            x = x + block(x)
        return x


class ByName(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleDict({"attn": Branch(width), "ff": Branch(width)})

    def forward(self, x):
        for _name, block in self.blocks.items():
            x = x + block(x)
        return x


class ByKey(ByName):
    def forward(self, x):
        for name in self.blocks:
            x = x + self.blocks[name](x)
        return x


class LocalItems(ByName):
    def forward(self, x):
        items = self.blocks.items()
        for _name, block in items:
            x = x + block(x)
        return x


class Each(Stack):
    def forward(self, x):
        return torch.stack([x + block(x) for block in self.blocks]).mean(0)


class EachPart(Stack):
    def forward(self, x):
        parts = (x, 2 * x, -x)
        return torch.cat([part + block(part) for part, block in zip(parts, self.blocks, strict=True)], dim=1)


class Aggregated(Stack):
    def forward(self, x):
        return x + sum(block(x) for block in self.blocks)


class AggregatedList(Stack):
    def forward(self, x):
        return sum([block(x) for block in self.blocks]) + x


class Accumulated(Stack):
    def forward(self, x):
        out = x
        for block in self.blocks:
            out = out + block(x)
        return out


class AccumulatedFromZero(Stack):
    def forward(self, x):
        out = 0
        for block in self.blocks:
            out = out + block(x)
        return x + out


class AccumulatedFromFirst(Stack):
    def forward(self, x):
        out = self.blocks[0](x)
        for block in self.blocks[1:]:
            out = out + block(x)
        return x + out


class SummedFromSkip(Stack):
    def forward(self, x):
        return sum((block(x) for block in self.blocks), x)


class Reduced(Stack):
    def forward(self, x):
        return functools.reduce(lambda h, block: h + block(h), self.blocks, x)


class Two(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = Branch(width)
        self.b = Branch(width)
        self.g = nn.Parameter(torch.full((width,), 0.5))


class DictionaryOfModules(Two):
    def forward(self, x):
        parts = {"attn": self.a, "ff": self.b}
        for _name, part in parts.items():
            x = x + part(x)
        return x


class Comprehension(Two):
    def forward(self, x):
        first, second = [x + torch.relu(f(x)) for f in (self.a, self.b)]
        return first * second


class Display(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x):
        for block in [self.a, self.b]:
            x = x + torch.relu(block(x))
        return x


class NestedMixed(Nested):
    def forward(self, x):
        for i, stage in enumerate(self.stages):
            x = x * (i + 1)
            for block in stage:
                x = x + block(x)
        return x


class Helper(Two):
    def forward(self, x):
        x = dropout_add(self.a(x), x, 0.1, self.training)
        return dropout_add(self.b(x), residual=x, prob=0.1, training=self.training)


class ScaledHelper(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.scale = 0.5

    def forward(self, x):
        x = scaled_add(x, self.a(x), 1.0, self.scale)
        return scaled_add(x, branch=self.b(x), skip_scale=1, branch_scale=-2.0)


class DepthHelper(Two):
    def forward(self, x):
        x = depth_add(self.a(x), x, 1)
        return depth_add(self.b(x), x, depth=2)


class BalancedHelper(Two):
    def forward(self, x):
        return balanced_add(x, self.a(x), 0.5)


class SquaredHelper(Two):
    def forward(self, x):
        return squared_add(x, self.a(x))


class HelperScaledByInput(Two):
    def forward(self, x):
        gate = torch.sigmoid(self.b(x))
        return scaled_add(x, self.a(x), 1.0, gate)


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


class LerpNumber(Two):
    def forward(self, x):
        return x.lerp(self.a(x), weight=0.3)


class LerpParameter(Two):
    def forward(self, x):
        return torch.lerp(x, self.a(x), self.g)


class LerpInput(Two):
    def forward(self, x):
        return torch.lerp(x, self.a(x), torch.sigmoid(self.b(x)))


class LerpBackwards(Two):
    def forward(self, x):
        return torch.lerp(self.a(x), x, 0.3)


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


class Listed(Two):
    def forward(self, x):
        states = [x]
        states.append(states[-1] + self.a(states[-1]))
        states.append(states[-1] + self.b(states[-1]))
        return states[-1]


class ListedInLoop(Stack):
    def forward(self, x):
        states = [x]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        return states[-1]


class DictionaryOfStreams(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.nets = nn.ModuleDict({"p": Branch(width), "q": Branch(width)})

    def forward(self, x):
        state = {"p": x, "q": 2 * x}
        for key in state:
            state[key] = state[key] + self.nets[key](state[key])
        return state["p"] * state["q"]


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    extra: object = None


class Dataclass(Two):
    def inner(self, x):
        return Output(self.a(x))

    def forward(self, x):
        state = Output(x + self.inner(x).hidden)
        state = dataclasses.replace(state, hidden=state.hidden + self.b(state.hidden))
        return state.hidden


class Tuples(Two):
    def inner(self, x):
        return self.a(x), None

    def forward(self, x):
        y, _ = self.inner(x)
        return (x + y, y)[0]


class Lambda(Two):
    def forward(self, x):
        return (lambda h: h + self.a(h))(x)


class HeldLambda(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.run = lambda x: x + self.a(x)

    def forward(self, x):
        x = self.run(x)
        return x + self.b(x)


class Calling(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


class LambdaInModule(Two):
    def __init__(self, width=8):
        super().__init__(width)

        def run(x):
            return x + self.a(x)

        self.calling = Calling(run)

    def forward(self, x):
        x = self.calling(x)
        return x + torch.tanh(self.b(x))


class Joined(Two):
    """The function that adds is handed in, made by a function beside the class."""

    def __init__(self, width=8):
        super().__init__(width)
        self.joins = make_joins()

    def forward(self, x):
        first, second = self.joins
        return second(first(x, self.a(x)), self.b(x))


def make_joins():
    def join(x, y):
        return x + y

    return (lambda x, y: x + y), join


class Static(Two):
    @staticmethod
    def join(x, y):
        return x + y

    def forward(self, x):
        return self.join(x, self.a(x))


class Class(Two):
    @classmethod
    def join(cls, x, y):
        return x + y

    def forward(self, x):
        return self.join(x, self.a(x))


class ClassRuns(Two):
    @classmethod
    def run(cls, block, x):
        return x + block(x)

    def forward(self, x):
        return self.run(self.a, x)


@contextlib.contextmanager
def timed():
    yield


class Timed(Two):
    @timed()
    def forward(self, x):
        with timed():
            return x + self.a(x)


class Generator(Two):
    def states(self, x):
        for block in (self.a, self.b):
            x = x + block(x)
            yield x

    def forward(self, x):
        return list(self.states(x))[-1]


class ForTraining(Two):
    def forward(self, x):
        x = x + self.a(x)
        if self.training:
            x = x + self.b(x)
        return x


class ForEvaluation(Two):
    def forward(self, x):
        x = x + self.a(x)
        if not self.training:
            x = x + self.b(x)
        return x


class Scattered(Two):
    def forward(self, x):
        index = x[..., :1].topk(2, dim=1).indices.expand(-1, -1, x.shape[-1])
        return x.scatter_add(1, index, 0.5 * self.a(x.gather(1, index)))


class IndexAdded(Two):
    def forward(self, x):
        index = torch.tensor([0, 2])
        x = torch.index_add(x, 1, index, self.a(x.index_select(1, index)))
        out = x.clone()
        out.index_add_(1, index, self.b(x[:, index]), alpha=2)
        return out


class Put(Two):
    def forward(self, x):
        index = torch.tensor([0, 1])
        return x.index_put((index,), self.a(x[index]), accumulate=True)


class WrittenBack(Two):
    def forward(self, x):
        index = torch.tensor([0, 1])
        x = x.clone()
        x[index] = x[index] + self.a(x[index])
        return x


class WrittenBackSlice(Two):
    def forward(self, x):
        out = x.clone()
        out[:, 1:] += self.a(x[:, 1:])
        return out


class Experts(Stack):
    def forward(self, x):
        out = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            index = torch.tensor([i])
            out.index_add_(1, index, block(x[:, index]))
        return x + out


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

    def join(self, x, y):
        return x + y


class HeldJoin(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.holder = Holder(self.a)

    def forward(self, x):
        return self.holder.join(x, self.holder.module(x))


class Held(Two):
    def __init__(self, width=8):
        super().__init__(width)
        self.holder = Holder(self.a)

    def forward(self, x):
        return self.holder.run(x)


class HelperRuns(Two):
    def forward(self, x):
        return residual(self.a, x)
