"""What torch's own classes, Python's builtins and containers do with abstract values."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import torch
from torch import nn

from .. import sources
from . import facts
from .facts import Facts
from .static_names import ClassRef, Known, is_module
from .static_values import (
    DATA,
    ELEMENTS,
    UNKNOWN,
    Const,
    Instance,
    Module,
    Object,
    Scope,
    Table,
    Tup,
    Unknown,
    Value,
    emit,
    join_all,
)

FACTORIES = frozenset(
    "zeros ones empty full arange rand randn randint randperm tensor as_tensor linspace logspace eye meshgrid "
    "from_numpy complex bernoulli scalar_tensor".split()
)
PLAIN_FUNCTIONS = frozenset(
    "is_tensor numel is_floating_point is_complex finfo iinfo result_type _assert is_nonzero promote_types "
    "can_cast get_default_dtype device Size is_grad_enabled set_grad_enabled autocast _check _check_is_size".split()
)
PLAIN_METHODS = frozenset(
    "size dim numel stride item tolist is_contiguous get_device element_size ndimension data_ptr nelement "
    "numpy is_floating_point is_complex storage_offset backward requires_grad_ retain_grad register_hook".split()
)
PLAIN_ATTRIBUTES = frozenset(
    "shape dtype device ndim requires_grad is_cuda layout names grad grad_fn is_sparse is_nested itemsize "
    "is_quantized is_mps is_meta".split()
)
PLAIN_BUILTINS = frozenset(
    "len isinstance issubclass hasattr callable int float bool str repr print id type ord chr round abs hash "
    "range divmod pow all any format bin hex open vars dir setattr delattr object Exception ValueError "
    "TypeError RuntimeError NotImplementedError AssertionError KeyError IndexError ImportError AttributeError".split()
)
BUILTINS = PLAIN_BUILTINS | frozenset(
    "zip enumerate reversed list tuple dict set frozenset sum getattr super map filter sorted min max iter "
    "next slice staticmethod property classmethod".split()
)
_MODULE_METHODS = frozenset(
    "to eval train cuda cpu half float bfloat16 double requires_grad_ apply type to_empty compile fuse".split()
)
_WRAPPERS = frozenset(
    "weight_norm spectral_norm remove_weight_norm deepcopy copy skip_init script checkpoint_wrapper "
    "parametrizations orthogonal compile".split()
)
_PARAMETERS = frozenset("weight bias in_proj_weight in_proj_bias q_proj_weight k_proj_weight v_proj_weight".split())
_BUFFERS = frozenset("running_mean running_var num_batches_tracked".split())


def construct(cls: type, args: tuple[Value, ...], kwargs: dict[str, Value], scope: Scope, at: ast.Call | None) -> Value:
    """What calling a class of torch makes."""
    if issubclass(cls, (nn.Parameter, nn.UninitializedParameter)):
        return Module("parameter", Facts("parameter", "Parameter"), constructor=_first_argument(scope, at))
    if not issubclass(cls, nn.Module):
        return DATA
    own = facts.of_class(cls)
    if issubclass(cls, (nn.Sequential, nn.ModuleList, nn.ParameterList)):
        role = "sequential" if issubclass(cls, nn.Sequential) else "list"
        return Module("sequential" if role == "sequential" else "list", own, cls, elements=elements(args))
    if issubclass(cls, (nn.ModuleDict, nn.ParameterDict)):
        table = args[0] if args else Table({})
        items = table.items if isinstance(table, Table) else {"*": UNKNOWN}
        return Module("list", own, cls, elements=tuple((str(key), value) for key, value in items.items()))
    if not facts.is_leaf(cls):
        return Module("opaque", dataclasses.replace(own, weight=True), cls)
    inplace = kwargs.get("inplace")
    if isinstance(inplace, Const) and inplace.value is True:
        own = dataclasses.replace(own, inplace=True)
    written = sources.segment(sources.span_of(scope.file, at)) if at is not None else ""
    return Module("leaf", own, cls, args=args, kwargs=kwargs, constructor=written)


def elements(args: tuple[Value, ...]) -> tuple[tuple[str, Value], ...]:
    """Names and values of what a container module is made of, from its constructor's arguments.

    The name is "*" where one value stands for any number of elements.
    """
    if len(args) == 1 and isinstance(args[0], Table):
        return tuple((str(key), value) for key, value in args[0].items.items())
    exact = True
    values: tuple[Value, ...] = args
    if len(args) == 1 and isinstance(args[0], Tup):
        values, exact = args[0].items, args[0].exact
        pairs = [value for value in values if isinstance(value, Tup) and len(value.items) == 2]
        if pairs and len(pairs) == len(values) and all(isinstance(pair.items[0], Const) for pair in pairs):
            return tuple((str(plain_key(pair.items[0])), pair.items[1]) for pair in pairs)
    elif len(args) == 1 and isinstance(args[0], Module) and args[0].elements:
        return args[0].elements
    elif len(args) == 1 and isinstance(args[0], (Unknown,)):
        return (("*", UNKNOWN),)
    last = len(values) - 1
    return tuple((str(i) if exact or i < last else "*", value) for i, value in enumerate(values))


def plain_key(value: Value) -> Any:
    return value.value if isinstance(value, Const) else "*"


def items_of(module: Module) -> tuple[tuple[str, Value], ...] | None:
    """Elements of a container module, None for other modules."""
    if module.role in ("sequential", "list"):
        return module.elements
    if ELEMENTS in module.attributes:
        stored = module.attributes[ELEMENTS]
        if isinstance(stored, Table):  # by name
            return tuple(stored.items.items())
        return elements((stored,)) if isinstance(stored, Tup) else None
    return None


def same_kind(values: list[Value]) -> bool:
    """Whether elements are so alike that one may stand for all."""
    kinds = {
        (value.role, value.torch, value.cls) if isinstance(value, Module) else (type(value).__name__, None, None)
        for value in values
    }
    return len(kinds) == 1


def torch_attribute(module: Module, base: type[nn.Module] | None, name: str) -> Module | None:
    """A parameter or buffer that torch's own class makes."""
    if base is None or base is nn.Module:
        return None
    if name in _PARAMETERS and module.facts.kind in ("linear", "norm", "embedding", "attention", "activation"):
        constructor = "torch.zeros" if module.facts.kind == "norm" and name == "bias" else ""
        if module.facts.kind == "norm" and name == "weight":
            constructor = "torch.ones"
        return Module("parameter", Facts("parameter", "Parameter"), constructor=constructor)
    if name in _BUFFERS and module.facts.norm == "batch":
        return Module("buffer", Facts("parameter", "buffer"))
    return None


