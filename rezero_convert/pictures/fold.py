"""Runs of equal boxes drawn once: `x 12`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..listing import DIGITS, compact
from .records import Box, Fold

_LONGEST = 128
"""Boxes in a sequence that is looked for again behind it."""


def folded(boxes: Sequence[Box]) -> tuple[Box | Fold, ...]:
    """Equal sequences that follow each other as one, the widest run first, within them again.

    Boxes are equal if they differ in the numbers of their paths and names only, and in the values of gates.
    """
    known: dict[Box, int] = {}
    keys = [known.setdefault(_key(box), len(known)) for box in boxes]
    result: list[Box | Fold] = []
    at = 0
    while at < len(boxes):
        period, times = _run(keys, at)
        if times == 1:
            result.append(boxes[at])
            at += 1
            continue
        end = at + period * times
        unit = [_merged(boxes[at + offset : end : period]) for offset in range(period)]
        result.append(Fold(times, folded(unit) if period > 1 else tuple(unit)))
        at = end
    return tuple(result)


def _run(keys: list[int], at: int) -> tuple[int, int]:
    """Period and length of the run that covers most from a position on; of several, the one of the shortest period."""
    best = (1, 1)
    for period in range(1, min(_LONGEST, (len(keys) - at) // 2) + 1):
        unit, times = keys[at : at + period], 1
        while keys[at + times * period : at + (times + 1) * period] == unit:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _key(box: Box) -> Box:
    def blind(text: str) -> str:
        return DIGITS.sub("#", text)

    return replace(
        box,
        at=(),
        paths=(),
        sites=(),
        full="",
        text=blind(box.text),
        branches=tuple(
            replace(one, gate=blind(one.gate), values=(), steps=tuple(replace(step, full="") for step in one.steps))
            for one in box.branches
        ),
        shortcut=tuple(replace(step, label=blind(step.label), full="") for step in box.shortcut),
        notes=tuple(replace(note, text=blind(note.text), full="", sites=()) for note in box.notes),
    )


def _merged(same: Sequence[Box]) -> Box:
    """Equal boxes as the first, with the paths, adds and gate values of all."""
    first = same[0]
    branches = tuple(
        replace(
            one,
            gate=compact(box.branches[number].gate for box in same) if one.gate else "",
            values=tuple(value for box in same for value in box.branches[number].values),
        )
        for number, one in enumerate(first.branches)
    )
    shortcut = tuple(
        replace(step, label=compact(box.shortcut[number].label for box in same))
        for number, step in enumerate(first.shortcut)
    )
    notes = tuple(
        replace(note, sites=tuple(dict.fromkeys(site for box in same for site in box.notes[number].sites)))
        for number, note in enumerate(first.notes)
    )
    return replace(
        first,
        at=tuple(position for box in same for position in box.at),
        paths=tuple(dict.fromkeys(path for box in same for path in box.paths)),
        sites=tuple(dict.fromkeys(site for box in same for site in box.sites)),
        branches=branches,
        notes=notes,
        shortcut=shortcut,
    )
