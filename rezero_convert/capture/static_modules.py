"""Modules in static capture: what an `__init__` sets, and what calling a module or a function does."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from torch import fx, nn

from .. import sources
from ..plan import Place
from . import facts
from . import static_builtins as builtins
from .facts import Facts
from .static_builtins import attach, child
from .static_core import Arguments, apply, evaluate, execute, opaque_result, unknown_call
from .static_names import (
    ClassRef,
    External,
    FunctionRef,
    Known,
    Method,
    lineage,
    members,
    method,
    torch_base,
)
from .static_values import (
    DATA,
    ELEMENTS,
    OPAQUE,
    UNKNOWN,
    UNKNOWN_MODULE,
    Bound,
    Closure,
    Const,
    Instance,
    Module,
    Scope,
    State,
    Table,
    Tup,
    Unknown,
    Value,
    callers,
    emit,
    frames,
    is_absent,
    is_callable,
    join,
    join_all,
    nodes_of,
    opaque,
    plain,
)
from .trace import Call, origin

_shared: dict[Any, dict[str, Value]] = sources.emptied({})

_pending: set[int] = set()

_MAX_SHARED = 4000


@apply.register
def call_module(instance: Instance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """`self.attribute(...)`."""
    if not scope.live:
        return UNKNOWN
    result = _called(instance, arguments, at, scope)
    if not instance.module.bypassed or not isinstance(result, fx.Node) or not arguments.args:
        return result
    own = module_facts(instance.module)
    weight = own.weight or origin(result).facts.weight  # a projection, not a LayerScale or DropPath
    return join(result, arguments.args[0], scope, at) if weight and own.kind == "other" else result


def _called(instance: Instance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    module = instance.module
    if module.cls is not None:
        found = method(module.cls, "forward")
        base = torch_base(module.cls)
        if isinstance(found, Method):
            inside = scope.depth < scope.state.limits.depth and not too_much(scope)
            if inside and not _entered(found.node, instance.path, scope):
                return _inline_module(instance, found, arguments, at, scope)
            return leaf(instance, module_facts(module), arguments, at, scope)
        if base is not None and issubclass(base, nn.Sequential):
            return call_elements(instance, arguments, at, scope)
        return leaf(instance, module_facts(module), arguments, at, scope)
    if module.role == "sequential":
        return call_elements(instance, arguments, at, scope)
    if module.role in ("parameter", "buffer"):
        return UNKNOWN
    nodes = arguments.nodes
    if module.role == "opaque" and not nodes:
        return DATA
    return leaf(instance, module.facts, arguments, at, scope)


def leaf(instance: Instance, own: Facts, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args = [plain(value) for value in arguments.args]
    kwargs = {key: plain(value) for key, value in arguments.kwargs.items()}
    node = emit(scope, "call_module", instance.path or "self", args, kwargs, own, at)
    node.meta["constructor"], node.meta["through"] = instance.module.constructor, instance.module.through
    return node


def too_much(scope: Scope) -> bool:
    """Whether the analysis is to go no deeper."""
    state = scope.state
    if state.work > state.limits.work or state.count > state.limits.nodes:
        state.notes["analysis cut short: too large"] = None
        return True
    return len(scope.active) > state.limits.stack


def _entered(node: ast.AST, path: str, scope: Scope) -> bool:
    return (node, path) in scope.active


def _enter(instance: Instance, own: Facts, name: str, arguments: Arguments, at: ast.expr, scope: Scope) -> Call:
    call = Call(instance.path, name, own, scope.call, frames(scope, at), inputs=list(dict.fromkeys(arguments.nodes)))
    scope.state.calls.append(call)
    return call


def _inline_module(instance: Instance, found: Method, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    module = instance.module
    assert module.cls is not None
    call = _enter(instance, module_facts(module), module.cls.qualname, arguments, at, scope)
    result = _run(found.node, found.cls.file, _place(found), arguments, scope, at, instance, found.cls, call)
    call.outputs = list(nodes_of(result))
    call.bare = isinstance(result, fx.Node)
    return result


def call_elements(instance: Instance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A Sequential: its elements in order, called from where it is called."""
    module = instance.module
    if module.cls is not None:
        attributes(module)
    items = builtins.items_of(module)
    if not items or all(value == UNKNOWN for _, value in items):
        own = dataclasses.replace(module_facts(module), weight=True)
        return leaf(instance, own, arguments, at, scope)
    name = module.cls.qualname if module.cls is not None else module.facts.type
    call = _enter(instance, module_facts(module), name, arguments, at, scope)
    outer, scope.call = scope.call, call
    value: Value = arguments.args[0] if arguments.args else next(iter(arguments.kwargs.values()), UNKNOWN)
    for key, element in items:
        step = seen(element, child(instance.path, key), at, scope)
        before = value
        if isinstance(step, Const) and step.value is None:
            continue
        value = apply(step, Arguments((value,)), at, scope)
        if is_absent(value):
            value = before
    scope.call = outer
    call.outputs = list(nodes_of(value))
    return value


