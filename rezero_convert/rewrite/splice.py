"""Edits of Python text by position: all that is not edited stays as it is, byte for byte."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .. import sources
from ..errors import ConversionError
from ..plan import Span

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True, slots=True)
class Edit:
    """The characters from `start` up to `end` become `text`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed text whose lines all end in a line feed (the last one perhaps in nothing)."""

    file: str
    text: str
    rows: tuple[str, ...]
    starts: tuple[int, ...]
    tree: ast.Module
    nodes: tuple[ast.AST, ...]
    """Of the tree, outer ones first."""
    classes: tuple[ast.ClassDef, ...]
    """In the order of the text."""

    def at(self, line: int, col: int) -> int:
        """The offset in the text of a position as `ast` gives it."""
        row = self.rows[line - 1]
        return self.starts[line - 1] + (col if row.isascii() else len(row.encode()[:col].decode()))

    def span(self, node: ast.expr | ast.stmt | ast.arg | ast.keyword) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno or 0, node.end_col_offset or 0)

    def segment(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def line_start(self, line: int) -> int:
        """The offset of the start of a line; one line past the last is the end of the text."""
        return self.starts[line - 1] if line <= len(self.rows) else len(self.text)

    def indent(self, line: int) -> str:
        row = self.rows[line - 1]
        return row[: len(row) - len(row.lstrip(" \t\f"))]

    def is_blank(self, line: int) -> bool:
        return 1 <= line <= len(self.rows) and not self.rows[line - 1].strip()

    def is_comment(self, line: int) -> bool:
        return 1 <= line <= len(self.rows) and self.rows[line - 1].lstrip().startswith("#")


def parse(text: str, file: str) -> Source:
    """`text` with its syntax tree.

    Raises:
        ConversionError: it has a syntax error; the message gives file and line.
    """
    try:
        tree = sources.parsed(text, file)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConversionError(f"{f'{file}:{line}' if line else file}: {getattr(error, 'msg', error)}") from error
    rows = tuple(text.splitlines(keepends=True)) if text.isascii() and not _ODD_ENDS.search(text) else _rows(text)
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    nodes = sources.walked(tree)
    classes = sorted((n for n in nodes if isinstance(n, ast.ClassDef)), key=lambda n: (n.lineno, n.col_offset))
    return Source(file, text, rows, tuple(starts[:-1]), tree, nodes, tuple(classes))


_ODD_ENDS = re.compile("[\v\f\x1c-\x1e]")


def _rows(text: str) -> tuple[str, ...]:
    """Lines by line feeds alone, as Python numbers them; `str.splitlines` also breaks at form feeds and others."""
    parts = text.split("\n")
    return tuple(part + "\n" for part in parts[:-1]) + ((parts[-1],) if parts[-1] else ())


def apply(source: Source, edits: Iterable[Edit]) -> str:
    """The text with `edits` made; equal edits count once, insertions at one place keep their order.

    Raises:
        ConversionError: two edits overlap.
    """
    parts: list[str] = []
    position = 0
    for edit in sorted(dict.fromkeys(edits), key=lambda e: (e.start, e.end)):
        if edit.start < position:
            line = source.text.count("\n", 0, edit.start) + 1
            raise ConversionError(f"{source.file}:{line}: two edits of one statement; it cannot be rewritten")
        parts += (source.text[position : edit.start], edit.text)
        position = edit.end
    return "".join((*parts, source.text[position:]))


def class_at(source: Source, span: Span) -> int | None:
    """The index in `source.classes` of the innermost class whose text holds `span`."""
    found = None
    for index, node in enumerate(source.classes):
        start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
        if start <= (span.line, span.col) and (span.end_line, span.end_col) <= end:
            found = index
    return found


def suites(stmt: ast.stmt) -> list[list[ast.stmt]]:
    """The statement lists directly inside a compound statement."""
    found: list[list[ast.stmt]] = []
    for name in ("body", "orelse", "finalbody"):
        suite = getattr(stmt, name, None)
        if suite:
            found.append(suite)
    for part in (*getattr(stmt, "handlers", ()), *getattr(stmt, "cases", ())):
        found.append(part.body)
    return found


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a body in the order of the text, without those of nested functions and classes."""
    for stmt in body:
        yield stmt
        if not isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for suite in suites(stmt):
                yield from statements(suite)


def after(source: Source, stmt: ast.stmt, siblings: list[ast.stmt]) -> Edit:
    """An empty edit at the start of the line after `stmt` and what shares its line, aligned comments included."""
    line = stmt.end_lineno or stmt.lineno
    for sibling in siblings[siblings.index(stmt) + 1 :]:
        if sibling.lineno == line:
            line = sibling.end_lineno or sibling.lineno
    row = source.rows[line - 1]
    last = max((s for s in siblings if s.end_lineno == line), key=lambda s: s.end_col_offset or 0)
    tail = row.encode()[last.end_col_offset or 0 :].decode()
    if tail.lstrip(" \t;").startswith("#"):
        column = len(row) - len(tail) + tail.index("#")
        while source.is_comment(line + 1) and len(source.indent(line + 1)) == column:
            line += 1
    return Edit(source.line_start(line + 1), source.line_start(line + 1), "")


