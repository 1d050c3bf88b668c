"""Start values of the gates that a model has already, and of the LayerScales beside new ones."""

from __future__ import annotations

import ast

from .. import sources
from ..capture import static_names
from ..errors import ConversionError
from .classes import (
    Names,
    attribute_chain,
    constructor_calls,
    descendants,
    find_class,
    init_calls,
    last_name,
    lineage,
    makers,
    method_of,
    methods_of,
    resolve,
    self_name,
)
from .splice import Edit, Source, parse, statements


def existing_edits(source: Source, cls: ast.ClassDef, path: str, init: float, names: Names) -> list[Edit]:
    parts = path.split(".")
    if len(parts) > 1:
        return _held_edits(source, cls, parts, init, names)
    edits, found = _value_edits(source, cls, parts[0], init, names)
    if not found:
        raise ConversionError(
            f"{source.file}:{cls.lineno}: the parameter {path} of {cls.name} is not made in this file"
        )
    return edits


def _value_edits(
    source: Source, cls: ast.ClassDef, attribute: str, init: float, names: Names
) -> tuple[list[Edit], bool]:
    """Edits that give a parameter of `self` another start value, and whether it was found."""
    made = makers(source, cls, attribute)
    family = lineage(source, cls) + descendants(source, cls)
    resets = [call for call in init_calls(source, family, attribute) if not call.rest]
    edits: list[Edit] = []
    found = False
    for item in made:
        for node in ast.walk(item.value):
            if isinstance(node, ast.Call) and last_name(node.func) == "Parameter":
                found = True
                edits += _initial(source, node, init, bool(resets), names)
    return edits + [refilled(source, reset.call, init, names) for reset in resets], found


def _initial(source: Source, call: ast.Call, init: float, reset: bool, names: Names) -> list[Edit]:
    value = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "data"), None)
    if value is None:
        raise ConversionError(f"{source.file}:{call.lineno}: no start value in {source.segment(call)}")
    filled = _filled(value)
    start, end = source.span(value)
    if filled is None:
        like = f"zeros_like({source.segment(value)})" if not init else f"full_like({source.segment(value)}, {init!r})"
        return [Edit(start, end, f"{names.torch}.{like}")]
    tail = last_name(filled.func)
    if tail.startswith("empty") and reset:
        return []
    if filled is value and (tail.removesuffix("_like"), init) in (("zeros", 0.0), ("ones", 1.0)):
        return []
    prefix = source.segment(filled.func)[: -len(tail)]
    suffix = "_like" if tail.endswith("_like") else ""
    plain = [a for index, a in enumerate(filled.args) if not (tail.startswith("full") and index == 1)]
    arguments = [source.segment(a) for a in plain]
    arguments += [source.text[slice(*source.span(k))] for k in filled.keywords if k.arg != "fill_value"]
    word = f"{prefix}{'zeros' if not init else 'ones'}{suffix}({', '.join(arguments)})"
    return [Edit(start, end, word if init in (0.0, 1.0) else f"{init!r} * {word}")]


