"""Names in source files and what they mean, by reading text: nothing of the user's is imported or executed.

Names of torch itself (and of a few modules of the standard library) resolve to the real objects, which are loaded
anyway. Everything else resolves to definitions in files: the same file, files beside it, or packages on `sys.path`
found without importing them.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
import operator
import os
import sys
import types
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from .. import sources
from ..errors import ConversionError
from . import homes

MAX_HOPS = 12
"""How many re-exports are followed."""

MAX_STARS = 40
"""A file with more star imports (the list of all models of a zoo) is not searched through them."""

_ANCESTORS = 6
_LOADED: dict[str, types.ModuleType] = {
    "torch": torch,
    "operator": operator,
    "math": math,
    "functools": functools,
    "copy": copy,
}


@dataclass(frozen=True, slots=True)
class Known:
    """A real object of torch or of the standard library."""

    obj: Any


@dataclass(frozen=True, slots=True)
class FileRef:
    """A Python module, by the file (or, for a package without `__init__.py`, the folder) that holds it."""

    file: str


@dataclass(frozen=True, slots=True)
class ClassRef:
    file: str
    qualname: str
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """A function of a file, or a static method."""

    file: str
    qualname: str
    node: ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class ExpressionRef:
    """A name assigned at the top of a file."""

    file: str
    node: ast.expr


@dataclass(frozen=True, slots=True)
class External:
    """Something whose text cannot be had."""

    name: str


Reference = Known | FileRef | ClassRef | FunctionRef | ExpressionRef | External


@dataclass(frozen=True, slots=True)
class Import:
    module: str
    level: int
    attribute: str | None


_Binding = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr | Import


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """What a file defines at its top level, also below `if`, `try` and `with`, in order."""

    tree: ast.Module
    names: dict[str, list[_Binding]]
    stars: tuple[Import, ...]
    classes: dict[str, ast.ClassDef]
    """All classes by qualified name, those within functions and classes too."""
    cache: dict[str, Reference | None]


_indices: dict[str, Index] = sources.emptied({})


def index(file: str) -> Index | None:
    """The index of `file`, None if it cannot be read or parsed."""
    try:
        tree = sources.tree(file)
    except (ConversionError, RecursionError):
        return None
    known = _indices.get(file)
    if known is not None and known.tree is tree:
        return known
    names: dict[str, list[_Binding]] = {}
    stars: list[Import] = []
    _collect(tree.body, names, stars)
    classes: dict[str, ast.ClassDef] = {}
    _collect_classes(tree.body, "", classes)
    made = Index(tree, names, tuple(stars), classes, {})
    _indices[file] = made
    return made


def imported(statement: ast.Import | ast.ImportFrom) -> dict[str, Import]:
    """The names an import statement binds; star imports bind none here."""
    if isinstance(statement, ast.Import):
        return {
            alias.asname or alias.name.partition(".")[0]: Import(
                alias.name if alias.asname else alias.name.partition(".")[0], 0, None
            )
            for alias in statement.names
        }
    return {
        alias.asname or alias.name: Import(statement.module or "", statement.level, alias.name)
        for alias in statement.names
        if alias.name != "*"
    }


def resolve(file: str, name: str, hops: int = 0) -> Reference | None:
    """What the top-level `name` of `file` refers to; None if the file does not bind it."""
    found = index(file)
    if found is None or hops > MAX_HOPS:
        return None
    if name in found.cache:
        return found.cache[name]
    found.cache[name] = None  # names that import each other in a circle end here
    result: Reference | None = None
    for binding in found.names.get(name, ()):
        candidate = _resolve_binding(file, name, binding, hops)
        if result is None or (isinstance(result, External) and not _is_none(candidate)):
            result = candidate
        if result is not None and not isinstance(result, External) and not _is_none(result):
            break
    if result is None and len(found.stars) <= MAX_STARS:
        for star in found.stars:
            base = locate(file, star.module, star.level)
            if isinstance(base, FileRef) and base.file != file:
                result = resolve(base.file, name, hops + 1)
            elif isinstance(base, Known):
                result = member(base, name)
            if result is not None:
                break
    found.cache[name] = result
    return result


def resolve_import(file: str, binding: Import, hops: int = 0) -> Reference:
    """What an imported name refers to."""
    base = locate(file, binding.module, binding.level)
    if base is None:
        return External(f"{binding.module}.{binding.attribute}" if binding.attribute else binding.module)
    if binding.attribute is None:
        return base
    return member(base, binding.attribute, hops) or External(f"{binding.module}.{binding.attribute}")


def member(base: Reference, name: str, hops: int = 0) -> Reference | None:
    """Attribute `name` of a module."""
    if isinstance(base, Known):
        if isinstance(base.obj, types.ModuleType):
            # not getattr: torch imports some of its submodules when asked for them
            if name in vars(base.obj):
                return Known(vars(base.obj)[name])
            loaded = sys.modules.get(f"{base.obj.__name__}.{name}")
            return Known(loaded) if loaded is not None else External(f"{base.obj.__name__}.{name}")
        found = getattr(base.obj, name, None)
        return Known(found) if found is not None else External(name)
    if isinstance(base, External):
        return External(f"{base.name}.{name}")
    if isinstance(base, FileRef):
        defined = resolve(base.file, name, hops + 1) if base.file.endswith(".py") else None
        if defined is not None and not isinstance(defined, External):
            return defined
        folder = os.path.dirname(base.file) if base.file.endswith("__init__.py") else base.file
        below = _in_folder(folder, name) if os.path.isdir(folder) else None
        return FileRef(below) if below is not None else defined
    return None


def dotted(file: str, node: ast.expr) -> Reference | None:
    """What a dotted name refers to at the top level of `file`; None for anything else. Follows plain aliases."""
    if isinstance(node, ast.Subscript):  # Generic[T]
        return dotted(file, node.value)
    if isinstance(node, ast.Name):
        found = resolve(file, node.id)
        for _ in range(4):
            if not isinstance(found, ExpressionRef) or not isinstance(found.node, (ast.Name, ast.Attribute)):
                return found
            found = dotted(found.file, found.node)
        return found
    if isinstance(node, ast.Attribute):
        base = dotted(file, node.value)
        if isinstance(base, ClassRef):
            nested = index(base.file)
            inner = nested.classes.get(f"{base.qualname}.{node.attr}") if nested else None
            return ClassRef(base.file, f"{base.qualname}.{node.attr}", inner) if inner else None
        return member(base, node.attr) if base is not None else None
    return None


@sources.cached
def lineage(cls: ClassRef) -> tuple[ClassRef | Known | External, ...]:
    """The class and its bases in (approximate) method resolution order, as far as text reaches."""
    order: list[ClassRef | Known | External] = []
    _descend(cls, order, 0)
    last = {ref: position for position, ref in enumerate(order)}
    return tuple(ref for position, ref in enumerate(order) if last[ref] == position)


@sources.cached
def torch_base(cls: ClassRef) -> type[nn.Module] | None:
    """The most specific class of torch that `cls` derives from, if it is an `nn.Module`."""
    for ref in lineage(cls):
        own = ref.obj if isinstance(ref, Known) and isinstance(ref.obj, type) else None
        if own is not None and issubclass(own, nn.Module) and own is not nn.Module:
            return own
    return nn.Module if any(isinstance(ref, Known) and ref.obj is nn.Module for ref in lineage(cls)) else None


@sources.cached
def is_module(cls: ClassRef) -> bool:
    """Whether `cls` is an `nn.Module`. With a base whose text cannot be had: whether it defines `forward`."""
    if torch_base(cls) is not None:
        return True
    unknown = any(isinstance(ref, External) and ref.name not in _PLAIN_BASES for ref in lineage(cls))
    return unknown and isinstance(method(cls, "forward"), Method)


_PLAIN_BASES = ("object", "abc.ABC", "enum.Enum", "typing.NamedTuple", "typing.Protocol", "typing.Generic")


@dataclass(frozen=True, slots=True)
class Method:
    cls: ClassRef
    """The class whose text defines it."""
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def decorators(self) -> tuple[str, ...]:
        """The last parts of the decorators' names."""
        return tuple(_last_name(node) for node in self.node.decorator_list)


