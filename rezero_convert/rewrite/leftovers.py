"""Names that an edit left without use."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator

from .classes import self_name
from .splice import Function, Source, statements


def leftovers(before: Source, now: Source) -> list[str]:
    """Imports, arguments, variables and definitions that nothing uses any more because of the edits."""
    known = {name: before.segment(function) for name, function in _all_functions(before)}
    changed = {name for name, function in _all_functions(now) if known.get(name) != now.segment(function)}
    old, new = _unused(before, changed), _unused(now, changed)
    return [
        f"{now.file}:{line}: {what} {'is' if not what.endswith('s') else 'are'} not used any more"
        for key, (line, what) in sorted(new.items(), key=lambda item: item[1])
        if key not in old and (not key[1] or key[1] in known)
    ]


def _unused(source: Source, functions: Collection[str]) -> dict[tuple[str, str, str], tuple[int, str]]:
    """What is not used in a file, and in some of its functions, with line and description."""
    loads = {n.id for n in source.nodes if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Load, ast.Del))}
    loads |= {
        str(n.value)
        for n in source.nodes
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier()
    }
    found: dict[tuple[str, str, str], tuple[int, str]] = {}
    for stmt in statements(source.tree.body):
        if isinstance(stmt, (ast.Import, ast.ImportFrom)):
            for alias in stmt.names:
                name = (alias.asname or alias.name).partition(".")[0]
                if name not in loads:
                    found["import", "", name] = (stmt.lineno, f"import `{name}`")
        elif isinstance(stmt, (ast.FunctionDef, ast.ClassDef)) and stmt.name not in loads:
            kind = "class" if isinstance(stmt, ast.ClassDef) else "function"
            found["definition", "", stmt.name] = (stmt.lineno, f"{kind} `{stmt.name}`")
    for owner, function in (item for item in _all_functions(source) if item[0] in functions):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, (ast.Load, ast.Del))}
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named = [argument for argument in named if argument.arg != self_name(function)]
        for argument in named:
            if argument.arg not in read:
                what = f"argument `{argument.arg}` of `{owner}`"
                found["argument", owner, argument.arg] = (argument.lineno, what)
        for node in names:
            if isinstance(node.ctx, ast.Store) and node.id not in read:
                found.setdefault(("variable", owner, node.id), (node.lineno, f"variable `{node.id}` in `{owner}`"))
    return found


def _all_functions(source: Source) -> Iterable[tuple[str, Function]]:
    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield prefix + child.name, child
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                yield from visit(child, prefix)

    return visit(source.tree, "")
