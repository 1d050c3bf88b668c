"""The house in order: imports go one way, public names are documented and stay."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import rezero_convert as rz

PACKAGE = Path(rz.__file__).parent
LAYERS = ("capture", "detect", "rewrite", "validation", "api", "cli")
"""From the bottom up; what stands between them may be imported by those above."""
PUBLIC = {
    "AlphaTracker",
    "ConversionError",
    "Isometry",
    "NoEffectWarning",
    "Options",
    "Plan",
    "Race",
    "ReZeroPass",
    "Reading",
    "Report",
    "Run",
    "SourceResult",
    "StateAccount",
    "Validation",
    "alphas",
    "audit",
    "audit_source",
    "convert",
    "convert_source",
    "draw",
    "fold",
    "from_pretrained",
    "grow",
    "isometry",
    "load_original_state_dict",
    "original_state_dict",
    "page",
    "param_groups",
    "race",
    "tensorboard",
    "trace",
    "unconvert",
    "validate",
}


def module_of(file: Path) -> str:
    parts = [PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, at the top or inside functions; for types only does not count."""
    name = module_of(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    known = set(FILES)
    found = set()
    tree = ast.parse(file.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unused = {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in unused:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in known else ".".join(base))
    return found


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
GRAPH = {name: imports(file) for name, file in FILES.items()}


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        for name in GRAPH[stack.pop()]:
            if name not in seen:
                seen.add(name)
                stack.append(name)
    return seen


def test_all_imports_are_of_files_that_exist() -> None:
    assert all(name in GRAPH for names in GRAPH.values() for name in names)
    assert sum(map(len, GRAPH.values())) > len(GRAPH)


def test_no_module_imports_itself_by_others() -> None:
    assert [name for name in GRAPH if name in reachable(name)] == []


@pytest.mark.parametrize(("low", "high"), [(a, b) for i, a in enumerate(LAYERS) for b in LAYERS[i + 1 :]])
def test_layers_import_downwards_only(low: str, high: str) -> None:
    def belongs(name: str, layer: str) -> bool:
        return f"{name}.".startswith(f"{PACKAGE.name}.{layer}.")

    upwards = {name: other for name in GRAPH if belongs(name, low) for other in reachable(name) if belongs(other, high)}
    assert not upwards


def test_the_public_names_are_these() -> None:
    assert set(rz.__all__) == PUBLIC
    assert len(rz.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name: str) -> None:
    text = inspect.getdoc(getattr(rz, name))
    assert text
    assert text != inspect.getdoc(object)
    assert not text.startswith(f"{name}(")  # what dataclasses write by themselves


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if name[0].islower()))
def test_every_argument_is_documented(name: str) -> None:
    function = getattr(rz, name)
    text = inspect.getdoc(function) or ""
    assert [argument for argument in inspect.signature(function).parameters if argument not in text] == []
