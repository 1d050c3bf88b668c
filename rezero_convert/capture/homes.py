"""Where a copied file comes from: its relative imports mean nothing outside of the package it was copied from."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import sources
from ..errors import ConversionError


@sources.cached
def home(file: str) -> str:
    """The installed file that `file` is a copy of, `file` itself if it is in a package or a copy of none.

    A copy has the name of an installed file and defines at least half of its classes. Nothing is imported.
    """
    if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(file)), "__init__.py")):
        return file
    own = _classes(file)
    best = max(((len(own & _classes(other)), other) for other in _installed(os.path.basename(file))), default=(0, file))
    return best[1] if best[0] and 2 * best[0] >= len(_classes(best[1])) else file


def _classes(file: str) -> frozenset[str]:
    try:
        return frozenset(statement.name for statement in sources.tree(file).body if isinstance(statement, ast.ClassDef))
    except (ConversionError, RecursionError):
        return frozenset()


def _installed(name: str) -> Iterator[str]:
    """The files of that name in packages on `sys.path`, by the lists of what was installed."""
    for folder in dict.fromkeys(sys.path):
        for record in sorted(Path(folder or ".").glob("*.dist-info/RECORD")):
            listed = record.read_text(encoding="utf-8", errors="replace")
            if f"/{name}," in listed:
                for row in listed.splitlines():
                    path = os.path.join(folder, row.partition(",")[0])
                    if row.partition(",")[0].endswith(f"/{name}") and os.path.isfile(path):
                        yield path