@sources.cached
def class_facts(cls: ClassRef) -> Facts:
    """Facts of a class by its bases: one derived from `nn.LayerNorm` is a norm, fused if it applies an activation."""
    base = torch_base(cls)
    own = facts.of_class(base) if base is not None else Facts()
    fused = own.kind == "norm" and _applies_activation(cls)
    return dataclasses.replace(own, type=cls.name, fused=fused)


def _applies_activation(cls: ClassRef) -> bool:
    for ref in lineage(cls):
        if not isinstance(ref, ClassRef):
            continue
        init = members(ref).get("__init__")
        if isinstance(init, ast.FunctionDef):
            defaults = [*init.args.defaults, *(value for value in init.args.kw_defaults if value is not None)]
            scope = Scope(State(None), ref.file, {}, None)
            for default in defaults:
                value = evaluate(default, scope) if isinstance(default, (ast.Name, ast.Attribute)) else None
                own = value.obj if isinstance(value, Known) and isinstance(value.obj, type) else None
                if own is not None and issubclass(own, nn.Module) and facts.of_class(own).kind == "activation":
                    return True
    made = attributes(Module("class", Facts(), cls=cls))
    return any(isinstance(value, Module) and value.facts.kind == "activation" for value in made.values())


def module_facts(module: Module) -> Facts:
    """Facts of a module; for a class of a file also whether it holds a weight, as far as text tells."""
    if module.cls is None:
        return module.facts
    own = class_facts(module.cls)
    weight = own.weight or (own.kind == "other" and holds_weight(module, 0))
    return dataclasses.replace(own, weight=weight, optional=module.optional)


def holds_weight(value: Value, depth: int) -> bool:
    """Whether a module may hold a matrix or convolution weight."""
    if isinstance(value, Tup):
        return any(holds_weight(item, depth) for item in value.items)
    if not isinstance(value, Module) or value.role in ("parameter", "buffer"):
        return False
    if value.cls is None:
        return value.facts.weight or any(holds_weight(item, depth + 1) for _, item in value.elements)
    if depth > 4:
        return True
    if class_facts(value.cls).kind == "norm":
        return False
    return any(holds_weight(item, depth + 1) for item in attributes(value).values())


def attributes(module: Module) -> dict[str, Value]:
    """What the module's `__init__` sets on it, by name; empty where that cannot be read."""
    if module.cls is None or module.attributes or id(module) in _pending:
        return module.attributes
    key = _key(module)
    known = _shared.get(key) if key is not None else None
    if known is None:
        _pending.add(id(module))
        try:
            known = _initialise(module)
        finally:
            _pending.discard(id(module))
        if key is not None:
            if len(_shared) > _MAX_SHARED:
                _shared.clear()
            _shared[key] = known
    module.attributes.update(known)
    module.attributes.setdefault("self.<read>", DATA)
    return module.attributes


def _key(module: Module) -> Any:
    """What the attributes depend on, if that is constants only."""
    parts: list[Any] = [module.cls, module.open]
    for name, value in (*enumerate(module.args), *module.kwargs.items()):
        if isinstance(value, Const):
            parts.append((name, repr(value.value)))
        elif isinstance(value, (Unknown, Known, ClassRef, FunctionRef, External)):
            parts.append((name, value))
        else:
            return None
    try:
        hash(tuple(parts))
    except TypeError:
        return None
    return tuple(parts)


