"""Many files: globs, processes, a project's settings, comments that leave blocks alone, the second look at a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rezero_convert as rz
from rezero_convert import cli, file_plan
from rezero_convert.plan import Options

BLOCK = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.fc(x))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.py", "sub/c.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(BLOCK)
    Path("script.py").write_text("print('no module')\n")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["*.txt"], "*.txt: no .py file matches"),
        (["a.py", "--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["a.py", "--diff", "--json"], "--diff and --json both go to standard output"),
        (["a.py", "--diff", "-o", "-"], "--diff and -o - both go to standard output"),
    ],
)
def test_refused(arguments: list[str], what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert what in said(capsys)
    assert Path("a.py").read_text() == BLOCK


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[tool.rezero-convert]\ndrop-norms = 'none'\n", "did you mean 'drop_norm'?"),
        ("[tool.rezero-convert]\ndrop-norm = 'layr'\n", "did you mean 'layer'?"),
        ("[tool]\nrezero-convert = 3\n", "[tool.rezero-convert] must be a table"),
        ("[tool.rezero-convert\n", "pyproject.toml: cannot be read"),
    ],
)
def test_settings_that_are_refused(text: str, what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pyproject.toml").write_text(text)
    assert cli.main(["a.py", "--write"]) == 2
    assert what in said(capsys)
    assert Path("a.py").read_text() == BLOCK


def test_settings_of_the_nearest_project_hold_unless_the_command_says_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pyproject.toml").write_text("[tool.rezero-convert]\nalpha-init = 0.5\nexclude = ['Other.*']\n")
    monkeypatch.chdir(folder / "sub")
    assert cli.main(["c.py", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["alpha_init"], options["exclude"]) == (0.5, ["Other.*"])
    assert cli.main(["c.py", "--json", "--alpha-init", "0.25"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["alpha_init"] == 0.25


def test_a_glob_finds_files_and_each_is_taken_once(folder: Path) -> None:
    assert cli.main(["**/*.py", "a.py", "--write", "--quiet"]) == 0
    assert all("self.alpha * torch.relu" in Path(name).read_text() for name in ("a.py", "b.py", "sub/c.py"))
    assert Path("script.py").read_text() == "print('no module')\n"


def test_among_several_files_one_without_a_module_is_passed_over(folder: Path) -> None:
    assert cli.main(["script.py", "a.py", "--check", "--quiet"]) == 1
    assert cli.main(["script.py", "--check", "--quiet"]) == 0  # as a commit hook calls it


def test_the_diff_on_request_with_check_and_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["a.py", "--check", "--diff"]) == 1
    first = capsys.readouterr().out
    assert first.startswith("--- a/a.py")
    assert cli.main(["a.py", "--write", "--diff"]) == 0
    assert capsys.readouterr().out == first
    assert "self.alpha" in Path("a.py").read_text()


def test_processes_give_what_one_gives_and_go_on_after_a_bad_file(folder: Path) -> None:
    Path("bad.py").write_text("class A(:\n")
    command = [sys.executable, "-m", "rezero_convert", ".", "--json"]
    runs = [
        subprocess.run([*command, "--jobs", jobs], capture_output=True, text=True, check=False) for jobs in ("1", "2")
    ]
    assert [run.returncode for run in runs] == [2, 2]
    assert runs[0].stdout == runs[1].stdout
    assert len(json.loads(runs[0].stdout)["reports"]) == 3
    assert all("bad.py:1: syntax error" in run.stderr for run in runs)


# --- left alone on request ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu(self.fc(x))", "torch.relu(self.fc(x))  # rezero: skip"),
        ("def forward(self, x):", "def forward(self, x):  # rezero:skip, by hand"),
        ("class Block(nn.Module):", "class Block(nn.Module):  # rezero: skip"),
    ],
)
def test_a_comment_leaves_a_line_a_method_or_a_class_alone(old: str, new: str) -> None:
    text = BLOCK.replace(old, new)
    result = rz.convert_source(text)
    assert result.text == text
    (site,) = result.report.plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ900")
    assert "comment" in site.reason


def test_a_string_or_another_comment_does_not() -> None:
    text = BLOCK.replace("        return", "        s = '# rezero: skip'  # not rezero: skip\n        return")
    assert rz.convert_source(text).report.plan.converted


# --- the second look ---


def test_a_text_that_does_not_compile_is_not_handed_out() -> None:
    with pytest.raises(rz.ConversionError, match="does not compile: line 2"):
        file_plan.recheck(BLOCK, "import torch\ndef f(:\n", "net.py", Options(), again=True)


def test_a_text_that_a_second_run_would_change_is_not_handed_out() -> None:
    with pytest.raises(rz.ConversionError, match=r"net\.py: a second run would change .* at its line 9"):
        file_plan.recheck(BLOCK, BLOCK, "net.py", Options(), again=True)
    file_plan.recheck(BLOCK, rz.convert_source(BLOCK, file="net.py").text, "net.py", Options(), again=True)
