"""Small tasks that need no download: deep nets on scikit-learn's digits, character Transformers on Python's own text.

Each model comes with its relatives that are placements of norms, not scales of branches, so that no `method=` writes
them. `race.py`, `reproduce.py` and `grow.py` train them.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz

Batch = tuple[Tensor, Tensor]
ROOT_HALF, ROOT_2 = 0.25**0.5, 2.0**0.5


@dataclass(frozen=True)
class Task:
    """What `rz.race` is given, by the names of its arguments."""

    make_model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    methods: dict[str, Any]
    lrs: tuple[float, ...]
    """The one that tables are made at comes first."""
    thresholds: tuple[float, ...]
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)


# Fully connected nets


class Dense(nn.Module):
    """x + relu(W N(x)); the variance of W is gain^2 / width (Xavier, as the authors' notebook)."""

    def __init__(self, width: int, norm: bool, gain: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.linear = nn.Linear(width, width)
        nn.init.xavier_normal_(self.linear.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(self.norm(x)))


class Vanilla(Dense):
    """relu(W x), no skip."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class PostDense(Dense):
    """N(relu(W x)): the "LayerNorm" net of the authors' notebook, which has no skip."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(x)))


def dense(
    depth: int, kind: type[Dense] = Dense, *, norm: bool = True, gain: float = ROOT_2, width: int = 128
) -> nn.Module:
    first = nn.Linear(64, width)
    nn.init.kaiming_normal_(first.weight)
    blocks = nn.Sequential(*(kind(width, norm, gain) for _ in range(depth)))
    return nn.Sequential(first, nn.ReLU(), blocks, nn.Linear(width, 10))


@cache
def digits() -> tuple[Batch, Batch]:
    """1437 pictures of 64 pixels (mean 0, deviation 1 over all) with their digits to train on, and 360 to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    pixels = (pixels - pixels.mean()) / pixels.std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    return (pixels[:1437], labels[:1437]), (pixels[1437:], labels[1437:])


def digit_batches(seed: int, size: int, *, picture: bool = False) -> Iterator[Batch]:
    (pixels, labels), _ = digits()
    pixels = pixels.view(-1, 1, 8, 8) if picture else pixels
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(order) - size + 1, size):
            yield pixels[order[at : at + size]], labels[order[at : at + size]]


def accuracy(model: nn.Module, *, picture: bool = False) -> float:
    """On the pictures that training does not see."""
    _, (pixels, labels) = digits()
    scores = model(pixels.view(-1, 1, 8, 8) if picture else pixels)
    return round((scores.argmax(1) == labels).float().mean().item(), 4)


def adagrad(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=lr)


def dense_task(depth: int) -> Task:
    """Adagrad with one rate for all, as the authors' notebook; no weight decay."""
    return Task(
        partial(dense, depth),
        partial(digit_batches, size=100),
        {
            "vanilla": partial(dense, depth, Vanilla, norm=False),
            "residual, var 0.25/w": partial(dense, depth, norm=False, gain=ROOT_HALF),
            "post-norm": partial(dense, depth, PostDense),
            "pre-norm": None,
            "ReZero": {"method": "rezero"},
            "ReZero, norm kept": {"method": "rezero", "drop_norm": "none"},
        },
        (0.01, 0.003, 0.03),
        (1.0, 0.3, 0.1),
        200,
        {"optimizer": adagrad, "metric": accuracy},
    )


# Character Transformers


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PreLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostLayer(PreLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class InOutLayer(PreLayer):
    """Norms before and behind each branch, which the paper calls GPT2-norm as far as is known."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.out1, self.out2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out1(self.attention(self.norm1(x)))
        return x + self.out2(self.mlp(self.norm2(x)))


class CharTransformer(nn.Module):
    def __init__(self, depth: int, layer: type[PreLayer] = PreLayer, final: bool = False) -> None:
        super().__init__()
        width, heads, length = 64, 2, 64
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if final else nn.Identity()
        self.head = nn.Linear(width, 256)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name.startswith("layers"):
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        nn.init.normal_(self.positions.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@cache
def text() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's modules, 0 to 255; every tenth piece of 4096 is for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    written = bytearray(b"".join(file.read_bytes() for file in files))
    pieces = torch.frombuffer(written, dtype=torch.uint8).long().unfold(0, 4096, 4096)
    held = torch.arange(len(pieces)) % 10 == 0
    return pieces[~held].flatten(), pieces[held].flatten()


def text_batches(seed: int, size: int = 16, length: int = 64) -> Iterator[Batch]:
    train, _ = text()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(train) - length, (size, 1), generator=generator)
        rows = train[starts + torch.arange(length + 1)]
        yield rows[:, :-1], rows[:, 1:]


def char_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def bits_per_character(model: nn.Module) -> float:
    """On 48 pieces of 64 characters that training does not see."""
    _, held = text()
    rows = held[torch.linspace(0, len(held) - 65, 48).long()[:, None] + torch.arange(65)]
    return char_loss(model(rows[:, :-1]), rows[:, 1:]).item() / math.log(2)


def char_task(depth: int) -> Task:
    """Adam with one rate for all, no warm-up. Pre-norm has a final norm; ReZero has none, as the authors'."""
    bare = partial(CharTransformer, depth)
    return Task(
        bare,
        text_batches,
        {
            "post-norm": partial(bare, PostLayer),
            "pre-norm": partial(bare, final=True),
            "GPT2-norm (in and out)": partial(bare, InOutLayer, final=True),
            "no norm, no gate": {"method": "frozen", "alpha_init": 1.0},
            "alpha = 1": {"method": "rezero-one"},
            "ReZero": {"method": "rezero"},
            "ReZero, norm kept": partial(_converted_with_norms, depth),
        },
        (3e-3, 1e-3, 1e-2),
        (4.5, 4.0, 3.5),
        250,
        {"loss": char_loss, "evaluate": bits_per_character, "every": 5, "clip": 1.0},
    )


def _converted_with_norms(depth: int) -> nn.Module:
    ids = torch.zeros(1, 4, dtype=torch.long)
    return rz.convert(CharTransformer(depth, final=True), ids, inplace=True, verify=False, drop_norm="none")


# A ResNet of 6n + 2 layers


class Shortcut(nn.Module):
    """Every other pixel, and zeros for the channels that are new."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 if inputs == outputs else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else Shortcut()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet(depth: int = 56) -> nn.Module:
    """16, 32 and 64 channels, as the authors' notebook, for pictures of 8 by 8."""
    widths = [16] + [width for width in (16, 32, 64) for _ in range((depth - 2) // 6)]
    blocks = [Basic(inputs, outputs) for inputs, outputs in pairwise(widths)]
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def resnet_task(depth: int = 56) -> Task:
    """SGD as the authors' code, with the decay on all parameters."""
    return Task(
        partial(resnet, depth),
        partial(digit_batches, size=128, picture=True),
        {
            "vanilla": None,
            "gated": {"method": "gated"},
            "gated, authors'": {"method": "gated-authors"},
            "zero-gamma": {"method": "zero-gamma"},
            "FixUp": {"method": "fixup"},
            "SkipInit": {"method": "skipinit"},
            "RescaleNet": {"method": "rescalenet"},
            "ReZero": {"method": "rezero"},
        },
        (0.1, 0.02),
        (1.0, 0.5, 0.3),
        96,
        {"optimizer": sgd, "metric": partial(accuracy, picture=True)},
    )


TASKS: dict[str, Callable[[], Task]] = {
    "fc32": partial(dense_task, 32),
    "fc64": partial(dense_task, 64),
    "fc128": partial(dense_task, 128),
    "char12": partial(char_task, 12),
    "char48": partial(char_task, 48),
    "resnet56": partial(resnet_task, 56),
}