def method(cls: ClassRef, name: str, after: ClassRef | None = None) -> Method | Known | None:
    """The method `name` of a class; the class of torch that provides it; None. `after`: as seen by its `super()`."""
    order = lineage(cls)
    if after is not None and after in order:
        order = order[order.index(after) + 1 :]
    for ref in order:
        if isinstance(ref, ClassRef):
            found = members(ref).get(name)
            if isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return Method(ref, found)
            if isinstance(found, ast.Name) and found.id != name:  # forward = _forward
                other = members(ref).get(found.id)
                if isinstance(other, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    return Method(ref, other)
        elif isinstance(ref, Known) and isinstance(ref.obj, type) and ref.obj is not object and hasattr(ref.obj, name):
            return ref
    return None


def class_attribute(cls: ClassRef, name: str) -> tuple[ClassRef, ast.expr] | None:
    """The expression assigned to `name` in the body of a class or of a base, and the class."""
    for ref in lineage(cls):
        if isinstance(ref, ClassRef):
            found = members(ref).get(name)
            if isinstance(found, ast.expr):
                return ref, found
    return None


@sources.cached
def members(cls: ClassRef) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr]:
    """What the body of a class binds: definitions and assigned expressions, by name."""
    found: dict[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr] = {}
    for statement in _flat(cls.node.body):
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not any(_last_name(node) in ("overload", "setter") for node in statement.decorator_list):
                found[statement.name] = statement
        elif isinstance(statement, ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            found[statement.target.id] = statement.value
    return found


_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


@sources.cached
def locate(file: str, module: str, level: int) -> FileRef | Known | None:
    """The module an import statement of `file` names; None if it can be neither read nor is torch's."""
    if level:
        folder = os.path.dirname(os.path.abspath(homes.home(file)))
        for _ in range(level - 1):
            folder = os.path.dirname(folder)
        if folder == _TORCH or folder.startswith(_TORCH + os.sep):
            inside = os.path.relpath(folder, os.path.dirname(_TORCH)).split(os.sep)
            return locate(file, ".".join([*inside, module] if module else inside), 0)
        return _below(folder, module.split(".") if module else [])
    top, *rest = module.split(".")
    if top in _LOADED:
        base: Reference | None = Known(_LOADED[top])
        for part in rest:
            base = member(base, part) if base is not None else None
        return base if isinstance(base, Known) else None
    if top in sys.stdlib_module_names:
        return None
    if os.path.exists(file):
        folder = os.path.abspath(file)
        for _ in range(_ANCESTORS):
            folder = os.path.dirname(folder)
            if _in_folder(folder, top) is not None:
                found = _below(folder, [top, *rest])
                if found is not None:
                    return found
    home = _package(top)
    return _below(home, [top, *rest]) if home is not None else None


@sources.cached
def _package(top: str) -> str | None:
    """The folder on `sys.path` that holds the top-level module `top`. Finding a top-level module imports nothing."""
    try:
        spec = PathFinder.find_spec(top)
    except (ImportError, ValueError, OSError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return os.path.dirname(next(iter(spec.submodule_search_locations)))
    return os.path.dirname(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _below(folder: str, parts: list[str]) -> FileRef | None:
    path: str = folder
    if not parts:
        start = os.path.join(folder, "__init__.py")
        return FileRef(start) if os.path.isfile(start) else FileRef(folder)
    for position, part in enumerate(parts):
        found = _in_folder(path, part)
        if found is None:
            return None
        if position == len(parts) - 1:
            return FileRef(found)
        if found.endswith(".py") and not found.endswith("__init__.py"):
            return None
        path = os.path.join(path, part)
    return None


@sources.cached
def _in_folder(folder: str, name: str) -> str | None:
    """The file of module `name` in `folder`, the folder itself for a package without `__init__.py`."""
    base = os.path.join(folder, name)
    if os.path.isfile(base + ".py"):
        return base + ".py"
    if os.path.isfile(os.path.join(base, "__init__.py")):
        return os.path.join(base, "__init__.py")
    return base if os.path.isdir(base) and name.isidentifier() else None


def _resolve_binding(file: str, name: str, binding: _Binding, hops: int) -> Reference:
    if isinstance(binding, Import):
        return resolve_import(file, binding, hops)
    if isinstance(binding, ast.ClassDef):
        return ClassRef(file, name, binding)
    if isinstance(binding, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return FunctionRef(file, name, binding)
    return ExpressionRef(file, binding)


def _is_none(ref: Reference | None) -> bool:
    return isinstance(ref, ExpressionRef) and isinstance(ref.node, ast.Constant)


def _descend(cls: ClassRef, order: list[ClassRef | Known | External], depth: int) -> None:
    order.append(cls)
    if depth > MAX_HOPS:
        return
    for base in cls.node.bases:
        ref = dotted(cls.file, base)
        if isinstance(ref, ClassRef):
            if ref != cls:
                _descend(ref, order, depth + 1)
        elif isinstance(ref, Known):
            order.append(ref)
        else:
            name = ref.name if isinstance(ref, External) else _written(base)
            order.append(External(name))


def _written(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_written(node.value)}.{node.attr}"
    return _written(node.value) if isinstance(node, ast.Subscript) else "?"


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of `body`, those below `if`, `try` and `with` in their place."""
    flat: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            flat += _flat(statement.body)
            if not isinstance(statement, ast.With):
                for handler in getattr(statement, "handlers", ()):
                    flat += _flat(handler.body)
                flat += _flat(statement.orelse)
        else:
            flat.append(statement)
    return flat


def _collect(body: list[ast.stmt], names: dict[str, list[_Binding]], stars: list[Import]) -> None:
    for statement in _flat(body):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.setdefault(statement.name, []).insert(0, statement)  # the last definition is the one that counts
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for name, binding in imported(statement).items():
                names.setdefault(name, []).append(binding)
            if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
                stars.append(Import(statement.module or "", statement.level, None))
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, []).append(statement.value)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            names.setdefault(statement.target.id, []).append(statement.value)


def _collect_classes(body: list[ast.stmt], prefix: str, classes: dict[str, ast.ClassDef]) -> None:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            classes[prefix + statement.name] = statement
            _collect_classes(statement.body, f"{prefix}{statement.name}.", classes)
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _collect_classes(statement.body, f"{prefix}{statement.name}.<locals>.", classes)
        else:
            for part in ("body", "orelse", "finalbody", "handlers"):
                for child in getattr(statement, part, ()):
                    _collect_classes([child] if isinstance(child, ast.stmt) else child.body, prefix, classes)
