"""A case is a folder: `before.py`, and `after.py` as the tool writes it. Cases below `refused` stay byte-identical.

`python tests/test_cases.py` rewrites the golden files and the README's diffs from what the tool does; read the change.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import rezero_convert as rz

CASES = Path(__file__).parent / "cases"
README = Path(__file__).parent.parent / "README.md"
CONVERTED = sorted(path.parent.name for path in CASES.glob("*/before.py"))
REFUSED = sorted(path.parent.name for path in CASES.glob("refused/*/before.py"))


def converted(folder: Path) -> Any:
    return rz.convert_source((folder / "before.py").read_text(), file="before.py")


def report(folder: Path) -> list[dict[str, Any]]:
    """What a reader relies on: verdict, code, place, gates and norms of every add."""
    return [
        {
            "at": f"{site['span']['line']}:{site['span']['col'] + 1}",
            "verdict": site["verdict"],
            "code": site["code"],
            "form": site["form"],
            "gates": [gate["alpha"] for gate in site["gates"]],
            "norms": [f"{norm['path']} {norm['action']}" for norm in site["norms"]],
        }
        for site in converted(folder).report.to_dict()["sites"]
    ]


def hunks(before: str, after: str) -> str:
    """The unified diff without the file names."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm=""))[2:]
    return "".join(f"{line}\n" for line in lines)


def section(name: str) -> str:
    folder = CASES / name
    diff = hunks((folder / "before.py").read_text(), (folder / "after.py").read_text())
    return f"<!-- case: {name} -->\n```diff\n{diff}```\n"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files_stay_as_they_are(name: str) -> None:
    folder = CASES / "refused" / name
    assert converted(folder).text == (folder / "before.py").read_text()
    found = report(folder)
    assert found
    assert all(site["verdict"] == "refused" for site in found)
    assert found == json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_files_are_as_recorded(name: str) -> None:
    folder = CASES / name
    after = (folder / "after.py").read_text()
    compile(after, name, "exec")
    assert converted(folder).text == after
    assert report(folder) == json.loads((folder / "report.json").read_text())
    assert rz.convert_source(after, file="after.py").text == after


def test_every_diff_of_a_case_in_the_readme_is_what_the_tool_does() -> None:
    shown = re.findall(r"<!-- case: (\w+) -->", README.read_text())
    assert set(shown) <= set(CONVERTED)
    assert len(shown) >= 17
    assert [name for name in shown if section(name) not in README.read_text()] == []


def update() -> None:
    text = README.read_text()
    for name in CONVERTED:
        folder = CASES / name
        (folder / "after.py").write_text(converted(folder).text)
        (folder / "report.json").write_text(json.dumps(report(folder), indent=1) + "\n")
        mark = f"<!-- case: {name} -->\n"
        if mark in text:
            start = text.index(mark)
            rest = text[start:]
            end = start + (
                rest.index("```\n", rest.index("```diff")) + 4 if rest.startswith(f"{mark}```diff") else len(mark)
            )
            text = text[:start] + section(name) + text[end:]
    for name in REFUSED:
        folder = CASES / "refused" / name
        (folder / "report.json").write_text(json.dumps(report(folder), indent=1) + "\n")
    README.write_text(text)


if __name__ == "__main__":
    update()
