"""Calls in static capture: of torch's functions, tensor methods, builtins, classes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
from typing import Any

import torch
from torch import fx, nn

from . import facts
from . import static_builtins as builtins
from .facts import Facts
from .static_access import assign, attribute, iterate, subscript
from .static_builtins import child
from .static_core import Arguments, apply, evaluate, of_target, opaque_result, unknown_call
from .static_exact import answer, builtin, changed, method_of_constant, plain_value
from .static_modules import (
    call_elements,
    call_module,
    class_facts,
    inline,
    leaf,
)
from .static_names import (
    ClassRef,
    External,
    Known,
    Method,
    is_module,
    method,
    torch_base,
)
from .static_values import (
    DATA,
    ELEMENTS,
    OPAQUE,
    UNKNOWN,
    UNKNOWN_MODULE,
    Attribute,
    BaseCall,
    Bound,
    Builtin,
    Const,
    Either,
    Instance,
    Module,
    Object,
    Partial,
    Scope,
    Table,
    Tup,
    Value,
    emit,
    is_callable,
    join_all,
    nodes_in,
    nodes_of,
    opaque,
    plain,
    rearrange,
)

_FUNCTION_OF_BUILTIN: dict[str, Any] = {"abs": torch.abs, "pow": torch.pow, "round": torch.round}


@evaluate.register
def _call(node: ast.Call, scope: Scope) -> Value:
    func = node.func
    if isinstance(func, ast.Name) and func.id == "super" and scope.instance is not None and scope.cls is not None:
        return BaseCall(scope.instance, scope.cls)
    if isinstance(func, ast.Attribute):
        base = evaluate(func.value, scope)
        arguments = _arguments(node, scope)
        return _call_attribute(base, func, arguments, node, scope)
    callee = evaluate(func, scope)
    return apply(callee, _arguments(node, scope), node, scope)


def _arguments(node: ast.Call, scope: Scope) -> Arguments:
    args: list[Value] = []
    kwargs: dict[str, Value] = {}
    more = False
    for arg in node.args:
        if isinstance(arg, ast.Starred):
            inner = evaluate(arg.value, scope)
            if isinstance(inner, (Tup, Instance, Module, fx.Node)):
                elements = iterate(inner, scope, arg)
                if not scope.live and not elements.exact:
                    args.append(elements)  # *layers of unknown number, for a container
                else:
                    args += elements.items
                more = more or not elements.exact
            else:
                more = True
        else:
            args.append(evaluate(arg, scope))
    for keyword in node.keywords:
        value = evaluate(keyword.value, scope)
        if keyword.arg is not None:
            kwargs[keyword.arg] = value
        elif isinstance(value, Table):
            kwargs.update({key: item for key, item in value.items.items() if isinstance(key, str) and key != "*"})
            more = more or "*" in value.items
        else:
            more = True
    return Arguments(tuple(args), kwargs, more)


def _call_attribute(base: Value, func: ast.Attribute, arguments: Arguments, at: ast.Call, scope: Scope) -> Value:
    """`base.name(...)`: methods that change their object rebind it; the rest as any call."""
    name = func.attr
    taken = changed(base, name, arguments.args) if scope.state.exact and isinstance(base, (Tup, Table)) else None
    if taken is not None:
        assign(func.value, taken[0], scope)
        return taken[1]
    grown = builtins.grown(base, name, arguments.args, scope)
    if grown is not None:
        assign(func.value, grown, scope)
        return Const(None)
    if scope.state.exact and isinstance(base, Const):
        return method_of_constant(base, name, arguments) or DATA
    if scope.state.exact and isinstance(base, fx.Node) and not hasattr(torch.Tensor, name):
        return _method_of_structure(base, name, arguments, at, scope)
    if isinstance(base, BaseCall) and name == "__init__":
        return _base_init(base, arguments, at, scope)
    registers = name in ("register_parameter", "register_buffer", "add_module", "register_module")
    if registers and isinstance(base, Instance) and base == scope.instance and not scope.live:
        return _register(name, arguments, scope)
    rest = base.items.get("*") if scope.state.exact and isinstance(base, Table) else None
    if isinstance(base, Table) and isinstance(rest, fx.Node) and name in ("get", "pop") and arguments.args:
        key = arguments.args[0]
        if not (isinstance(key, Const) and key.value in base.items):
            return _method_of_structure(rest, name, arguments, at, scope)
    if isinstance(base, Tup) and base.items and isinstance(base.items[0], fx.Node) and _is_of_tensors(name):
        return _call_attribute(base.items[0], func, arguments, at, scope)
    if isinstance(base, (Tup, Table)):
        result = builtins.container_method(base, name, arguments.args, scope, at)
        return result if result is not None else DATA
    if isinstance(base, Module):
        return base if builtins.is_module_method(name) else UNKNOWN
    return apply(attribute(base, name, func, scope), arguments, at, scope)


def _is_of_tensors(method: str) -> bool:
    """Whether tensors have a method and tuples do not: what has it is no tuple, where a function returns either."""
    return hasattr(torch.Tensor, method) and not hasattr(list, method) and not hasattr(tuple, method)


def _method_of_structure(base: fx.Node, name: str, arguments: Arguments, at: ast.Call, scope: Scope) -> Value:
    """A method of a value that is no tensor: of a dictionary of tensors among the inputs, say."""
    if name in ("get", "pop") and arguments.args:
        found = subscript(base, arguments.args[0], at, scope)
        if isinstance(found, fx.Node):
            found.meta["optional"] = True
        return found
    if name == "items":
        return Tup((Tup((DATA, subscript(base, DATA, at, scope))),), False)
    return apply(Attribute(base, name), arguments, at, scope)


def _base_init(base: BaseCall, arguments: Arguments, at: ast.Call, scope: Scope) -> Value:
    cls = base.instance.module.cls
    found = method(cls, "__init__", after=base.after) if cls is not None else None
    if isinstance(found, Method):
        return inline(Bound(base.instance, found), arguments, at, scope)
    if isinstance(found, Known) and issubclass(found.obj, (nn.Sequential, nn.ModuleList)) and arguments.args:
        value = arguments.args[0]
        if len(arguments.args) > 1 or not isinstance(value, Tup):
            value = Tup(arguments.args)
        scope.env[ELEMENTS] = value
    return Const(None)


def _register(name: str, arguments: Arguments, scope: Scope) -> Value:
    args = (*arguments.args, *arguments.kwargs.values())
    if len(args) > 1:
        if isinstance(args[0], Const) and isinstance(args[0].value, str):
            value = args[1]
            if name == "register_buffer":
                value = Module("buffer", Facts("parameter", "buffer"))
            scope.env["self." + args[0].value] = value
            named = scope.env.get(ELEMENTS, Table({}))
            if name in ("add_module", "register_module") and isinstance(named, Table):
                scope.env[ELEMENTS] = Table({**named.items, args[0].value: value})
        elif name in ("add_module", "register_module"):
            known = scope.env.get(ELEMENTS)
            items = known.items if isinstance(known, Tup) else ()
            scope.env[ELEMENTS] = Tup((*items, args[1]), False)
    return Const(None)


@apply.register
def _partial(callee: Partial, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    merged = Arguments(callee.args + arguments.args, {**callee.kwargs, **arguments.kwargs}, arguments.open)
    return apply(callee.callee, merged, at, scope)


@apply.register
def _either_call(callee: Either, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    return join_all([apply(option, arguments, at, scope) for option in callee.options], scope, at)


@apply.register
def _constant_call(callee: Const, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    return UNKNOWN if callee.value is None else unknown_call(arguments, at, scope)


@apply.register
def _known_call(callee: Known, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    return _call_known(callee.obj, arguments, at, scope)


@apply.register
def _builtin_call(callee: Builtin, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    return _call_builtin(callee.name, arguments, at, scope)


@apply.register
def _call_external(callee: External, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    package, _, name = callee.name.rpartition(".")
    if callee.name == "typing.cast" and len(arguments.args) > 1:
        return arguments.args[1]
    if name == "OrderedDict":
        if arguments.args and isinstance(arguments.args[0], Tup):
            return Table(dict(builtins.elements(arguments.args[:1])))
        return arguments.args[0] if arguments.args else Table({})
    if package.partition(".")[0] == "einops" and arguments.args and isinstance(arguments.args[0], fx.Node):
        if name in ("rearrange", "repeat"):
            given = (plain(value) for value in arguments.args)
            return emit(scope, "call_function", rearrange, given, {}, Facts("layout", name), at)
        if name == "reduce":
            return emit(scope, "call_function", opaque, arguments.nodes, {}, Facts("pool", name), at)
    if callee.name == "einops.layers.torch.Rearrange":
        return Module("opaque", Facts("layout", name))
    if package == "itertools" and name in ("chain", "cycle", "islice", "zip_longest") and arguments.args:
        if name == "zip_longest":
            return _call_builtin("zip", arguments, at, scope)
        if name == "chain":
            parts = [iterate(value, scope, at) for value in arguments.args]
            return Tup(tuple(item for part in parts for item in part.items), all(part.exact for part in parts))
        return iterate(arguments.args[0], scope, at)
    if package == "collections" and name in ("deque", "defaultdict"):
        return Tup((), True, list) if name == "deque" else Table({})
    return unknown_call(arguments, at, scope)


def _call_known(target: Any, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A class or function of torch or of the standard library."""
    args = arguments.args
    certain = answer(target, arguments) if scope.state.exact else None
    if certain is not None:
        return certain
    if isinstance(target, type):
        return _call_class(target, arguments, at, scope)
    if target is functools.reduce and len(args) > 1:
        walked = (*args[2:3], *iterate(args[1], scope, at).items[: scope.state.limits.unroll])
        step = lambda value, item: apply(args[0], Arguments((value, item)), at, scope)  # noqa: E731
        return functools.reduce(step, walked) if walked else UNKNOWN
    name = getattr(target, "__name__", "")
    home = str(getattr(target, "__module__", "") or "")
    if not callable(target):
        return DATA
    if name == "checkpoint" and home.startswith("torch.utils") and args:
        return apply(args[0], Arguments(args[1:], {}, True), at, scope)
    if name == "checkpoint_sequential" and len(args) > 2:
        return apply(args[0], Arguments(args[2:], {}, True), at, scope)
    if not scope.live:
        return _known_in_init(target, name, home, args)
    if name == "annotate" and home.startswith("torch.jit") and len(args) > 1:
        return args[1]
    if home == "torch.nn.init" or name in builtins.PLAIN_FUNCTIONS or not builtins.is_torch_function(target):
        return DATA
    if target is operator.getitem and len(args) == 2:
        return subscript(args[0], args[1], at, scope)
    return _call_function(target, name, arguments, at, scope)


