"""The list of faults (`tests/mutation`) fits the package, and the command tells a fault that is caught from others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutation import FAULTS
from mutation.__main__ import main
from mutation.fault import PACKAGE, Fault, copied, failing_without, failures, spoiled, tried

ROOT = Path(__file__).parents[1]
DEFINED = {
    file.name: set(re.findall(r"def (test_\w+)", file.read_text())) for file in Path(__file__).parent.glob("*.py")
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of one function with a test, and a test that fails."""
    for folder in (PACKAGE, "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / PACKAGE / "__init__.py").write_text(
        "def double(x):\n    return 2 * x\n\n\ndef same(x):\n    return x\n"
    )
    (tmp_path / "tests" / "test_it.py").write_text(
        f"from {PACKAGE} import double, same\n\n\ndef test_double():\n    assert double(3) == 6\n\n\n"
        "def test_wrong():\n    assert same(3) == 4\n"
    )
    return tmp_path


def test_a_fault_is_caught_survives_or_does_not_apply(small: Path) -> None:
    package = copied(small, small / "elsewhere")
    made = [
        Fault("caught", "__init__.py", "2 * x", "3 * x", "test_it.py::test_double"),
        Fault("survives", "__init__.py", "return x", "return -x", "test_it.py::test_double"),
        Fault("twice there", "__init__.py", "(x)", "(x, y)", "test_it.py::test_double"),
        Fault("no Python", "__init__.py", "2 * x", "2 *", "test_it.py::test_double"),
        Fault("no such test", "__init__.py", "2 * x", "3 * x", "test_it.py::test_other"),
        Fault("hangs", "__init__.py", "return 2 * x", "while x: pass", "test_it.py::test_double"),
    ]
    outcomes = [tried(fault, small, package, limit=20.0 if fault.name == "hangs" else 600.0) for fault in made]
    assert [one.verdict for one in outcomes] == [
        "caught", "SURVIVED", "NOT APPLICABLE", "NOT APPLICABLE", "NO TESTS", "caught",
    ]  # fmt: skip
    assert outcomes[0].detail == "test_it.py::test_double"
    assert "2 times" in outcomes[2].detail
    assert "does not compile" in outcomes[3].detail
    assert "takes more than" in outcomes[5].detail
    assert "return 2 * x" in (package / "__init__.py").read_text()
    assert "return 2 * x" in (small / PACKAGE / "__init__.py").read_text()


def test_what_fails_without_a_fault_is_told(small: Path) -> None:
    tests = ["test_it.py::test_double", "test_it.py::test_wrong"]
    assert failing_without(tests, small, small / PACKAGE) == ["test_it.py::test_wrong"]


def test_the_names_of_failed_tests() -> None:
    shown = "../tests/test_a.py::test_b[x - FAILED y] PASSED\n../tests/test_a.py::test_c[1 .. 2] FAILED   [ 7%]\n"
    assert failures(shown) == ["test_a.py::test_c[1 .. 2]"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits(fault: Fault) -> None:
    assert spoiled(fault, ROOT / PACKAGE) != (ROOT / PACKAGE / fault.file).read_text()
    for test in fault.tests.split():
        file, _, name = test.partition("[")[0].partition("::")
        assert not name or name in DEFINED[file]
        assert file in DEFINED


def test_there_are_faults_of_every_part() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 60
    parts = {fault.file.partition("/")[0] for fault in FAULTS}
    assert parts >= {"capture", "detect", "rewrite", "validation", "instruments", "methods.py", "folding.py"}
    files = {fault.file for fault in FAULTS}
    assert files >= {
        f"validation/{name}.py" for name in ("equality", "looks", "measured", "results", "sealed", "whole")
    }


@pytest.mark.slow
def test_every_fault_is_caught() -> None:
    assert main([]) == 0
