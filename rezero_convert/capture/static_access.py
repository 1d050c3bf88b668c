"""Attributes, elements and targets in static capture: reading from abstract values and binding them."""

from __future__ import annotations

import ast
import operator
from functools import singledispatch
from typing import Any

import torch
from torch import fx

from . import static_builtins as builtins
from .facts import Facts
from .static_builtins import child
from .static_core import Arguments, apply, evaluate, of_target
from .static_exact import known_of_tensor
from .static_modules import (
    attributes,
    inline,
    seen,
)
from .static_names import (
    ClassRef,
    ExpressionRef,
    External,
    FileRef,
    FunctionRef,
    Known,
    Method,
    class_attribute,
    member,
    members,
    method,
    torch_base,
)
from .static_values import (
    DATA,
    UNKNOWN,
    UNKNOWN_MODULE,
    Attribute,
    BaseCall,
    Bound,
    Const,
    Either,
    Instance,
    Module,
    Object,
    Scope,
    State,
    Table,
    Tup,
    Value,
    emit,
    is_absent,
    is_callable,
    join_all,
    plain,
)


@singledispatch
def iterate(value: Value, scope: Scope, at: ast.expr) -> Tup:
    """What a loop over a value meets."""
    if isinstance(value, Tup):
        return value
    if isinstance(value, (Instance, Module)):
        module = value.module if isinstance(value, Instance) else value
        path = value.path if isinstance(value, Instance) else ""
        if module.cls is not None:
            attributes(module)
        items = builtins.items_of(module)
        if items:
            stored = [item for _, item in items]
            if builtins.same_kind(stored):
                return Tup((seen(stored[0], child(path, "*"), at, scope),), False)
            each = tuple(seen(item, child(path, name), at, scope) for name, item in items[: scope.state.limits.unroll])
            return Tup(each, all(name != "*" for name, _ in items))
        if scope.live and isinstance(value, Instance):
            return Tup((Instance(child(path, "*"), UNKNOWN_MODULE),), False)
    if isinstance(value, Table):
        return Tup(tuple(Const(key) for key in value.items))
    if isinstance(value, fx.Node):
        return Tup((getitem(value, None, at, scope),), False)
    if isinstance(value, Object):
        present = tuple(item for item in (*value.args, *value.fields.values()) if not is_absent(item))
        return Tup(present) if present else Tup((UNKNOWN,), False)
    return Tup((DATA if value == DATA else UNKNOWN,), False)


def _element(value: Instance | Module, key: Value, at: ast.expr, scope: Scope) -> Value:
    module = value.module if isinstance(value, Instance) else value
    path = value.path if isinstance(value, Instance) else ""
    if module.cls is not None:
        attributes(module)
    items = builtins.items_of(module)
    if items is None:
        return Instance(child(path, "*"), UNKNOWN_MODULE) if scope.live and isinstance(value, Instance) else UNKNOWN
    if isinstance(key, Object) and key.name == "slice":
        return value
    if isinstance(key, Const) and isinstance(key.value, (int, str)):
        wanted = str(key.value)
        if isinstance(key.value, int) and key.value < 0:
            wanted = items[key.value][0] if -len(items) <= key.value else "*"
        for name, item in items:
            if name == wanted:
                return seen(item, child(path, name), at, scope)
        if items and isinstance(key.value, int):
            return seen(items[-1][1], child(path, wanted), at, scope)
    if not items:
        return Instance(child(path, "*"), UNKNOWN_MODULE) if scope.live else UNKNOWN
    elements = iterate(value, scope, at)
    return elements.items[0] if len(elements.items) == 1 else _either(elements.items, scope, at)


def _either(items: tuple[Value, ...], scope: Scope, at: ast.expr) -> Value:
    return Either(items[:4]) if all(is_callable(item) for item in items) else join_all(items[:4], scope, at)


def getitem(value: fx.Node, key: Any, at: ast.expr, scope: Scope) -> Value:
    if not scope.live:
        return UNKNOWN
    return emit(scope, "call_function", operator.getitem, (value, key), {}, of_target(operator.getitem), at)


@singledispatch
def attribute(value: Value, name: str, at: ast.expr, scope: Scope) -> Value:
    """`value.name`."""
    if isinstance(value, fx.Node):
        return _of_tensor(value, name, at, scope)
    if isinstance(value, Instance):
        return _of_instance(value, name, at, scope)
    if isinstance(value, BaseCall):
        return _of_base(value, name)
    if isinstance(value, (Known, FileRef)):
        found = member(value, name)
        if isinstance(found, ExpressionRef):
            return top_level(found, scope)
        return found if found is not None else UNKNOWN
    if isinstance(value, External):
        return External(f"{value.name}.{name}")
    if isinstance(value, ClassRef):
        return _of_class(value, name, scope)
    if isinstance(value, Object):
        return value.fields.get(name) or Attribute(value, name)
    if isinstance(value, (Tup, Table, Module)):
        return Attribute(value, name)
    if isinstance(value, Either):
        return join_all((attribute(option, name, at, scope) for option in value.options), scope, at)
    return UNKNOWN if value == UNKNOWN else DATA