def _call_class(target: type, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args, kwargs = arguments.args, arguments.kwargs
    if issubclass(target, (nn.Module, nn.Parameter)):
        return builtins.construct(target, args, kwargs, scope, at if isinstance(at, ast.Call) else None)
    if target is functools.partial:
        return Partial(args[0], args[1:], kwargs) if args else UNKNOWN
    if issubclass(target, torch.Tensor) and arguments.nodes and scope.live:
        return emit(scope, "call_function", opaque, arguments.nodes, {}, OPAQUE, at)
    return DATA


def _call_function(target: Any, name: str, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A function of torch on tensors."""
    args, kwargs, nodes = arguments.args, arguments.kwargs, arguments.nodes
    if not nodes and name not in builtins.FACTORIES:
        return DATA
    if nodes and args and is_callable(args[0]):
        return unknown_call(arguments, at, scope)
    if not name:
        return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)
    own = of_target(target)
    flag = kwargs.get("inplace")
    if isinstance(flag, Const) and flag.value is True:
        own = dataclasses.replace(own, inplace=True)
    _count_scalar(own, args, kwargs, scope)
    given = {key: plain(value) for key, value in kwargs.items()}
    return emit(scope, "call_function", target, (plain(value) for value in args), given, own, at)


def _known_in_init(target: Any, name: str, home: str, args: tuple[Value, ...]) -> Value:
    if args and isinstance(args[0], (Module, Tup)) and (builtins.wraps(target) or name == "_get_clones"):
        return Tup((args[0],), False) if name == "_get_clones" else args[0]
    if (
        home == "torch.nn.init"
        or home.startswith(("math", "operator", "_operator"))
        or name in builtins.PLAIN_FUNCTIONS
    ):
        return DATA
    if args and isinstance(args[0], Module) and args[0].role != "buffer":
        return args[0]
    return builtins.tensor_attribute_value() if builtins.is_torch_function(target) else DATA


def _count_scalar(own: Facts, args: tuple[Value, ...], kwargs: dict[str, Value], scope: Scope) -> None:
    if own.type in ("add", "sub") and len(nodes_in(args, kwargs)) < 2:
        scope.state.scalars += 1


@apply.register
def _call_method(callee: Attribute, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    value, name = callee.value, callee.name
    if isinstance(value, fx.Node):
        if name in builtins.PLAIN_METHODS:
            return DATA
        own = facts.of_function(name)
        _count_scalar(own, (value, *arguments.args), arguments.kwargs, scope)
        given = (value, *(plain(arg) for arg in arguments.args))
        kwargs = {key: plain(arg) for key, arg in arguments.kwargs.items()}
        return emit(scope, "call_method", name, given, kwargs, own, at)
    if isinstance(value, Instance):
        if name in ("__call__", "forward"):
            return call_module(value, arguments, at, scope)
        if builtins.is_module_method(name):
            return value
        if name in ("children", "modules", "values", "__iter__"):
            return iterate(value, scope, at)
        if name in ("items", "named_children", "named_modules"):
            inner = iterate(value, scope, at)
            return Tup(tuple(Tup((DATA, item)) for item in inner.items), inner.exact)
        return opaque_result(arguments, at, scope)
    if isinstance(value, BaseCall):
        base = torch_base(value.instance.module.cls) if value.instance.module.cls is not None else None
        if name == "forward" and base is not None and base is not nn.Module and scope.live:
            return _call_torch_base(value.instance, base, arguments, at, scope)
        return opaque_result(arguments, at, scope)
    if isinstance(value, Object):
        if name in ("to_tuple", "values"):
            return iterate(value, scope, at)
        extra = Arguments((*arguments.args, *nodes_of(value)), arguments.kwargs, arguments.open)
        return unknown_call(extra, at, scope)
    return unknown_call(arguments, at, scope)


def _call_torch_base(
    instance: Instance, base: type[nn.Module], arguments: Arguments, at: ast.expr, scope: Scope
) -> Value:
    """`super().forward(x)` where torch's own class provides it."""
    if issubclass(base, nn.Sequential):
        return call_elements(instance, arguments, at, scope)
    return leaf(instance, facts.of_class(base), arguments, at, scope)


def _call_builtin(name: str, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args = arguments.args
    certain = builtin(name, arguments) if scope.state.exact else None
    if certain is not None:
        return certain
    if name in _FUNCTION_OF_BUILTIN and args and isinstance(args[0], fx.Node):
        return _call_known(_FUNCTION_OF_BUILTIN[name], arguments, at, scope)
    if name == "range" or name in builtins.PLAIN_BUILTINS:
        return Tup((DATA,), False) if name == "range" else DATA
    if name in ("list", "tuple", "set", "frozenset", "sorted", "iter", "reversed", "enumerate", "zip", "next"):
        started = (*args, *arguments.kwargs.values()) if name == "enumerate" else args
        return _call_iteration(name, started, at, scope)
    if name == "getattr" and len(args) > 1:
        if isinstance(args[1], Const) and isinstance(args[1].value, str):
            return attribute(args[0], args[1].value, at, scope)
        return _some_attribute(args[0], at, scope)
    if name == "map" and len(args) > 1:
        inner = iterate(args[1], scope, at)
        items = inner.items[: scope.state.limits.unroll]
        return Tup(tuple(apply(args[0], Arguments((item,)), at, scope) for item in items), inner.exact)
    if name == "filter" and len(args) > 1:
        inner = iterate(args[1], scope, at)
        return Tup(inner.items, inner.exact and not scope.state.exact)
    if name == "dict":
        rest: dict[Any, Value] = {"*": UNKNOWN} if args and scope.state.exact else {}
        table = args[0].items if args and isinstance(args[0], Table) else rest
        return Table({**table, **arguments.kwargs})
    if name in ("min", "max"):
        return join_all(args, scope, at) if any(isinstance(value, fx.Node) for value in args) else DATA
    if name == "sum" and args:
        return _sum(iterate(args[0], scope, at), at, scope)
    return unknown_call(arguments, at, scope)


def _call_iteration(name: str, args: tuple[Value, ...], at: ast.expr, scope: Scope) -> Value:
    """A builtin that makes a list or an iterator of its arguments."""
    if name == "zip":
        return _zip([iterate(value, scope, at) for value in args], scope.state.limits.unroll)
    inner = iterate(args[0], scope, at) if args else Tup(())
    if name == "reversed":
        return Tup(inner.items[::-1], inner.exact)
    start = plain_value(args[1]) if len(args) > 1 else 0
    if name == "enumerate" and scope.state.exact and inner.exact and isinstance(start, int):
        return Tup(tuple(Tup((Const(i), item)) for i, item in enumerate(inner.items, start)))
    if name == "enumerate":
        return Tup(tuple(Tup((DATA, item)) for item in inner.items), inner.exact)
    if name == "next":
        return inner.items[0] if inner.items else UNKNOWN
    exact = inner.exact and not (scope.state.exact and name in ("set", "frozenset", "sorted"))
    return Tup(inner.items, exact, tuple if name == "tuple" else list)


def _some_attribute(value: Value, at: ast.expr, scope: Scope) -> Value:
    """`getattr(self, f"layer{i}")`: a module of unknown name."""
    if isinstance(value, Known) or not isinstance(value, Instance) or not scope.live:
        return UNKNOWN
    return Instance(child(value.path, "*"), UNKNOWN_MODULE)


def _zip(parts: list[Tup], limit: int) -> Tup:
    if all(part.exact for part in parts):
        rows = zip(*(part.items for part in parts), strict=False)
        return Tup(tuple(Tup(tuple(row)) for row in rows))
    lengths = [len(part.items) for part in parts if part.exact]
    if lengths and min(lengths) <= limit and all(part.items for part in parts):
        rows = zip(
            *(part.items if part.exact else (*part.items, *part.items[-1:] * 64) for part in parts), strict=False
        )
        return Tup(tuple(Tup(tuple(row)) for row in rows))
    return Tup((Tup(tuple(part.items[0] if part.items else UNKNOWN for part in parts)),), False)


def _sum(values: Tup, at: ast.expr, scope: Scope) -> Value:
    nodes = [value for value in values.items if isinstance(value, fx.Node)]
    if not nodes or not scope.live:
        return DATA
    if not values.exact:
        return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)
    total = nodes[0]
    for node in nodes[1:]:
        total = emit(scope, "call_function", operator.add, (total, node), {}, of_target(operator.add), at)
    return total


@apply.register
def _construct(cls: ClassRef, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    if is_module(cls):
        own = class_facts(cls) if torch_base(cls) is not None else Facts("other", cls.name)
        return Module("class", own, cls=cls, args=arguments.args, kwargs=arguments.kwargs, open=arguments.open)
    names = [n.target.id for n in cls.node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = dict(zip(names, arguments.args, strict=False))
    return Object(cls.name, {**fields, **arguments.kwargs}, arguments.args[len(fields) :])
