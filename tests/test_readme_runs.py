"""The README's snippets that are marked to run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"<!-- runs -->\n```python\n(.*?)```", README.read_text(), re.S)


def test_there_are_some() -> None:
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_it_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPETS[number])
    exec(compile(SNIPPETS[number], str(file), "exec"), {"__name__": "snippet"})