def _of_tensor(value: fx.Node, name: str, at: ast.expr, scope: Scope) -> Value:
    if name in builtins.PLAIN_ATTRIBUTES:
        return known_of_tensor(value, name) if scope.state.exact else DATA
    if name in ("T", "mT", "H", "mH", "real", "imag", "data"):
        return emit(scope, "call_function", getattr, (value, name), {}, Facts("layout", name), at)
    if hasattr(torch.Tensor, name):
        return Attribute(value, name)
    return emit(scope, "call_function", getattr, (value, name), {}, Facts("layout", "getattr"), at)


def _of_class(cls: ClassRef, name: str, scope: Scope) -> Value:
    found = method(cls, name)
    if isinstance(found, Method):
        return FunctionRef(found.cls.file, f"{found.cls.qualname}.{name}", found.node)
    assigned = class_attribute(cls, name)
    if assigned is not None:
        return evaluate(assigned[1], Scope(State(None), assigned[0].file, {}, None, helpers=scope.helpers + 1))
    inner = members(cls).get(name)
    if isinstance(inner, ast.ClassDef):
        return ClassRef(cls.file, f"{cls.qualname}.{name}", inner)
    return External(f"{cls.name}.{name}")


def _of_base(value: BaseCall, name: str) -> Value:
    cls = value.instance.module.cls
    found = method(cls, name, after=value.after) if cls is not None else None
    if isinstance(found, Method):
        return Bound(value.instance, found)
    return Attribute(value, name)


def _of_instance(value: Instance, name: str, at: ast.expr, scope: Scope) -> Value:
    own = value == scope.instance
    if own and "self." + name in scope.env:
        return seen(scope.env["self." + name], child(value.path, name), at, scope)
    module = value.module
    if module.cls is not None:
        stored = attributes(module).get(name) if scope.live or not own else None
        if stored is not None:
            return seen(stored, child(value.path, name), at, scope)
        written = _of_written_class(value, module.cls, name, at, scope)
        if written is not None:
            return written
    for key, element in builtins.items_of(module) or ():
        if key == name:
            return seen(element, child(value.path, name), at, scope)
    base = module.torch or (torch_base(module.cls) if module.cls is not None else None)
    parameter = builtins.torch_attribute(module, base, name)
    if parameter is not None:
        return seen(parameter, child(value.path, name), at, scope)
    if base is not None and hasattr(base, name):
        return Attribute(value, name)
    if name == "training":
        return DATA
    if builtins.is_module_method(name) or name in ("__call__", "items", "values", "keys", "children", "forward"):
        return Attribute(value, name)
    if module.role == "leaf":
        return DATA
    return Instance(child(value.path, name), UNKNOWN_MODULE) if scope.live else UNKNOWN


def _of_written_class(value: Instance, cls: ClassRef, name: str, at: ast.expr, scope: Scope) -> Value | None:
    """A method, property or class attribute that a class in a file provides."""
    found = method(cls, name)
    if isinstance(found, Method):
        if "property" in found.decorators or "cached_property" in found.decorators:
            return inline(Bound(value, found), Arguments(), at, scope)
        if "staticmethod" in found.decorators:
            return FunctionRef(found.cls.file, f"{found.cls.qualname}.{name}", found.node)
        return Bound(value, found)
    assigned = class_attribute(cls, name)
    if assigned is None:
        return None
    made = evaluate(assigned[1], Scope(State(None), assigned[0].file, {}, None, helpers=scope.helpers + 1))
    return made if is_callable(made) or isinstance(made, Const) else DATA


def top_level(ref: ExpressionRef, scope: Scope) -> Value:
    """The value of a name assigned at the top of a file."""
    if scope.helpers > scope.state.limits.helpers + 2:
        return UNKNOWN
    return evaluate(ref.node, Scope(State(None), ref.file, {}, None, helpers=scope.helpers + 1))


