"""The examples in the docstrings of the public names, run."""

from __future__ import annotations

import doctest
import inspect
import linecache
import subprocess
import sys
from pathlib import Path

import pytest

import rezero_convert as rz

README = Path(__file__).parent.parent / "README.md"
CLASSES = ("AlphaTracker", "ReZeroPass")
CALLED = [name for name in rz.__all__ if inspect.isfunction(getattr(rz, name)) or name in CLASSES]
ELSEWHERE = {"tensorboard": "tests/test_tracker.py", "from_pretrained": "tests/test_checkpoints.py"}
"""What needs another package, and where it is run."""


@pytest.mark.parametrize("name", [name for name in CALLED if name not in ELSEWHERE])
def test_the_example_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(rz, name), name)
    examples = [example for one in found for example in one.examples]
    assert examples, f"{name} shows no example"
    monkeypatch.setattr(linecache, "getlines", linecache.getlines)  # doctest puts its own there
    results = [doctest.DocTestRunner().run(one) for one in found]
    assert sum(result.attempted for result in results) == len(examples)
    assert sum(result.failed for result in results) == 0


def test_the_pages_hold_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "-d", "google", "-o", str(tmp_path), "rezero_convert"]
    assert " ".join(command[2:5]) in README.read_text()
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "rezero_convert.html").read_text()
    assert [name for name in rz.__all__ if f'id="{name}"' not in page] == []


def test_every_public_name_says_what_it_is() -> None:
    assert [name for name in rz.__all__ if not (inspect.getdoc(getattr(rz, name)) or "").strip()] == []