def insert(source: Source, place: Edit, indent: str, lines: Iterable[str]) -> Edit:
    """New lines at `place`, the start of a line or the end of a text that lacks its last line feed."""
    text = "".join(f"{indent}{line}\n" if line else "\n" for line in lines)
    if place.start == len(source.text) and not source.text.endswith("\n"):
        text = "\n" + text[:-1]
    return Edit(place.start, place.end, text)


def remove(source: Source, leaves: set[ast.stmt]) -> tuple[list[Edit], set[ast.stmt]]:
    """Edits that remove statements, and all that goes: an `if`, `for` or `with torch.no_grad()` left empty goes too."""
    gone: set[ast.stmt] = set()
    edits: list[Edit] = []
    if leaves:
        _mark(source.tree.body, leaves, gone)
        _remove_from(source, source.tree.body, None, gone, edits)
    return edits, gone


def _mark(body: list[ast.stmt], leaves: set[ast.stmt], gone: set[ast.stmt]) -> bool:
    for stmt in body:
        if stmt in leaves:
            gone.add(stmt)
            continue
        empty = [_mark(suite, leaves, gone) for suite in suites(stmt)]
        if isinstance(stmt, ast.With) and all(empty) and all(map(_is_no_grad, stmt.items)):
            gone.add(stmt)
        if empty and all(empty) and isinstance(stmt, (ast.If, ast.For)):
            head = stmt.test if isinstance(stmt, ast.If) else stmt.iter
            if not any(isinstance(n, (ast.NamedExpr, ast.Await, ast.Yield)) for n in ast.walk(head)):
                gone.add(stmt)
    return all(stmt in gone for stmt in body)


def _is_no_grad(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "no_grad"


def _remove_from(
    source: Source, body: list[ast.stmt], owner: ast.stmt | None, gone: set[ast.stmt], edits: list[Edit]
) -> None:
    if owner is not None and body and all(stmt in gone for stmt in body):
        start, end = source.span(body[0])[0], source.span(body[-1])[1]
        edits.append(Edit(start, end, "pass"))
        return
    run: list[ast.stmt] = []
    for stmt in body:
        if stmt in gone:
            run.append(stmt)
            continue
        if run:
            edits.append(_cut(source, body, run))
            run = []
        if isinstance(stmt, ast.If) and _edit_arms(source, stmt, gone, edits):
            continue
        for suite in suites(stmt):
            _remove_from(source, suite, stmt, gone, edits)
    if run:
        edits.append(_cut(source, body, run))


def _edit_arms(source: Source, stmt: ast.If, gone: set[ast.stmt], edits: list[Edit]) -> bool:
    """An `if` of which one arm is left: without `else`, or with its condition negated."""
    if not stmt.orelse:
        return False
    body_gone, else_gone = (all(s in gone for s in suite) for suite in (stmt.body, stmt.orelse))
    if body_gone == else_gone:
        return False
    last, first = stmt.body[-1], stmt.orelse[0]
    if else_gone:
        start = source.line_start((last.end_lineno or 0) + 1)
        edits.append(Edit(start, source.line_start((stmt.orelse[-1].end_lineno or 0) + 1), ""))
        _remove_from(source, stmt.body, stmt, gone, edits)
        return True
    word = [
        n for n in range((last.end_lineno or 0) + 1, first.lineno) if re.match(r"[ \t]*else\s*:", source.rows[n - 1])
    ]
    if not word or stmt.body[0].lineno == stmt.lineno:
        return False
    start, end = source.span(stmt.test)
    edits.append(Edit(start, end, negated(source, stmt.test)))
    edits.append(Edit(source.line_start(stmt.body[0].lineno), source.line_start(word[-1] + 1), ""))
    _remove_from(source, stmt.orelse, stmt, gone, edits)
    return True


_OPPOSITE: dict[type[ast.cmpop], str] = {
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
}


def negated(source: Source, test: ast.expr) -> str:
    """The text of the opposite condition."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return source.segment(test.operand)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _OPPOSITE:
        left, right = source.segment(test.left), source.segment(test.comparators[0])
        return f"{left} {_OPPOSITE[type(test.ops[0])]} {right}"
    text = source.segment(test)
    return f"not {text}" if isinstance(test, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)) else f"not ({text})"


def _cut(source: Source, body: list[ast.stmt], run: list[ast.stmt]) -> Edit:
    """Removes a run of neighbours, not the whole of their suite."""
    first, last = run[0], run[-1]
    before = body[body.index(first) - 1] if body.index(first) else None
    behind = body[body.index(last) + 1] if body.index(last) + 1 < len(body) else None
    if behind is not None and behind.lineno == last.end_lineno:
        return Edit(source.span(first)[0], source.span(behind)[0], "")
    if before is not None and before.end_lineno == first.lineno:
        return Edit(source.span(before)[1], source.span(last)[1], "")
    top, bottom = first.lineno, (last.end_lineno or 0) + 1
    follows = behind is not None and not source.is_blank(bottom)
    floor = (before.end_lineno or 0) if before is not None else 0
    if not follows and before is not None:
        # A comment that stood above these statements alone has nothing left to speak of.
        while top - 1 > floor and source.is_comment(top - 1):
            top -= 1
    if not follows and top - 1 > floor and source.is_blank(top - 1):
        while top - 1 > floor and source.is_blank(top - 1):
            top -= 1
    elif before is None and source.is_blank(bottom) and not source.is_comment(top - 1):
        bottom += 1
    return Edit(source.line_start(top), source.line_start(bottom), "")