@singledispatch
def subscript(value: Value, key: Value, at: ast.expr, scope: Scope) -> Value:
    """`value[key]`."""
    if isinstance(value, fx.Node):
        return getitem(value, written(key) if scope.state.exact else plain(key), at, scope)
    if isinstance(value, Tup):
        if isinstance(key, Const) and isinstance(key.value, int):
            position = key.value
            if -len(value.items) <= position < len(value.items):
                return value.items[position]
            return value.items[-1] if value.items and not value.exact else UNKNOWN
        if isinstance(key, Object) and key.name == "slice":
            return _sliced(value, key)
        return join_all(value.items[:4], scope, at)
    if isinstance(value, (Instance, Module)):
        return _element(value, key, at, scope)
    if isinstance(value, Object):
        table = builtins.table_of(value)
        if table is None:
            present = [item for item in (*value.args, *value.fields.values()) if not is_absent(item)]
            if isinstance(key, Const) and isinstance(key.value, str):
                return value.fields.get(key.value, UNKNOWN)
            if isinstance(key, Const) and isinstance(key.value, int) and -len(present) <= key.value < len(present):
                return present[key.value]
            return Tup(tuple(present)) if isinstance(key, Object) else UNKNOWN
        return _from_table(table, key, scope, at, made=True)
    if isinstance(value, Table):
        return _from_table(value, key, scope, at, made=False)
    return UNKNOWN if value == UNKNOWN else DATA


def written(key: Value) -> Any:
    """An index as it is written, slices included."""
    if isinstance(key, Object) and key.name == "slice":
        return slice(*(plain(part) for part in key.args))
    return tuple(written(item) for item in key.items) if isinstance(key, Tup) else plain(key)


def _from_table(table: Table, key: Value, scope: Scope, at: ast.expr, made: bool) -> Value:
    """An entry of a table of classes; `made`: the table hands out instances."""
    rest = table.items.get("*")
    if scope.state.exact and isinstance(rest, fx.Node) and isinstance(key, Const) and key.value not in table.items:
        return getitem(rest, plain(key), at, scope)
    if isinstance(key, Const) and isinstance(key.value, str) and key.value in table.items:
        entry = table.items[key.value]
        return apply(entry, Arguments(), at, scope) if made and not isinstance(entry, Tup) else entry
    if made:
        kind = builtins.table_facts(table)
        return Module("opaque", kind) if kind is not None else UNKNOWN
    return join_all(list(table.items.values())[:6], scope, at)


def _sliced(value: Tup, key: Object) -> Value:
    bounds = [item.value if isinstance(item, Const) else 0 for item in key.args]
    known = all(isinstance(item, Const) for item in key.args) and value.exact
    if known and all(bound is None or isinstance(bound, int) for bound in bounds) and bounds[2] != 0:
        return Tup(value.items[slice(*bounds)], True, value.builtin)
    return Tup(value.items, False, value.builtin)


def assign(target: ast.expr, value: Value, scope: Scope) -> None:
    """Bind a target: a name, an attribute of `self`, a tuple, a place in a container."""
    if isinstance(target, ast.Name):
        scope.env[target.id] = value
    elif isinstance(target, (ast.Tuple, ast.List)):
        _unpack(target.elts, value, scope)
    elif isinstance(target, ast.Starred):
        assign(target.value, value, scope)
    elif isinstance(target, ast.Attribute):
        if isinstance(target.value, ast.Name) and isinstance(scope.env.get(target.value.id), Instance):
            if scope.env[target.value.id] == scope.instance:
                scope.env["self." + target.attr] = value
        elif scope.live:
            evaluate(target.value, scope)
    elif isinstance(target, ast.Subscript):
        container = evaluate(target.value, scope)
        key = evaluate(target.slice, scope)
        if isinstance(container, fx.Node):
            if isinstance(value, fx.Node) and scope.live:  # x[mask] = y: the tensor now depends on both
                made = emit(
                    scope,
                    "call_function",
                    operator.setitem,
                    (container, None, value),
                    {},
                    of_target(operator.setitem),
                    target,
                )
                assign(target.value, made, scope)
        else:
            changed = builtins.with_item(container, key, value, scope)
            if changed is not None:
                assign(target.value, changed, scope)


def _unpack(targets: list[ast.expr], value: Value, scope: Scope) -> None:
    if isinstance(value, fx.Node):
        star = any(isinstance(target, ast.Starred) for target in targets)
        for i, target in enumerate(targets):
            assign(target, getitem(value, None if star else i, target, scope), scope)
        return
    elements = iterate(value, scope, targets[0]) if targets else Tup(())
    items = elements.items
    stars = [i for i, target in enumerate(targets) if isinstance(target, ast.Starred)]
    for i, target in enumerate(targets):
        if not items:
            assign(target, UNKNOWN, scope)
        elif stars and i == stars[0]:
            assign(target, Tup(items[i : len(items) - (len(targets) - i - 1)], elements.exact, list), scope)
        elif stars and i > stars[0]:
            assign(target, items[max(i - len(targets), -len(items))], scope)
        elif i < len(items):
            assign(target, items[i], scope)
        else:
            assign(target, items[-1] if not elements.exact else UNKNOWN, scope)