def container_method(value: Value, name: str, args: tuple[Value, ...], scope: Scope, at: ast.expr) -> Value | None:
    """The result of a method of a list, dictionary or plain object; None if it is not one we know."""
    if isinstance(value, Tup):
        if name in ("copy", "__iter__"):
            return value
        if name == "pop":
            if value.items or not scope.loops or not scope.live:
                return value.items[-1] if value.items else UNKNOWN
            return emit(scope, "get_attr", "_popped", (), {}, Facts("unseen", "list"), at)  # filled in other passes
        return DATA if name in ("index", "count") else None
    if isinstance(value, Table):
        if name == "items":
            return Tup(tuple(Tup((Const(key), item)) for key, item in value.items.items()))
        if name == "values":
            return Tup(tuple(value.items.values()))
        if name == "keys":
            return Tup(tuple(Const(key) for key in value.items))
        if name in ("get", "pop", "setdefault"):
            key = args[0] if args else UNKNOWN
            if isinstance(key, Const) and _hashable(key.value) and key.value in value.items:
                return value.items[key.value]
            if isinstance(key, Const):
                return args[1] if len(args) > 1 else Const(None)
            return join_all(value.items.values(), scope, at)
        return value if name == "copy" else None
    return None


def grown(value: Value, name: str, args: tuple[Value, ...], scope: Scope) -> Value | None:
    """A list, dictionary or container module after a method that adds elements; None for other methods."""
    if isinstance(value, Tup) and args:
        return _grown_list(value, name, args, scope)
    if isinstance(value, Module) and value.role in ("sequential", "list"):
        if name == "append" and args:
            return _add_element(value, str(len(value.elements)) if not scope.loops else "*", args[0])
        if name == "extend" and args:
            return dataclasses.replace(value, elements=value.elements + elements(args[:1]))
        if name in ("add_module", "register_module") and len(args) > 1:
            key = str(args[0].value) if isinstance(args[0], Const) else "*"
            return _add_element(value, key, args[1])
        if name == "update" and args and isinstance(args[0], Table):
            added_items = tuple((str(key), item) for key, item in args[0].items.items())
            return dataclasses.replace(value, elements=value.elements + added_items)
    if isinstance(value, Table) and name == "update" and args and isinstance(args[0], Table):
        return Table({**value.items, **args[0].items})
    return None


