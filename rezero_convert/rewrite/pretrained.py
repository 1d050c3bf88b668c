"""New alphas in `_init_weights` of transformers' models."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from .alphas import alpha_makers, alpha_place
from .classes import Names, descendants, find_class, indent_unit, last_name, literal, method_of, new_method, unfolded
from .jobs import Jobs
from .splice import Edit, Function, Source, after, insert, statements


def pretrained_edits(source: Source, jobs: Jobs, names: Names) -> list[Edit]:
    """New alphas are set in `_init_weights` too: `from_pretrained` leaves what a checkpoint lacks to it."""
    roots = [
        cls
        for cls in source.classes
        if any(last_name(b).endswith("PreTrainedModel") and find_class(source, last_name(b)) is None for b in cls.bases)
    ]
    if not roots or not jobs.gates:
        return []
    groups: dict[tuple[tuple[str, float | None, bool], ...], list[str]] = {}
    for name, gates in _gates_by_class(source, jobs).items():
        groups.setdefault(tuple(gates), []).append(name)
    reached = [root for root in roots if _mentions(source, root, {c for classes in groups.values() for c in classes})]
    init, missing = _init_name(source, names)
    edits = [missing] if missing is not None else []
    for root in reached or roots:
        edits.append(_init_weights_edit(source, root, root, groups, init))
        for cls in descendants(source, root):
            own = method_of(cls, "_init_weights")
            if own is not None and not _calls_super(own):
                edits.append(_init_weights_edit(source, cls, root, groups, init))
    return edits


def _gates_by_class(source: Source, jobs: Jobs) -> dict[str, list[tuple[str, float | None, bool]]]:
    """Per class: its new alphas, their start values, and whether they may be missing."""
    found: dict[str, list[tuple[str, float | None, bool]]] = {}
    for index, gate, bound in jobs.gates:
        for cls in alpha_makers(source, source.classes[index]):
            init = method_of(cls, "__init__")
            maybe = False
            if init is not None and init.body[0].lineno != init.lineno:
                maybe = len(source.indent(alpha_place(source, init, gate, bound)[1].lineno)) > init.body[0].col_offset
            name = gate.alpha if gate.carries is None else f"{gate.alpha}.bias"
            found.setdefault(cls.name, []).append((name, gate.init, maybe))
    return found


def _calls_super(function: Function) -> bool:
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == function.name
        for n in ast.walk(function)
    )


def _mentions(source: Source, root: ast.ClassDef, wanted: set[str]) -> bool:
    """Whether a model class or something it is built of is one of the classes."""
    seen: set[str] = set()
    queue = [root, *descendants(source, root)]
    while queue:
        cls = queue.pop()
        if cls.name in wanted:
            return True
        for node in ast.walk(cls):
            if isinstance(node, ast.Name) and node.id not in seen:
                seen.add(node.id)
                found = find_class(source, node.id)
                queue += [found] if found is not None else []
    return False


def _init_name(source: Source, names: Names) -> tuple[str, Edit | None]:
    """What the file's `_init_weights` calls `zeros_` of, and the import it lacks."""
    model: ast.ImportFrom | None = None
    for stmt in source.tree.body:
        if isinstance(stmt, ast.ImportFrom):
            for alias in stmt.names:
                if alias.name == "initialization" and (stmt.level or stmt.module == "transformers"):
                    return alias.asname or alias.name, None
                if alias.name == "PreTrainedModel" and stmt.level and (stmt.module or "").endswith("modeling_utils"):
                    model = stmt
    if model is None or model.module != "modeling_utils" or not _has_initialization(source.file, model.level):
        return f"{names.nn}.init", None
    first = next(s for s in source.tree.body if isinstance(s, ast.ImportFrom) and s.level)
    place = source.line_start(first.lineno)
    return "init", Edit(place, place, f"from {'.' * model.level} import initialization as init\n")


def _has_initialization(file: str, level: int) -> bool:
    """Whether the package that a transformers model file belongs to has `initialization.py` (from version 5 on)."""
    path = Path(file).absolute()
    if len(path.parents) >= level and (path.parents[level - 1] / "modeling_utils.py").exists():
        return (path.parents[level - 1] / "initialization.py").exists()
    spec = importlib.util.find_spec("transformers")
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "initialization.py").exists()


def _init_weights_edit(
    source: Source,
    cls: ast.ClassDef,
    root: ast.ClassDef,
    groups: dict[tuple[tuple[str, float | None, bool], ...], list[str]],
    init: str,
) -> Edit:
    unit = indent_unit(source, cls)
    own = method_of(cls, "_init_weights")
    module = own.args.args[1].arg if own is not None and len(own.args.args) > 1 else "module"
    lines: list[str] = []
    for gates, classes in groups.items():
        wanted = classes[0] if len(classes) == 1 else f"({', '.join(classes)})"
        lines.append(f"if isinstance({module}, {wanted}):")
        for alpha, value, maybe in gates:
            deeper = unit
            if maybe:
                lines.append(f'{unit}if hasattr({module}, "{alpha.partition(".")[0]}"):')
                deeper = unit + unit
            word, more = ("zeros_", "") if not value else ("ones_", "") if value == 1 else ("constant_", f", {value!r}")
            lines.append(f"{deeper}{init}.{word}({module}.{alpha}{more})")
    if own is None:
        head = [f"@{_no_grad(source)}"] if _no_grad(source) else []
        head.append("def _init_weights(self, module):")
        return new_method(source, cls, head, "super()._init_weights(module)", lines, last=True)
    first = own.body[0]
    if first.lineno == own.lineno:
        return unfolded(source, cls, own, lines)
    indent = source.indent(first.lineno)
    if any(isinstance(stmt, ast.Return) for stmt in statements(own.body)):
        docstring = isinstance(first, ast.Expr) and isinstance(literal(first.value), str)
        if docstring:
            return insert(source, after(source, first, own.body), indent, lines)
        return insert(source, Edit(source.line_start(first.lineno), source.line_start(first.lineno), ""), indent, lines)
    return insert(source, after(source, own.body[-1], own.body), indent, lines)


def _no_grad(source: Source) -> str:
    """The decorator that transformers has on `_init_weights`, if the file can name it."""
    for stmt in source.tree.body:
        if isinstance(stmt, ast.Import):
            for alias in stmt.names:
                if alias.name == "torch":
                    return f"{alias.asname or 'torch'}.no_grad()"
    return ""
