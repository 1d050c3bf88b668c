"""Deliberate faults in the package, each of which the test suite must catch.

`python -m tests.mutation` from the root of the repository makes them one at a time in a copy of the package, runs the
tests that are to catch it, and prints what caught it; the exit code is 1 if one survives. See `--help`.

- `capture`, `detect`, `rewrite`, `validation`, `verbs`, `instruments`: the faults, by what they are in.
- `fault`: what a fault is, and how one is made and tried.
"""

from __future__ import annotations

from . import capture, detect, instruments, rewrite, validation, verbs
from .fault import Fault

FAULTS: tuple[Fault, ...] = (
    *capture.FAULTS,
    *detect.FAULTS,
    *rewrite.FAULTS,
    *validation.FAULTS,
    *verbs.FAULTS,
    *instruments.FAULTS,
)
