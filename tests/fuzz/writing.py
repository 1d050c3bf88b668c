"""What the generator writes with: classes as text, and for every add the verdict that it must get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

_MARK = "  #@"

# Names must not decide anything, so they mislead on purpose. Some are taken by what conversion would like to use.
_ATTRIBUTES = "fc conv proj norm skip mask pos alpha gamma res attn layer mixer gate embed scale_ block head".split()
_LOCALS = "h y out residual identity shortcut hidden pos mask bias gate z".split()


@dataclass(frozen=True, slots=True)
class Add:
    """An add of a generated model: the line that it is on, and what it is."""

    cls: str
    verdict: str
    """converted, gated, long-skip, interior, refused, or not-executed: in an arm that the run does not take."""
    gates: int = 0
    """New or reused gates of one instance of the class, shared modules counted once."""
    codes: tuple[str, ...] = ()
    """The codes that a refusal may have; empty for any."""
    text: str = ""
    """The verdict without a run, where it is another."""
    why: str = ""
    """What the add is, for the message of a failure."""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A generated file, whose class `Net` takes no arguments, and what is true of it."""

    text: str
    adds: tuple[Add, ...]
    shape: tuple[int, ...]
    traceable: bool
    dropped: tuple[tuple[str, str], ...] = ()
    """Norms that go, (class, attribute)."""
    kept: tuple[tuple[str, str], ...] = ()
    """Norms that stay."""


@dataclass(frozen=True, slots=True)
class Part:
    """A class that was written: how it is made and called. It keeps the shape, but for the width."""

    cls: str
    make: str
    """`Block3(8)`."""
    width: int
    """Of its output."""
    call: str = "{m}({x})"
    opens: bool = False
    """Begins with a converted block whose skip is its own input."""

    @property
    def plain(self) -> bool:
        """Whether it can stand in an `nn.Sequential`."""
        return self.call == "{m}({x})"


@dataclass(slots=True)
class Class:
    """A module class in the making: its `forward` takes `x`."""

    name: str
    random: Random
    arguments: str = "width"
    base: str = "nn.Module"
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    methods: list[list[str]] = field(default_factory=list)
    signature: str = "x"
    used: set[str] = field(default_factory=lambda: {"x", "width"})

    def attribute(self) -> str:
        """A new attribute's name."""
        return self._fresh(_ATTRIBUTES)

    def local(self) -> str:
        """A new local variable's name."""
        return self._fresh(_LOCALS)

    def _fresh(self, pool: Sequence[str]) -> str:
        name = self.random.choice(pool)
        number = 1
        while name in self.used:
            number += 1
            name = f"{name.rstrip('0123456789')}{number}"
        self.used.add(name)
        return name

    def module(self, make: str) -> str:
        """A new child, as it is read in methods: `self.fc`."""
        name = self.attribute()
        self.init.append(f"self.{name} = {make}")
        return f"self.{name}"

    def lines(self) -> list[str]:
        """The class's text."""
        init = [f"    def __init__(self{', ' + self.arguments if self.arguments else ''}):", "super().__init__()"]
        methods = [[init[0], *(f"        {line}" for line in (init[1], *self.init))]]
        methods += [[f"    {line}" for line in method] for method in self.methods]
        if self.body:
            methods.append([f"    def forward(self, {self.signature}):", *(f"        {line}" for line in self.body)])
        text = [f"class {self.name}({self.base}):"]
        for method in methods:
            text += [*method, ""]
        return [*text, ""]


@dataclass(slots=True)
class Writer:
    """A file in the making."""

    random: Random
    image: bool
    """Images through convolutions, else rows of features through linear layers."""
    top: list[str] = field(default_factory=list)
    adds: list[Add] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0
    traceable: bool = True
    helpers: set[str] = field(default_factory=set)

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def begin(self, stem: str, **options: str) -> Class:
        """A new class."""
        self.count += 1
        return Class(stem if stem == "Net" else f"{stem}{self.count}", self.random, **options)  # type: ignore[arg-type]  # text options only

    def end(self, cls: Class) -> str:
        """Write a class; returns its name."""
        self.top += cls.lines()
        return cls.name

    def once(self, lines: str) -> None:
        """Write a helper before the class in the making, if it is not there yet."""
        if lines not in self.helpers:
            self.helpers.add(lines)
            self.top += [*lines.strip("\n").split("\n"), "", ""]

    def mark(
        self,
        cls: Class | str,
        verdict: str,
        gates: int = 0,
        *codes: str,
        text: str = "",
        why: str = "",
    ) -> str:
        """The mark of an add's line, to be put at its end."""
        name = cls if isinstance(cls, str) else cls.name
        self.adds.append(Add(name, verdict, gates, codes, text, why))
        return f"{_MARK}{len(self.adds) - 1}"

    # The layers of the two kinds of models

    def linear(self, inputs: str = "width", outputs: str = "width", *, bias: bool = True) -> str:
        """A linear layer that keeps the shape but for the width."""
        end = "" if bias else ", bias=False"
        if not self.image:
            return f"nn.Linear({inputs}, {outputs}{end})"
        kernel = self.random.choice(("1", "3, padding=1", "(3, 1), padding=(1, 0)"))
        return f"nn.Conv2d({inputs}, {outputs}, {kernel}{end})"

    def norm(self, *, inside: bool = True) -> tuple[str, bool]:
        """A norm of `width`, and whether it is one that goes by default.

        Args:
            inside: in a residual branch. Elsewhere it is none whose call is in a class of its own: in files such a
                class keeps its norm for all who use it (README, Limits).
        """
        if self.image:
            kind = self.random.choice(("batch", "group", "own") if inside else ("batch", "group"))
            if kind == "own":
                self.once(_CHANNEL_NORM)
            return {
                "batch": ("nn.BatchNorm2d(width)", False),
                "group": ("nn.GroupNorm(2, width)", False),
                "own": ("ChannelNorm(width)", True),
            }[kind]
        kind = self.random.choice(("nn.LayerNorm", "nn.RMSNorm", "Scaled"))
        if kind == "Scaled":
            self.once(_SCALED)
        return f"{kind}(width)", True

    def case(self) -> Case:
        """The file as it is."""
        text, adds = [], list(self.adds)
        for number, line in enumerate([*_IMPORTS, *self.top], 1):
            plain, _, mark = line.partition(_MARK)
            if mark:
                adds[int(mark)] = replace(adds[int(mark)], line=number)
            text.append(plain)
        assert all(add.line for add in adds), "an add was announced and not written"
        shape = (2, 4, 5, 5) if self.image else (2, 3, 4)
        return Case(
            "\n".join(text).rstrip("\n") + "\n", tuple(adds), shape, self.traceable,
            tuple(self.dropped), tuple(self.kept),
        )  # fmt: skip


_IMPORTS = """\
import functools
import math
import operator

import torch
from torch import nn
from torch.nn import functional as F


""".split("\n")[:-1]

_SCALED = """
class Scaled(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
"""

_CHANNEL_NORM = """
class ChannelNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
"""