def _grown_list(value: Tup, name: str, args: tuple[Value, ...], scope: Scope) -> Value | None:
    once = scope.loops == 0
    if name == "append":
        return extend(value, Tup(args[:1], once), scope)
    if name == "insert" and len(args) > 1:
        return Tup((args[1], *value.items), value.exact, value.builtin)
    if name == "extend":
        other = args[0] if isinstance(args[0], Tup) else Tup((UNKNOWN,), False)
        return extend(value, Tup(other.items, once and other.exact), scope)
    return None


def with_item(value: Value, key: Value, item: Value, scope: Scope) -> Value | None:
    """A container after `container[key] = item`."""
    if isinstance(value, Table):
        name = key.value if isinstance(key, Const) and _hashable(key.value) else "*"
        return Table({**value.items, name: item})
    if isinstance(value, Module) and value.role == "list":
        return _add_element(value, str(plain_key(key)), item)
    if isinstance(value, Tup):
        if isinstance(key, Const) and isinstance(key.value, int) and -len(value.items) <= key.value < len(value.items):
            items = list(value.items)
            items[key.value] = item
            return Tup(tuple(items), value.exact, value.builtin)
        return extend(value, Tup((item,), False), scope)
    return None


def extend(a: Tup, b: Tup, scope: Scope) -> Tup:
    """`a + b`."""
    items, limit = a.items + b.items, scope.state.limits.elements
    if len(items) > limit:
        return Tup(items[:limit], False, a.builtin)
    return Tup(items, a.exact and b.exact, a.builtin)


def is_module_method(name: str) -> bool:
    return name in _MODULE_METHODS


def wraps(target: Any) -> bool:
    """Whether a function returns the module it is given, or a copy: `weight_norm`, `deepcopy`."""
    return getattr(target, "__name__", "") in _WRAPPERS


def table_facts(table: Table) -> Facts | None:
    """Facts of an instance of one of a table's classes, if they are of one kind as far as they are torch's."""
    kinds = set()
    for value in table.items.values():
        entry = value.items[0] if isinstance(value, Tup) and value.items else value
        if isinstance(entry, Known) and isinstance(entry.obj, type) and issubclass(entry.obj, nn.Module):
            kinds.add(facts.of_class(entry.obj).kind)
        elif not (isinstance(entry, ClassRef) and is_module(entry)):
            return None
    kinds.discard("layout")  # an identity among activations
    if kinds == {"activation"}:
        return Facts("activation", "activation")
    return None


def table_of(value: Value) -> Table | None:
    """The dictionary behind a value: itself, or the one that a plain object was made from (`ClassInstantier(...)`)."""
    if isinstance(value, Table):
        return value
    if isinstance(value, Object):
        return next((arg for arg in value.args if isinstance(arg, Table)), None)
    return None


def tensor_attribute_value() -> Module:
    """A plain tensor held by a module."""
    return Module("buffer", Facts("parameter", "tensor"))


def child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attach(value: Value, path: str) -> Value:
    """A stored attribute or element as seen at its path. Parameters are left to the caller."""
    if isinstance(value, Module):
        return Instance(path, value)
    if isinstance(value, Tup):
        last = len(value.items) - 1
        items = (
            item if not isinstance(item, (Module, Tup)) else attach(item, child(path, _position(value, i, last)))
            for i, item in enumerate(value.items)
        )
        return Tup(tuple(items), value.exact, value.builtin)
    if isinstance(value, Table):
        return Table({key: attach(item, child(path, str(key))) for key, item in value.items.items()})
    return value


def is_torch_function(target: Any) -> bool:
    module = getattr(target, "__module__", None)
    if module is None:
        return isinstance(getattr(target, "__self__", None), (type(torch),)) or type(target).__name__.startswith(
            ("builtin", "method_descriptor")
        )
    return str(module).split(".")[0] in ("torch", "operator", "_operator")


def _position(value: Tup, i: int, last: int) -> str:
    return str(i) if value.exact or i < last else "*"


def _add_element(module: Module, key: str, value: Value) -> Module:
    kept = tuple(item for item in module.elements if item[0] != key or key == "*")
    return dataclasses.replace(module, elements=(*kept, (key, value)))


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None), bytes))


def _first_argument(scope: Scope, at: ast.Call | None) -> str:
    if at is None:
        return ""
    given = at.args[0] if at.args else next((kw.value for kw in at.keywords if kw.arg == "data"), None)
    return sources.segment(sources.span_of(scope.file, given)) if given is not None else ""
