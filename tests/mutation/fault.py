"""One fault: what it is, how it is made in a copy of the package, and whether tests notice."""

from __future__ import annotations

import compileall
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import cache_from_source
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import torch

PACKAGE = "rezero_convert"
Verdict = Literal["caught", "SURVIVED", "NOT APPLICABLE", "NO TESTS"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake that somebody might make."""

    name: str
    """What is wrong then."""
    file: str
    """Below the package's folder."""
    old: str
    """Text that occurs once in the file."""
    new: str
    tests: str
    """The tests that are to catch it, below `tests/`, by spaces: few, so that a fault costs seconds."""

    def ids(self, root: Path) -> list[str]:
        return [str(root / "tests" / test) for test in self.tests.split()]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a fault."""

    fault: Fault
    verdict: Verdict
    detail: str
    """The test that failed first, or what went wrong."""
    seconds: float = 0.0


def spoiled(fault: Fault, package: Path) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        ValueError: the text that it replaces is not there, or there several times; or the new one is no Python.
    """
    text = (package / fault.file).read_text()
    times = text.count(fault.old)
    if times != 1:
        raise ValueError(f"{fault.file} holds the text to be replaced {times} times, not once")
    made = text.replace(fault.old, fault.new)
    try:
        compile(made, fault.file, "exec")
    except SyntaxError as error:
        raise ValueError(f"{fault.file} does not compile with the fault: {error}") from error
    return made


def copied(root: Path, folder: Path) -> Path:
    """A copy of the package in `folder`, compiled: what copies it again need not be compiled but for the fault."""
    made = folder / PACKAGE
    shutil.copytree(root / PACKAGE, made)
    compileall.compile_dir(made, quiet=1)
    return made


def tried(fault: Fault, root: Path, package: Path, *, limit: float = 900.0) -> Outcome:
    """Make a fault in a copy of the package and run its tests, up to the first that fails.

    Args:
        fault: the fault.
        root: the repository, with the tests.
        package: the package as it is, which is not changed.
        limit: in seconds; what takes longer hangs, and is caught by that.
    """
    try:
        text = spoiled(fault, package)
    except ValueError as error:
        return Outcome(fault, "NOT APPLICABLE", str(error))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder, PACKAGE))
        spoilt = Path(folder, PACKAGE, fault.file)
        spoilt.write_text(text)
        Path(cache_from_source(spoilt)).unlink(missing_ok=True)  # which goes by size and second
        try:
            code, output = _pytest(Path(folder), root, ["-x", *fault.ids(root)], limit)
        except TimeoutError:
            return Outcome(fault, "caught", f"takes more than {limit:g} s", limit)
    seconds = time.perf_counter() - begin
    failed = failures(output)
    if code == 1 and failed:
        return Outcome(fault, "caught", failed[0], seconds)
    if code == 0:
        return Outcome(fault, "SURVIVED", fault.tests, seconds)
    return Outcome(fault, "NO TESTS", " ".join(output.split())[-300:], seconds)


def failing_without(tests: Sequence[str], root: Path, package: Path) -> list[str]:
    """Those of some tests that fail without any fault, in a copy as well: what they catch says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder, PACKAGE))
        code, output = _pytest(Path(folder), root, [str(root / "tests" / test) for test in tests], None)
    return failures(output) or ([] if code == 0 else [output[-300:]])


def warm() -> None:
    """Import what the tests import: they run in forks of this process, and a fault costs what its tests do."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms() -> ()"):
        library.define(schema)  # as the tests' conftest does, which does it again
    for name in _HEAVY:
        importlib.import_module(name)
    library._destroy()


_HEAVY = ("torch._dynamo", "torch.export", "libcst.metadata", "rich.table", "timm", "torchvision", "transformers")


def _pytest(folder: Path, root: Path, arguments: list[str], limit: float | None) -> tuple[int | None, str]:
    """Run pytest on the package in `folder` in a fork of this process; gives its exit code and what it prints.

    Raises:
        TimeoutError: it takes longer than the limit.
    """
    options = ["--rootdir", str(root), "-c", str(root / "pyproject.toml"), "-v", "--tb=no", "--assert=plain"]
    options += ["-p", "no:cacheprovider"]
    process = get_context("fork").Process(target=_forked, args=(folder, root, [*options, *arguments]))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        raise TimeoutError
    return process.exitcode, (folder / _OUTPUT).read_text(errors="replace")


_OUTPUT = "output.txt"


def _forked(folder: Path, root: Path, arguments: list[str]) -> None:
    with (folder / _OUTPUT).open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": f"{folder}{os.pathsep}{root}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != root), str(root)]
    sys.modules["__main__"] = ModuleType("__main__")  # processes that tests start would look for the command
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def failures(output: str) -> list[str]:
    """The tests that failed, below `tests/`, by what `pytest -v` prints."""
    return re.findall(r"^\S*?tests/(\S+?::.*?) (?:FAILED|ERROR) *(?:\[ *\d+%\])?$", output, re.MULTILINE)
