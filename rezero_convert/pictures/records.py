"""What a drawing shows, without any geometry: streams, the boxes on them, and what is told of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Step:
    """An operation of a branch, shortcut or stream."""

    label: str
    full: str
    """Whole path and type."""
    dropped: bool = False
    """A norm that the conversion drops."""


@dataclass(frozen=True, slots=True)
class Note:
    """An add that has no box of its own."""

    verdict: str
    text: str
    full: str
    sites: tuple[int, ...] = ()
    """As of a box."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch."""

    steps: tuple[Step, ...]
    gate: str = ""
    """Its gate's name; "" if it gets none."""
    values: tuple[float, ...] = ()
    """The gate's start value, or what it is today; of all boxes that are folded into one."""
    reads: tuple[int, ...] = ()
    """Other streams that it takes values from."""


@dataclass(frozen=True, slots=True)
class Box:
    """Something on the stream. plain: operations on the way. block: a skip and branches. merge: another add, or a
    concatenation, that takes a value from elsewhere."""

    kind: Literal["plain", "block", "merge"]
    at: tuple[int, ...]
    """Position on the stream; of all boxes that are folded into one."""
    verdict: str = ""
    paths: tuple[str, ...] = ()
    cls: str = ""
    branches: tuple[Branch, ...] = ()
    shortcut: tuple[Step, ...] = ()
    """A projection or slice on the skip; of a plain box, its operations."""
    sites: tuple[int, ...] = ()
    """Its adds, as positions in the plan."""
    notes: tuple[Note, ...] = ()
    """Adds inside its branches."""
    text: str = ""
    """Code and reason, where it is not converted."""
    full: str = ""
    start: int | None = None
    """How many positions further up the other value of a merge is taken."""
    shape: tuple[int, ...] | None = None
    """Of its result."""


@dataclass(frozen=True, slots=True)
class Fold:
    """A run of equal sequences, drawn once."""

    times: int
    members: tuple[Box | Fold, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """A residual stream, from top to bottom."""

    name: str
    begin: str
    """The inputs that it starts from, or the stream that it is split off from."""
    members: tuple[Box | Fold, ...]
    ends: bool
    """Whether an output of the model is computed from its end."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing."""

    title: str
    counts: str
    streams: tuple[Stream, ...]
    beside: tuple[Note, ...] = ()
    """Adds that lie on no stream."""


def boxes(members: tuple[Box | Fold, ...]) -> tuple[Box, ...]:
    """All boxes, those of folds included, in order."""
    return tuple(box for one in members for box in (boxes(one.members) if isinstance(one, Fold) else (one,)))
