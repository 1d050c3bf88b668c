"""Source text and its syntax trees, by file name: files on disk, notebook cells, text registered by us."""

from __future__ import annotations

import ast
import linecache
import os
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from .errors import ConversionError
from .plan import Place, Span

_Function = TypeVar("_Function", bound=Callable[..., Any])
_caches: list[Any] = []
_by_file: list[dict[str, Any]] = []
_stores: list[dict[Any, Any]] = []
_stand_ins: dict[str, str] = {}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def register(file: str, text: str) -> None:
    """Make `text` known under `file`, to us and to `linecache` (tracebacks, `inspect`, TorchScript)."""
    rows = [line + "\n" for line in text.split("\n")]
    if rows[-1] == "\n":
        rows.pop()  # the text ends with a line end, or is empty
    before = linecache.getlines(file)
    linecache.cache[file] = (len(text), None, rows, file)
    if before and before != rows:
        forget(file)


@contextmanager
def registered(file: str, text: str) -> Iterator[None]:
    """`text` under `file` for a while: code that was imported from there may have another."""
    before = linecache.cache.get(file)
    register(file, text)
    try:
        yield
    finally:
        here = linecache.getlines(file)
        del linecache.cache[file]
        if before is not None:
            linecache.cache[file] = before
        if linecache.getlines(file) != here:
            forget(file)


def stand_in(file: str, text: str, of: str) -> None:
    """Register a text for code of a file, `of`, whose own text cannot be had."""
    register(file, text)
    _stand_ins[file] = of


def stands_for(file: str) -> str | None:
    """The file in whose place a text stands; None for a text of its own."""
    return _stand_ins.get(file)


def forget(file: str | None = None) -> None:
    """Drop what is remembered of the text of `file`, of all texts if None, and what may depend on it."""
    for cache in _caches:
        cache.cache_clear()
    for store in _stores:
        store.clear()
    for known in _by_file:
        for changed in [file] if file is not None else [*known]:
            known.pop(changed, None)


def cached(function: _Function) -> _Function:
    """Remembers results that depend on source texts, until one of these changes."""
    remembering = lru_cache(maxsize=8192)(function)
    _caches.append(remembering)
    return cast("_Function", remembering)


def emptied(store: dict[Any, Any]) -> dict[Any, Any]:
    """`store`, which is emptied whenever a text changes."""
    _stores.append(store)
    return store


def cached_by_file(function: _Function) -> _Function:
    """Remembers what depends on the text of one file alone, until that changes."""
    known: dict[str, Any] = {}
    _by_file.append(known)

    @wraps(function)
    def remembering(file: str) -> Any:
        if file not in known:
            known[file] = function(file)
        return known[file]

    return cast("_Function", remembering)


def text(file: str) -> str:
    """The text of `file`: from `linecache` if it holds it, else from disk.

    Raises:
        ConversionError: the text cannot be had.
    """
    lines = linecache.getlines(file) or _imported_lines(file)
    if lines:
        return "".join(lines)
    try:
        with tokenize.open(Path(file)) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ConversionError(f"{file}: no source text ({error})") from error


def _imported_lines(file: str) -> list[str]:
    """The lines of a module that was imported from elsewhere than a file of this name: a zip archive."""
    if file.startswith("<") or os.path.exists(file):
        return []
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("__file__") == file:
            return linecache.getlines(file, vars(module))
    return []


@cached_by_file
def has_text(file: str) -> bool:
    """Whether the text of `file` can be had, and is Python."""
    try:
        tree(file)
    except ConversionError:
        return False
    return True


@cached_by_file
def lines(file: str) -> tuple[str, ...]:
    """The lines of `file` with their ends. Only "\\n" ends a line here, as for Python's own line numbers."""
    return tuple(line + "\n" for line in text(file).split("\n"))


@cached_by_file
def tree(file: str) -> ast.Module:
    """The parsed file.

    Raises:
        ConversionError: the text cannot be had or has a syntax error; the message gives file and line.
    """
    try:
        return _parsed(text(file), file)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}:{line}" if line else file
        raise ConversionError(f"{where}: syntax error: {getattr(error, 'msg', error)}") from error


def parsed(content: str, file: str) -> ast.Module:
    """The tree of a text: the one of `file` where that is its text. Not to be changed.

    Raises:
        SyntaxError, ValueError: as `ast.parse`.
    """
    return tree(file) if "".join(linecache.getlines(file)) == content else _parsed(content, file)


@lru_cache(maxsize=2)  # a rewritten text is parsed, then registered
def _parsed(content: str, file: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(content)


def nodes(file: str) -> tuple[ast.AST, ...]:
    """Every node of a parsed file, outer ones first."""
    return walked(tree(file))


@lru_cache(maxsize=8)
def walked(root: ast.Module) -> tuple[ast.AST, ...]:
    """Every node of a tree, outer ones first."""
    return tuple(ast.walk(root))


def segment(span: Span) -> str:
    """The text of `span`, line breaks and all."""
    rows = lines(span.file)[span.line - 1 : span.end_line]
    if not rows:
        return ""
    data = [row.encode() for row in rows]
    data[-1] = data[-1][: span.end_col]
    data[0] = data[0][span.col :]
    return b"".join(data).decode()


def span_of(file: str, node: ast.expr | ast.stmt) -> Span:
    return Span(file, node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or 0)


def expression(span: Span) -> ast.AST | None:
    """The expression or augmented assignment at `span`.

    The interpreter gives a call in a chain over several lines the line of its attribute as start, so calls are found
    by their end. Of several nodes with one range the innermost is returned.
    """
    found: ast.AST | None = None
    for node in _ends(span.file).get((span.end_line, span.end_col), ()):
        if (node.lineno, node.col_offset) == (span.line, span.col) or (
            isinstance(node, ast.Call) and node.lineno <= span.line and found is None and _attribute_on(node, span.line)
        ):
            found = node
    return found


def function(place: Place) -> FunctionNode | None:
    """The definition of the function at `place`."""
    for node in _functions(place.file):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if first == place.line and getattr(node, "name", "<lambda>") == place.name:
            return node
    return None


def class_of(file: str, qualname: str) -> ast.ClassDef | None:
    """The definition of the class with this qualified name."""
    body: list[ast.stmt] = tree(file).body
    found: ast.ClassDef | None = None
    for name in qualname.split("."):
        if name == "<locals>":
            continue
        match = [node for node in _definitions(body) if node.name == name]
        if not match:
            return None
        body = match[-1].body
        found = match[-1] if isinstance(match[-1], ast.ClassDef) else None
    return found


def _definitions(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Definitions in `body`, also below `if`, `try` and `with`."""
    found: list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = []
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node)
        else:
            for part in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(node, part, []):
                    found += _definitions([child] if isinstance(child, ast.stmt) else child.body)
    return found


def _attribute_on(call: ast.Call, line: int) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.end_lineno == line


@cached_by_file
def _ends(file: str) -> dict[tuple[int, int], list[ast.expr | ast.stmt]]:
    """Expressions and augmented assignments by end position, outermost first."""
    index: dict[tuple[int, int], list[ast.expr | ast.stmt]] = {}
    for node in nodes(file):
        if isinstance(node, (ast.expr, ast.AugAssign)):
            index.setdefault((node.end_lineno or 0, node.end_col_offset or 0), []).append(node)
    return index


@cached_by_file
def _functions(file: str) -> tuple[FunctionNode, ...]:
    return tuple(node for node in nodes(file) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
