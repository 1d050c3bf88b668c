"""Interleaved timing by process CPU time, and tables of ratios: what the benchmarks share."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

Times = dict[str, list[float]]


def interleaved(actions: Mapping[str, Callable[[], Any]], rounds: int, limit: float) -> tuple[Times, dict[str, str]]:
    """Seconds of process CPU time of each action in each round, and why an action has none.

    The actions take turns, so that what else the machine does falls on all alike. A first round only warms up, and is
    what counts for an action that took longer than `limit` seconds in it.
    """
    times: Times = {}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            if name in failed or (turn and times[name][0] > limit):
                continue
            gc.collect()  # what others left behind
            start = time.process_time()
            try:
                action()
            except Exception as error:  # whatever the tool that is measured raises
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                continue
            times.setdefault(name, []).append(time.process_time() - start)
    return {name: values[1:] or values for name, values in times.items()}, failed


def ratio(times: Times, name: str, base: str) -> tuple[float, float, float] | None:
    """Median, smallest and largest ratio of two actions, round by round; None if one of them did not run."""
    if name not in times or base not in times:
        return None
    count = min(len(times[name]), len(times[base]))
    ratios = [one / other for one, other in zip(times[name][-count:], times[base][-count:], strict=True)]
    return median(ratios), min(ratios), max(ratios)


def shown(found: tuple[float, float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write(path: str, results: Any) -> None:
    """The results as JSON, with the versions and the machine."""
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
               "machine": platform.machine(), "clock": "process CPU time, seconds"}  # fmt: skip
    Path(path).write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
