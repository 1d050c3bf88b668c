"""How places are shown: module paths with their numbers folded, files as short as they stay clear, counts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from .plan import Span

DIGITS = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")
"""Numbers that stand by themselves in a path or sentence."""
_INVALID = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def plain(shown: Any, width: int = 110) -> str:
    """What rich would print, as text without colours."""
    from rich.console import Console

    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip()


def compact(paths: Iterable[str], limit: int = 12) -> str:
    """Module paths with their numbers folded: `blocks.{0..11}`, `layer1.{0,1}, layer2.0`."""
    patterns = [_tokens(path) for path in dict.fromkeys(paths)]
    for position in reversed(range(max((len(pattern) for pattern in patterns), default=0))):
        patterns = _folded(patterns, position)
    shown = ["".join(_set(token) if isinstance(token, frozenset) else token for token in one) for one in patterns]
    more = f", and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(one or "(the model)" for one in shown[:limit]) + more


def where_of(span: Span | None) -> str:
    """`file:line:col`, the file relative to the working directory or to the place it is imported from."""
    if span is None:
        return "(no source)"
    return f"{short(span.file)}{str(span).removeprefix(span.file)}"


def shortened(text: str) -> str:
    """A sentence with the files of its places, `/home/me/net.py:3:4`, as short as in `where_of`."""
    return _FILE.sub(lambda found: short(found[0]), text)


_FILE = re.compile(r"(?<![\w.])/[^\s:]+\.py(?=:\d)")


def short(file: str, limit: int = 60) -> str:
    """A file's name as short as it stays clear; of a very long one the end."""
    file = file.partition(" ")[0] if file.startswith("<eval_with_key>") else _relative(file)
    if len(file) <= limit:
        return file
    parts = file.split(os.sep)
    while len(parts) > 1 and len(os.sep.join(parts)) > limit - 4:
        del parts[0]
    return os.sep.join(["...", *parts])


def _relative(file: str) -> str:
    if not os.path.isabs(file):
        return file
    installed = f"{os.sep}site-packages{os.sep}"  # may lie below the working directory, in a virtual environment
    roots = sys.path if installed in file else [os.getcwd(), *sys.path]
    for root in roots:
        prefix = root.rstrip(os.sep) + os.sep
        if prefix != os.sep and file.startswith(prefix) and installed not in f"{os.sep}{file.removeprefix(prefix)}":
            return file.removeprefix(prefix)
    return file


def clean(text: str) -> str:
    """Text without what XML and HTML cannot hold."""
    return _INVALID.sub("\N{REPLACEMENT CHARACTER}", text)


def visible(text: str) -> str:
    """Text without what a terminal obeys instead of showing it: control characters, marks of direction, escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _tokens(path: str) -> tuple[str | frozenset[int], ...]:
    return tuple(frozenset((int(part),)) if index % 2 else part for index, part in enumerate(DIGITS.split(path)))


def _folded(patterns: list[tuple[str | frozenset[int], ...]], position: int) -> list[tuple[str | frozenset[int], ...]]:
    """Patterns that differ in the numbers at one position as one, in the place of the first."""
    merged: dict[object, tuple[str | frozenset[int], ...]] = {}
    for pattern in patterns:
        here = pattern[position] if position < len(pattern) else ""
        if not isinstance(here, frozenset):
            merged[pattern] = pattern
            continue
        rest = (pattern[:position], pattern[position + 1 :])
        there = merged[rest][position] if rest in merged else frozenset()
        assert isinstance(there, frozenset)
        merged[rest] = (*pattern[:position], here | there, *pattern[position + 1 :])
    return list(merged.values())


def _set(numbers: frozenset[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(runs[0][0])
    parts = [f"{low}..{high}" if high > low + 1 else ",".join(map(str, range(low, high + 1))) for low, high in runs]
    return "{" + ",".join(parts) + "}"
