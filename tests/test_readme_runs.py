"""The README's snippets that are marked to run."""

from __future__ import annotations

import re
import subprocess
import sys
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


def test_links_within_the_readme_lead_somewhere() -> None:
    text = README.read_text()
    heads = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}
    inner = re.findall(r"\]\(#([\w-]+)\)", text)
    assert len(inner) > 5
    assert [name for name in inner if name not in heads] == []
    files = re.findall(r"\]\((?!#|https?:)([^)]+)\)", text)
    assert [name for name in files if not (README.parent / name).is_file()] == []


def test_the_picture_is_what_the_tool_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "gpt.svg"
    exact = ["--model", "make_model()", "--inputs", "example_inputs()"]
    command = [sys.executable, "-m", "rezero_convert", "examples/gpt.py", *exact, "--svg", str(drawn), "-q"]
    subprocess.run(command, cwd=README.parent, check=True, capture_output=True)
    assert drawn.read_text() == (README.parent / "examples" / "results" / "gpt.svg").read_text()