def _initialise(module: Module) -> dict[str, Value]:
    assert module.cls is not None
    found = method(module.cls, "__init__")
    instance = Instance("", module)
    if not isinstance(found, Method):
        return {}
    scope = Scope(State(None), found.cls.file, {}, None, instance, found.cls)
    arguments = Arguments(module.args, module.kwargs, module.open)
    _run(found.node, found.cls.file, _place(found), arguments, scope, found.node.body[0], instance, found.cls, None)
    made = {key.removeprefix("self."): value for key, value in scope.env.items() if key.startswith("self.")}
    if ELEMENTS in scope.env:
        made[ELEMENTS] = scope.env[ELEMENTS]
    return made


@apply.register
def inline(callee: Bound | Closure | FunctionRef, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """Analyse the body of a function, method or lambda in place of its call."""
    if isinstance(callee, Bound):
        found, instance = callee.method, callee.instance
        if instance != scope.instance and found.node.name in ("forward", "__call__"):
            return call_module(instance, arguments, at, scope)
        if too_much(scope) or _entered(found.node, instance.path, scope):
            return opaque_result(arguments, at, scope)
        if found.decorators and "classmethod" in found.decorators:
            return opaque_result(arguments, at, scope)
        deeper = scope.depth if instance == scope.instance else scope.depth + 1
        if deeper > scope.state.limits.depth:
            return opaque_result(arguments, at, scope)
        return _run(found.node, found.cls.file, _place(found), arguments, scope, at, instance, found.cls, scope.call)
    if isinstance(callee, Closure):
        if too_much(scope) or _entered(callee.node, "", scope):
            return opaque_result(arguments, at, scope)
        return _run_closure(callee, arguments, at, scope)
    if scope.helpers >= scope.state.limits.helpers or too_much(scope) or _entered(callee.node, "", scope):
        return unknown_call(arguments, at, scope)
    if not scope.live and not _returns(callee.node):
        return UNKNOWN  # what it does to others' attributes is not followed
    place = Place("", callee.qualname, callee.file, _first_line(callee.node))
    result = _run(callee.node, callee.file, place, arguments, scope, at, None, None, scope.call)
    if isinstance(result, Module) and any(result is given for given in arguments.args):
        return dataclasses.replace(result, through=(*result.through, callee.node))
    if scope.live and is_absent(result) and arguments.nodes and _returns(callee.node):
        return emit(scope, "call_function", opaque, arguments.nodes, {}, OPAQUE, at)
    return result


@sources.cached
def _returns(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function returns a value."""
    return any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))


def _place(found: Method) -> Place:
    return Place("", f"{found.cls.qualname}.{found.node.name}", found.cls.file, _first_line(found.node))


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _run(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    file: str,
    place: Place,
    arguments: Arguments,
    scope: Scope,
    at: ast.expr | ast.stmt,
    instance: Instance | None,
    cls: ClassRef | None,
    call: Call | None,
) -> Value:
    """Analyse a function in a scope of its own. Attributes set on the same `self` carry over."""
    own_self = instance is not None and instance == scope.instance
    outer = frames(scope, at) if instance is None and scope.live else ()
    inner = Scope(
        scope.state,
        file,
        {},
        place,
        instance,
        cls,
        call,
        outer,
        callers(scope, at, instance) if scope.live else (),
        depth=scope.depth + (1 if instance is not None and not own_self else 0),
        helpers=scope.helpers + (1 if instance is None else 0),
        loops=scope.loops if not scope.live and own_self else 0,
        active=(*scope.active, (node, instance.path if instance is not None else "")),
    )
    if own_self:
        inner.env.update({key: value for key, value in scope.env.items() if key.startswith("self.")})
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    bind(node.args, file, arguments, inner, None if static else instance)
    execute(node.body, inner)
    if own_self:
        scope.env.update({key: value for key, value in inner.env.items() if key.startswith("self.")})
    return join_all(inner.returns, inner, end(node)) if inner.returns else Const(None)


@sources.cached
def end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
    """The last return of a function, the place where its results join."""
    returns = [part for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None]
    return max(returns, key=lambda part: part.lineno) if returns else node.body[-1]


def _run_closure(callee: Closure, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    made_in = callee.scope
    inner = Scope(
        scope.state,
        made_in.file,
        {key: value for key, value in made_in.env.items() if key.startswith("self.")},
        made_in.place,
        made_in.instance,
        made_in.cls,
        scope.call,
        made_in.outer,
        callers(scope, at, made_in.instance) if scope.live else (),
        depth=max(scope.depth, made_in.depth),
        helpers=scope.helpers,
        active=(*scope.active, (callee.node, "")),
        site=made_in.site,
        real=made_in.real,
    )
    inner.env = dict(made_in.env)
    bind(callee.node.args, made_in.file, arguments, inner, None)
    if isinstance(callee.node, ast.Lambda):
        return evaluate(callee.node.body, inner)
    execute(callee.node.body, inner)
    return join_all(inner.returns, inner, end(callee.node)) if inner.returns else Const(None)


def bind(signature: ast.arguments, file: str, arguments: Arguments, inner: Scope, instance: Value | None) -> None:
    """Put arguments into the environment of a function, defaults for those not given."""
    names = [arg.arg for arg in (*signature.posonlyargs, *signature.args)]
    env = inner.env
    values = [*arguments.args]
    if instance is not None and names:
        env[names.pop(0)] = instance
    defaults: dict[str, ast.expr] = {}
    for name, default in zip(reversed(names), reversed(signature.defaults), strict=False):
        defaults[name] = default
    for arg, value in zip(signature.kwonlyargs, signature.kw_defaults, strict=True):
        if value is not None:
            defaults[arg.arg] = value
    given = dict(zip(names, values, strict=False))
    rest = {}
    for key, item in arguments.kwargs.items():
        if key in names or any(key == arg.arg for arg in signature.kwonlyargs):
            given[key] = item
        else:
            rest[key] = item
    for name in (*names, *(arg.arg for arg in signature.kwonlyargs)):
        found = given.get(name)
        if (found is None or found == UNKNOWN) and name in defaults:
            env[name] = _default(defaults[name], file, arguments.open or found is not None, inner)
        else:
            env[name] = found if found is not None else UNKNOWN
    if signature.vararg is not None:
        env[signature.vararg.arg] = Tup(tuple(values[len(names) :]), not arguments.open)
    if signature.kwarg is not None:
        table: dict[Any, Value] = dict(rest)
        if arguments.open:
            table["*"] = UNKNOWN
        env[signature.kwarg.arg] = Table(table)


def _default(node: ast.expr, file: str, may_differ: bool, scope: Scope) -> Value:
    """A default. Where something else may have been given, only classes and functions are believed."""
    value = evaluate(node, Scope(State(None), file, {}, None, helpers=scope.helpers + 1))
    if may_differ and not is_callable(value):
        return UNKNOWN
    return value


def seen(stored: Value, path: str, at: ast.expr, scope: Scope) -> Value:
    """An attribute's value as an expression meets it."""
    if not scope.live:
        return stored
    if isinstance(stored, Module) and stored.role in ("parameter", "buffer"):
        node = emit(scope, "get_attr", path, (), {}, stored.facts, at)
        node.meta["constructor"] = stored.constructor
        node.meta["conditional"] = stored.optional or _within_optional(scope.call)
        node.meta["buffer"] = stored.role == "buffer"
        return node
    if stored == UNKNOWN or isinstance(stored, External):
        return Instance(path, UNKNOWN_MODULE)
    if isinstance(stored, Const):
        # set at construction, may have been changed since: numbers are kept for the scale of a branch
        if isinstance(stored.value, (int, float)) and not isinstance(stored.value, bool):
            return stored
        return DATA if stored.value is not None else UNKNOWN
    return attach(stored, path)


def _within_optional(call: Call | None) -> bool:
    """Whether a call is that of a module that exists only under a condition, or lies within one."""
    while call is not None:
        if call.facts.optional:
            return True
        call = call.parent
    return False
