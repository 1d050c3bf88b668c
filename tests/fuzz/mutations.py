"""Real model files with statements deleted, doubled or swapped: still files that parse, no longer sense."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

import rezero_convert as rz


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mutated file."""

    name: str
    text: str
    change: str
    """The diff to the original."""


@cache
def files(largest: int = 15_000) -> tuple[Path, ...]:
    """The model files of timm and torchvision that are not too long to try many of."""
    timm, torchvision = (Path(str(find_spec(name).origin)).parent for name in ("timm", "torchvision"))  # type: ignore[union-attr]  # installed
    folders = (timm / "models", timm / "layers", torchvision / "models")
    found = sorted(file for folder in folders for file in folder.glob("*.py"))
    return tuple(file for file in found if file.stat().st_size < largest and "(nn.Module)" in file.read_text())


def mutant(random: Random, changes: int = 3) -> Mutant:
    """A file drawn at random with up to `changes` statements of its methods changed, such that it parses."""
    file = random.choice(files())
    original = text = file.read_text()
    for _ in range(random.randint(1, changes)):
        text = _changed(random, text)
    rows = difflib.unified_diff(original.split("\n"), text.split("\n"), "original", "mutant", lineterm="", n=1)
    return Mutant(file.name, text, "\n".join(rows))


def _changed(random: Random, text: str) -> str:
    lines = text.split("\n")
    blocks = [block for block in _blocks(ast.parse(text)) if block]
    block = random.choice(blocks)
    at = random.randrange(len(block))
    rows = [lines[one.lineno - 1 : one.end_lineno] for one in block]
    first, last = block[0].lineno - 1, block[-1].end_lineno
    kind = random.choice(("delete", "double", "swap", "operand"))
    if kind == "delete" and len(block) > 1:
        del rows[at]
    elif kind == "double":
        rows.insert(at, rows[at])
    elif kind == "swap" and len(block) > 1:
        other = random.randrange(len(block))
        rows[at], rows[other] = rows[other], rows[at]
    else:
        rows[at] = [line.replace(" + ", random.choice((" - ", " * ", " + x + ")), 1) for line in rows[at]]
    changed = "\n".join([*lines[:first], *(line for row in rows for line in row), *lines[last:]])
    try:
        compile(changed, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return text
    return changed


def _blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    """The bodies of methods and of what is in them, where each statement has lines of its own."""
    found = []
    for cls in ast.walk(tree):
        for method in cls.body if isinstance(cls, ast.ClassDef) else ():
            for node in ast.walk(method):
                for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
                    if isinstance(body, list) and body and node is not cls and _apart(node, body):
                        found.append(body)
    return found


def _apart(node: ast.AST, body: list[ast.stmt]) -> bool:
    lines = [line for one in body for line in (one.lineno, one.end_lineno or one.lineno)]
    return lines == sorted(lines) and len({one.lineno for one in body}) == len(body) and lines[0] > getattr(
        node, "lineno", 0)  # fmt: skip


def check(one: Mutant) -> None:
    """No crash, no output that does not compile, and nothing left for a second run.

    Raises:
        AssertionError: one of these does not hold; or whatever the tool raises.
    """
    result = rz.convert_source(one.text, file=one.name)
    compile(result.text, one.name, "exec", dont_inherit=True)
    again = rz.convert_source(result.text, file=one.name)
    assert again.text == result.text, "a second run changes the text"
    if not any(site.edited for site in result.report.plan.sites):
        assert result.text == one.text
