"""Files of strangers: read and never run, written only where said, and shown without obeying what is in them."""

from __future__ import annotations

import ast
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

import rezero_convert as rz
from rezero_convert import cli, files
from rezero_convert.errors import ConversionError

PACKAGE = Path(rz.__file__).parent
NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(x)
"""
GATED = "x + self.alpha * self.fc(x)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rezero-convert: error: ")
    return line


# Nothing that is read is run

_RUNS = {
    ("targets.py", "eval"): "--model, --inputs and package.module:EXPRESSION, which the user typed",
    ("targets.py", "compile"): "the same, for a name on its traceback",
    ("targets.py", "import_module"): "the file of --model, and what a target names",
    ("__init__.py", "import_module"): "the package's own modules",
    ("file_plan.py", "compile"): "whether a rewritten text is Python; the code object is dropped",
    ("rewrite/recompile.py", "compile"): "methods of a live model, whose file has been imported; its body is not run",
    ("capture/stand_ins.py", "compile"): "what torch.fx wrote of a live model's forward",
    ("fresh.py", "run"): "--model once more, in a fresh process",
}


def test_every_way_to_run_text_is_justified() -> None:
    names = {"eval", "exec", "compile", "__import__", "import_module", "exec_module", "run_path", "run_module"}
    names |= {"system", "popen", "Popen", "run", "check_output", "check_call", "load_module", "unsafe_load", "loads"}
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            plain = isinstance(node.func, ast.Name) and node.func.id in names - {"run"}
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            dotted = owner in ("importlib", "os", "subprocess", "runpy", "pickle", "marshal", "builtins", "torch")
            if plain or (dotted and isinstance(node.func, ast.Attribute) and node.func.attr in {*names, "load"}):
                name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func).rpartition(".")[2]
                found.add((file.relative_to(PACKAGE).as_posix(), name))
    assert found == set(_RUNS)


def test_nothing_of_a_file_or_its_neighbours_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = 'open("trace", "a").write(__name__)'
    (folder / "base.py").write_text(
        f"from torch import nn\n{trace}\nclass Base(nn.Module):\n    def __init_subclass__(cls):\n        {trace}\n"
        f"    {trace}\ndef decorate(x):\n    {trace}\n    return x\n"
    )
    for name in ("torch.py", "yaml.py", "sitecustomize.py", "conftest.py", "setup.py", "__init__.py"):
        (folder / name).write_text(f"{trace}\n")
    (folder / "net.py").write_text(
        f"# {trace}\n# line 1 'base.py'\nfrom base import Base, decorate\n{trace}\n"
        + NET.replace("class Net(nn.Module)", f"@decorate\nclass Net(Base, metaclass=({trace}, type)[1])")
        .replace("width=4", f"width={trace}")
        .replace("    def forward", f"    {trace}\n    @({trace}, decorate)[1]\n    def forward")
    )
    for arguments in (
        ["net.py"],
        ["audit", "net.py"],
        ["net.py", "--svg", "n.svg", "--html", "n.html"],
        [".", "--check"],
    ):
        assert cli.main(arguments) in (0, 1)
    assert "self.alpha" in capsys.readouterr().out
    assert not (folder / "trace").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('model = \'__import__("os").mkdir("trace")\'', "unknown option 'model'"),
        ("output = 'trace'", "unknown option 'output'"),
        ("write = true", "unknown option 'write'"),
        ("html = 'trace'", "unknown option 'html'"),
        ('alpha_init = \'__import__("os").mkdir("trace")\'', "a finite number or 'preserve'"),
        ("include = " + "[" * 5000 + "]" * 5000, "cannot be read"),
    ],
)
def test_a_hostile_project_file(section: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "net.py").write_text(NET)
    (folder / "pyproject.toml").write_text(f"[tool.rezero-convert]\n{section}\n")
    assert cli.main(["net.py"]) == 2
    assert said in error(capsys)
    assert not (folder / "trace").exists()
    assert (folder / "net.py").read_text() == NET


# Texts that are too much, or are not what they seem


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (NET.encode() + b"\0", "null bytes"),
        (NET.encode("utf-16"), "net.py:1: not UTF-8"),
        (b"# coding: utf-7\n" + NET.encode() + b"# +AAo-import os\n", "declared to be utf-7, not UTF-8"),
        (b"# coding: nonsense\n" + NET.encode(), "unknown encoding"),
        (NET.replace("x + self", "x + " + "(" * 500 + "self").encode(), "syntax error: too many nested parentheses"),
        (NET.encode() + b"if 1: pass\n" + b"elif 2: pass\n" * 1500, "nested too deeply"),
    ],
    ids="null utf-16 utf-7 nonsense parentheses elif".split(),
)
def test_one_error(data: bytes, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "net.py").write_bytes(data)
    assert cli.main(["net.py", "--write"]) == 2
    assert said in error(capsys)
    assert (folder / "net.py").read_bytes() == data
    assert os.listdir(folder) == ["net.py"]


def test_deep_expressions_that_python_compiles_are_fine(folder: Path) -> None:
    deep = "y = " + "lambda: " * 1500 + "1\n"
    (folder / "net.py").write_text(NET + deep)
    assert cli.main(["net.py", "--write", "-q"]) == 0
    text = (folder / "net.py").read_text()
    compile(text, "net.py", "exec")
    assert text.endswith(deep)
    assert "self.alpha *" in text


def test_ascii_under_another_name_is_fine(folder: Path) -> None:
    (folder / "net.py").write_text("# coding: latin-1\n" + NET)
    assert cli.main(["net.py", "--write", "-q"]) == 0
    assert GATED in (folder / "net.py").read_text()


def test_constants_are_not_computed(folder: Path) -> None:
    (folder / "net.py").write_text(NET.replace("width=4", "width=9**9**9").replace("fc(x)", "fc(x) * 9**9**9"))
    assert cli.main(["net.py", "--check", "-q"]) == 1


# Written only where said


def test_links_out_of_a_folder_are_not_followed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "outside.py").write_text(NET)
    (folder / "src").mkdir()
    (folder / "src" / "link.py").symlink_to(folder / "outside.py")
    (folder / "src" / "own.py").write_text(NET)
    (folder / "src" / "near.py").symlink_to(folder / "src" / "own.py")
    (folder / "src" / ".#lock.py").symlink_to("nobody@nowhere")
    os.mkfifo(folder / "src" / "pipe.py")
    assert cli.main(["src", "--write", "-q"]) == 2
    assert "src/link.py: a link to" in error(capsys)
    assert (folder / "outside.py").read_text() == NET
    assert GATED in (folder / "src" / "own.py").read_text()
    assert (folder / "src" / "near.py").is_symlink()
    assert cli.main(["src/link.py", "--write", "-q"]) == 0
    assert GATED in (folder / "outside.py").read_text()


def test_hard_links_keep_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    files.replace(tmp_path / "one", b"new")
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["new", "old"]


def test_write_protection_mode_and_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one"
    file.write_text("old")
    file.chmod(0o444)
    with pytest.raises(ConversionError, match="one: cannot be written: it is write-protected"):
        files.replace(file, b"new")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12346)
    before = file.stat()
    files.replace(file, b"new")
    after = file.stat()
    assert file.read_text() == "new"
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (before.st_uid, before.st_gid, 0o640)


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    (tmp_path / "one").write_text("old")
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(ConversionError, match="one: cannot be written: Read-only file system"):
        files.replace(tmp_path / "one", b"new")


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_leaves_a_file_whole(
    late: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.py").write_text(NET)
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        if late:
            replace(source, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        assert cli.main(["net.py", "--write", "-q"]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert error(capsys) == "rezero-convert: error: interrupted"
    assert os.listdir(folder) == ["net.py"]
    text = (folder / "net.py").read_text()
    assert GATED in text if late else text == NET


# Shown, not obeyed

_NASTY = "n\x1b[2J\x07\u202e\n<script>.py"


def test_names_with_control_characters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / _NASTY).write_text(NET)
    assert cli.main([_NASTY, "--svg", "n.svg", "--html", "n.html"]) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err, (folder / "n.svg").read_text(), (folder / "n.html").read_text()):
        assert not {"\x1b", "\x07"} & set(text)
        assert "<script>.py" not in text or text in (said.out, said.err)
    assert "\\x1b[2J\\x07\\u202e" in said.err
    subprocess.run(["git", "apply", "-"], input=said.out, text=True, check=True, cwd=folder)
    assert GATED in (folder / _NASTY).read_text()
    assert cli.main(["missing\x1b[2J.py"]) == 2
    assert "missing\\x1b[2J.py" in error(capsys)