def _filled(value: ast.expr) -> ast.Call | None:
    """The `torch.ones(...)` in `c * torch.ones(...)`, `torch.full(...)`, `torch.ones(...).mul_(c)`."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
        return _filled(value.right) or _filled(value.left)
    if not isinstance(value, ast.Call):
        return None
    if last_name(value.func).removesuffix("_like") in ("ones", "zeros", "full", "empty"):
        return value
    if isinstance(value.func, ast.Attribute) and value.func.attr in ("mul", "mul_", "fill_"):
        return _filled(value.func.value)
    return None


def refilled(source: Source, call: ast.Call, init: float, names: Names) -> Edit:
    """An initializing call that fills with `init` instead."""
    tail = last_name(call.func)
    start, end = source.span(call)
    word = "zeros_" if not init else "ones_" if init == 1 else "constant_"
    more = "" if init in (0.0, 1.0) else f", {init!r}"
    if tail == "fill_" and call.args:
        return Edit(*source.span(call.args[0]), repr(init))
    if tail == "constant_":
        old = call.args[1] if len(call.args) > 1 else next((k.value for k in call.keywords if k.arg == "val"), None)
        if old is not None:
            return Edit(*source.span(old), repr(init))
    if isinstance(call.func, ast.Attribute) and call.args and attribute_chain(call.args[0]) is not None:
        return Edit(start, end, f"{source.segment(call.func.value)}.{word}({source.segment(call.args[0])}{more})")
    given = bool(call.args) and not isinstance(call.args[0], ast.Constant)
    target = source.segment(call.args[0]) if given else source.segment(call.func).rpartition(".")[0]
    return Edit(start, end, f"{names.nn}.init.{word}({target}{more})")


def _held_edits(source: Source, cls: ast.ClassDef, parts: list[str], init: float, names: Names) -> list[Edit]:
    """Sets the gate inside a module (LayerScale): at its construction if that says the value, else in its class."""
    edits: list[Edit] = []
    found = False
    if "*" in parts and not _is_only_walked(source, cls, parts[0]):
        raise ConversionError(
            f"{source.file}:{cls.lineno}: {'.'.join(parts)} of {cls.name} are the gates of a loop, and {parts[0]} is "
            "not only walked from end to end"
        )
    if parts[1:] == ["*"]:  # an nn.ParameterList
        edits, found = _value_edits(source, cls, parts[0], init, names)
        if found:
            return edits
    for _, value, _ in resolve(source, cls, parts[:-1]):
        for call in constructor_calls(value):
            if last_name(call.func) == "Identity":
                continue
            found = True
            home, scale = _class_of(source, call)
            edit = _argument_edit(source, call, home, scale, parts[-1], init) if scale is not None else None
            if edit is not None:
                edits.append(edit)
                continue
            if scale is None or home is not source:
                raise ConversionError(
                    f"{source.file}:{call.lineno}: {source.segment(call)} has no argument that sets the start value of "
                    f"{'.'.join(parts)}"
                )
            changed, known = _value_edits(source, scale, parts[-1], init, names)
            if not known:
                raise ConversionError(f"{source.file}:{scale.lineno}: {scale.name} does not make {parts[-1]}")
            edits += changed
    if not found:
        raise ConversionError(
            f"{source.file}:{cls.lineno}: the gate {'.'.join(parts)} of {cls.name} is not made in this file"
        )
    return edits


def _is_only_walked(source: Source, cls: ast.ClassDef, attribute: str) -> bool:
    """Whether a class does nothing else with a list, once made, than walk it as a whole, or index it in one place."""
    nodes: list[ast.AST] = []
    uses: list[ast.AST] = []
    for function in (function for one in lineage(source, cls) for function in methods_of(one)):
        inner = list(ast.walk(function)) if function.name != "__init__" else []
        uses += [node for node in inner if attribute_chain(node) == (self_name(function), attribute)]
        nodes += inner
    walks = [node.iter for node in nodes if isinstance(node, (ast.For, ast.comprehension))]
    for walk in walks:
        if isinstance(walk, ast.Call) and last_name(walk.func) in ("zip", "enumerate", "reversed", "list", "tuple"):
            walks += walk.args
    if all(use in walks for use in uses):
        return True
    return len(uses) == 1 and any(isinstance(node, ast.Subscript) and node.value is uses[0] for node in nodes)


def _class_of(source: Source, call: ast.Call) -> tuple[Source, ast.ClassDef | None]:
    """The class that a call makes an instance of, and the text that defines it: the file's or an imported one's."""
    own = find_class(source, last_name(call.func))
    found = static_names.dotted(source.file, call.func) if own is None else None
    if not isinstance(found, static_names.ClassRef):
        return source, own
    home = parse(sources.text(found.file), found.file)
    return home, find_class(home, found.node.name)


def _argument_edit(
    source: Source, call: ast.Call, home: Source, scale: ast.ClassDef, attribute: str, init: float
) -> Edit | None:
    """The constructor argument that is the gate's start value, set; None if there is none.

    Args:
        source: holds the call.
        home: holds the class.
    """
    name = _start_argument(home, scale, attribute)
    function = method_of(scale, "__init__")
    if name is None or function is None:
        return None
    for keyword in call.keywords:
        if keyword.arg == name:
            return Edit(*source.span(keyword.value), repr(init))
    order = [a.arg for a in (*function.args.posonlyargs, *function.args.args)][1:]
    if name in order and order.index(name) < len(call.args):
        return Edit(*source.span(call.args[order.index(name)]), repr(init))
    if None in _given(call):  # it may be among `**options`
        return None
    end = source.span(call)[1] - 1
    comma = source.text[:end].rstrip()[-1]
    return Edit(
        end, end, f"{name}={init!r}" if comma == "(" else f" {name}={init!r}" if comma == "," else f", {name}={init!r}"
    )


def _given(call: ast.Call) -> set[str | None]:
    return {keyword.arg for keyword in call.keywords}


def _start_argument(source: Source, scale: ast.ClassDef, attribute: str) -> str | None:
    """The argument of `__init__` that multiplies or fills a parameter at the start."""
    function = method_of(scale, "__init__")
    if function is None:
        return None
    names = {a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
    factors: list[ast.expr] = []
    for made in makers(source, scale, attribute):
        for node in ast.walk(made.value):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                factors += [node.left, node.right]
            elif isinstance(node, ast.Call) and last_name(node.func) in ("full", "full_like", "mul", "mul_", "fill_"):
                factors += [*node.args[-1:], *(k.value for k in node.keywords if k.arg == "fill_value")]
    for reset in init_calls(source, lineage(source, scale), attribute):
        if not reset.rest:
            factors += [*reset.call.args[-1:], *(k.value for k in reset.call.keywords if k.arg == "val")]
    for factor in factors:
        chain = attribute_chain(factor)
        if chain is not None and len(chain) == 2 and chain[0] == self_name(function):
            held = makers(source, scale, chain[1])
            chain = attribute_chain(held[0].value) if len(held) == 1 else None
        if chain is not None and len(chain) == 1 and chain[0] in names:
            return chain[0]
    return None


def arm_edits(source: Source, cls: ast.ClassDef, attribute: str, names: Names) -> list[Edit]:
    """A LayerScale that is made under a condition starts at 1, now that its branch has an alpha."""
    edits: list[Edit] = []
    made = makers(source, cls, attribute)
    arms = [call for item in made for call in constructor_calls(item.value)]
    if not any(last_name(call.func) == "Identity" for call in arms) and not any(
        isinstance(m.value, ast.IfExp) for m in made
    ):
        return []
    for call in arms:
        home, scale = _class_of(source, call)
        parameters = [] if scale is None else _own_parameters(scale)
        if scale is not None and len(parameters) == 1:
            edit = _argument_edit(source, call, home, scale, parameters[0], 1.0)
            if edit is not None:
                edits.append(edit)
            elif home is source:
                edits += _value_edits(source, scale, parameters[0], 1.0, names)[0]
    return edits


def _own_parameters(cls: ast.ClassDef) -> list[str]:
    found = []
    for function in methods_of(cls):
        for stmt in statements(function.body):
            if isinstance(stmt, ast.Assign) and any(
                isinstance(n, ast.Call) and last_name(n.func) == "Parameter" for n in ast.walk(stmt.value)
            ):
                chains = [attribute_chain(target) for target in stmt.targets]
                found += [chain[1] for chain in chains if chain is not None and len(chain) == 2]
    return list(dict.fromkeys(found))
