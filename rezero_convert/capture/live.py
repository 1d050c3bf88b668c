"""The static capture of a live model: its classes' own source, read with the values that its instances hold.

For when there are no example inputs and symbolic tracing fails. Nothing of the model is run: the abstract interpreter
of the static capture starts at the root module, finds real modules, parameters, flags and functions wherever names and
attributes lead to some, and takes the arms of conditions that these decide. Of conditions on tensors it sees both arms.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import functools
import sys
from collections import ChainMap, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import sources
from ..errors import ConversionError
from ..plan import Place
from . import facts
from .facts import Facts
from .frames import OURS, TORCH, method_function, place_of
from .guard import untouched
from .recorded import attribute_facts, is_leaf, one_line
from .static import is_plain
from .static_access import attribute, iterate, subscript
from .static_builtins import BUILTINS, child, is_module_method
from .static_core import Arguments, apply, evaluate, execute, opaque_result, unknown_call
from .static_exact import existing, is_missing, plain_value
from .static_modules import bind, end, leaf, too_much
from .static_names import External, Known
from .static_statements import Raised
from .static_values import (
    DATA,
    UNKNOWN,
    UNKNOWN_MODULE,
    Builtin,
    Const,
    Either,
    Limits,
    LiveInstance,
    Object,
    Partial,
    Real,
    RealFunction,
    RealSuper,
    Scope,
    Special,
    State,
    Table,
    Tup,
    Unknown,
    Value,
    callers,
    emit,
    frames,
    is_callable,
    join_all,
    nodes_of,
)
from .trace import Call, Origin, Trace

ROUTE = "static (live attributes)"

_NOTE = "nothing was run: the blocks were read from the source text and the attributes of the instances"
_LIMITS = Limits(work=400_000, nodes=200_000, stack=80, depth=1000, helpers=1000, unroll=4096)
_RECURSION = 8_000
_MAX_ITEMS = 512
"""Containers longer than this are not opened when they are met."""

_SCALARS = (bool, int, float, complex, str, bytes)
_MODULE_FILES = TORCH + "nn/modules/"
_SINGLE = ("children", "values", "modules", "__iter__")
_PAIRS = ("items", "named_children", "named_modules")


def trace_live(model: nn.Module, *, training: bool = False) -> Trace:
    """Read the source of `model`'s classes with the values of its instances; shapes of inputs stay unknown.

    The model is left as it was, and not run. Optional arguments have their defaults, unless the model cannot do
    without.

    Raises:
        ConversionError: the text of its `forward` cannot be had, or leads to no end.
    """
    traces: list[Trace] = []
    failures: list[str] = []
    with untouched(model, training=training), _deep_recursion():
        for optional in (False, True):
            try:
                traces.append(_traced(model, optional))
            except ConversionError:
                raise
            except Raised as error:
                failures.append(f"raises at {error}, as far as its source text tells")
            except Exception as error:  # text of a kind that was never seen
                failures.append(f"cannot be read from its source text ({one_line(error)})")
            if traces and traces[-1].root.outputs:
                return traces[-1]
    if not traces:
        raise ConversionError(f"{type(model).__name__}.forward {failures[0]}")
    return dataclasses.replace(traces[0], notes=(*traces[0].notes, "what the model returns could not be followed"))


@dataclass(eq=False, slots=True)
class _World:
    """What is known of the objects of one model."""

    state: State
    root: Call
    modules: dict[int, str]
    tensors: dict[int, str]
    instances: dict[int, LiveInstance] = field(default_factory=dict)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)
    """Keeps objects alive that are known by their identity."""


def _traced(model: nn.Module, optional: bool) -> Trace:
    graph = fx.Graph()
    root = Call("", type(model).__qualname__, facts.of_class(type(model)), None, (), model)
    state = State(graph, calls=[root], limits=_LIMITS)
    modules = {id(module): path for path, module in model.named_modules()}
    tensors = {id(tensor): path for path, tensor in (*model.named_parameters(), *model.named_buffers())}
    world = _World(state, root, modules, tensors)
    state.lift = functools.partial(_lift, world)
    instance = _instance(world, model)
    top = Scope(state, "", {}, None, call=root, site=())
    at = ast.Name("self", ast.Load(), lineno=0, col_offset=0)
    forward, before = _forward(instance, Arguments(), at, top)
    definition = _definition(forward.function) if forward is not None else None
    if forward is None or definition is None:
        raise ConversionError(f"there is no source text of {type(model).__name__}.forward")
    arguments = _inputs(definition.args, 0 if forward.receiver is None else 1, before, world, optional)
    result = _run(forward, definition, arguments, at, top, root, instance)
    root.outputs = list(dict.fromkeys(nodes_of(result)))
    output = graph.output(tuple(root.outputs))
    output.meta["origin"] = Origin(root, (), Facts("other", "output"))
    notes = (_NOTE, *state.notes)
    return Trace(graph, root, tuple(state.calls), ROUTE, model, notes, state.scalars)


@contextlib.contextmanager
def _deep_recursion() -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _inputs(signature: ast.arguments, bound: int, before: Arguments, world: _World, optional: bool) -> Arguments:
    """Placeholders for the required arguments, or for the first; with `optional`, for those that may be None too."""
    bound += len(before.args)
    positional = [*signature.posonlyargs, *signature.args][bound:]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(signature.defaults))
    defaults += signature.defaults[max(len(signature.defaults) - len(positional), 0) :]
    every = [*zip(positional, defaults, strict=True), *zip(signature.kwonlyargs, signature.kw_defaults, strict=True)]
    wanted = [arg for arg, default in every if default is None]
    if optional or not wanted:
        wanted += [arg for arg, default in every if isinstance(default, ast.Constant) and default.value is None]
        wanted = wanted if optional or signature.vararg is not None else wanted[:1]
    given: dict[str, Value] = {}
    for arg, default in every:
        if arg in wanted:
            plain = is_plain(arg, default) and not (arg.annotation and "dict" in ast.unparse(arg.annotation))
            given[arg.arg] = DATA if plain else _placeholder(world, arg.arg, optional and default is not None)
    rest: tuple[Value, ...] = ()
    if signature.vararg is not None and not given:
        rest = (_placeholder(world, signature.vararg.arg, False),)
    if signature.kwarg is not None and not given and not rest:
        given["*"] = _placeholder(world, signature.kwarg.arg, False)
    only = positional[: max(len(signature.posonlyargs) - bound, 0)]
    rest += tuple(given.pop(arg.arg) for arg in only if arg.arg in given)
    return Arguments(before.args + rest, {**given, **before.kwargs})


def _placeholder(world: _World, name: str, optional: bool) -> fx.Node:
    assert world.state.graph is not None
    node = world.state.graph.placeholder(name)
    node.meta["origin"] = Origin(world.root, (), Facts("input", "input"))
    node.meta["optional"] = optional
    world.root.inputs.append(node)
    return node


# Objects that exist, as values


def _instance(world: _World, module: nn.Module) -> LiveInstance:
    if id(module) not in world.instances:
        path = world.modules.get(id(module), f"<unregistered {type(module).__name__}>")
        world.instances[id(module)] = LiveInstance(path, UNKNOWN_MODULE, module)
        world.held.append(module)
    return world.instances[id(module)]


def _lift(world: _World, obj: Any, scope: Scope, at: ast.expr | ast.stmt, path: str) -> Value:
    """The value of an object; of a tensor, its node."""
    if obj is None or type(obj) in _SCALARS:
        return Const(obj)
    if isinstance(obj, Tensor):
        return _tensor(world, obj, scope, at, path)
    if isinstance(obj, nn.Module):
        return _instance(world, obj)
    if isinstance(obj, (tuple, list)) and len(obj) <= _MAX_ITEMS:
        items = (_lift(world, item, scope, at, child(path, str(i))) for i, item in enumerate(obj))
        return Tup(tuple(items), True, list if isinstance(obj, list) else tuple)
    if type(obj) in (dict, OrderedDict) and len(obj) <= _MAX_ITEMS and all(type(key) in _SCALARS for key in obj):
        return Table({key: _lift(world, item, scope, at, child(path, str(key))) for key, item in obj.items()})
    if isinstance(obj, functools.partial) and hasattr(obj, "__wrapped__"):
        return _lift(world, obj.__wrapped__, scope, at, path)
    if isinstance(obj, functools.partial):
        args = tuple(_lift(world, item, scope, at, "") for item in obj.args)
        keywords = {key: _lift(world, item, scope, at, "") for key, item in obj.keywords.items()}
        return Partial(_lift(world, obj.func, scope, at, ""), args, keywords)
    if isinstance(obj, MethodType):
        function = method_function(obj, type(obj.__self__))
        value = _function(function, obj) if function is not None else Real(obj)
        if not isinstance(value, RealFunction):
            return value
        return RealFunction(value.function, _lift(world, obj.__self__, scope, at, ""))
    return _object(obj)


def _object(obj: Any) -> Value:
    """The value of a function, a class or an object without parts of interest."""
    inner = getattr(obj, "__wrapped__", None) if not isinstance(obj, (FunctionType, type, ModuleType)) else None
    function = method_function(obj if isinstance(obj, FunctionType) else inner, object)
    if function is not None:
        return _function(function, obj)
    name = getattr(obj, "__name__", None)
    if any(obj is one for one in (super, getattr, hasattr)):
        return Special(str(name))
    if name in BUILTINS and getattr(builtins, str(name), None) is obj:
        return Builtin(str(name))
    top = str(getattr(obj, "__module__", None) or "torch").partition(".")[0]
    known = top == "torch" or top == "builtins" or top in sys.stdlib_module_names
    if isinstance(obj, (torch.dtype, torch.device)) or (callable(obj) and known and not isinstance(obj, ModuleType)):
        return Known(obj)
    return Real(obj)


def _function(function: FunctionType, obj: Any) -> Value:
    home = str(function.__module__ or "")
    top = home.partition(".")[0]
    if top == "einops":
        return External(f"einops.{function.__name__}")
    own = function.__code__.co_filename.startswith(_MODULE_FILES)
    if (top == "torch" and not own) or top in sys.stdlib_module_names:
        return Known(obj)
    return RealFunction(function)


def _tensor(world: _World, tensor: Tensor, scope: Scope, at: ast.expr | ast.stmt, path: str) -> fx.Node:
    if id(tensor) not in world.nodes:
        where = world.tensors.get(id(tensor)) or path or f"_constant_{len(world.nodes)}"
        node = emit(scope, "get_attr", where, (), {}, attribute_facts(tensor), at)
        made = node.meta["origin"]
        node.meta["origin"] = dataclasses.replace(made, shape=tuple(tensor.shape), dtype=tensor.dtype)
        world.nodes[id(tensor)] = node
        world.held.append(tensor)
    return world.nodes[id(tensor)]


def lift(obj: Any, scope: Scope, at: ast.expr | ast.stmt, path: str = "") -> Value:
    assert scope.state.lift is not None
    return scope.state.lift(obj, scope, at, path)


# Attributes


def _find(
    receiver: Value, obj: Any, name: str, at: ast.expr | ast.stmt, scope: Scope, after: type | None = None
) -> Value | None:
    """The attribute of an object that exists, as `receiver`; None if it has none of that name.

    Args:
        after: as seen by `super()` in a method of this class.
    """
    path = child(receiver.path, name) if isinstance(receiver, LiveInstance) else ""
    own = getattr(obj, "__dict__", {}) if after is None else {}
    for store in (own, *(own.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))):
        if name in store and isinstance(store, Mapping):
            return lift(store[name], scope, at, path)
    order = type(obj).__mro__
    for base in order[order.index(after) + 1 :] if after in order else order:
        if name in vars(base):
            return _bound(vars(base)[name], base, receiver, obj, name, at, scope)
    if after is not None or isinstance(obj, nn.Module):
        return None
    try:
        return lift(getattr(obj, name), scope, at, path)
    except Exception:  # whatever the model's own `__getattr__` raises
        return None


def _bound(
    value: Any, base: type, receiver: Value, obj: Any, name: str, at: ast.expr | ast.stmt, scope: Scope
) -> Value:
    """What a class holds under a name, as an attribute of an instance."""
    if isinstance(value, staticmethod):
        return lift(value.__func__, scope, at)
    function = method_function(value, base)
    if function is None and hasattr(value, "__wrapped__") and not isinstance(value, type):
        function = method_function(value.__wrapped__, base)
    if function is None:
        return Real(value) if hasattr(value, "__get__") and not callable(value) else lift(value, scope, at)
    if base is nn.Module or (function.__code__.co_filename.startswith(TORCH) and not _is_text(function)):
        return Special(name, receiver)
    if isinstance(value, classmethod):
        return RealFunction(function, Real(type(obj)))
    method = RealFunction(function, receiver)
    if isinstance(value, (property, functools.cached_property)):
        return apply(method, Arguments(), at, scope) if isinstance(at, ast.expr) else UNKNOWN
    return method


def _is_text(function: FunctionType) -> bool:
    """Whether a function of torch is read like one of the model's: what computes in `torch.nn.modules`."""
    file, name = function.__code__.co_filename, function.__name__
    return file.startswith(_MODULE_FILES) and not name.startswith("__") and name not in (*_SINGLE, *_PAIRS, "keys")


@attribute.register
def _of_live(value: LiveInstance, name: str, at: ast.expr, scope: Scope) -> Value:
    if value is scope.instance and f"self.{name}" in scope.env:
        return scope.env[f"self.{name}"]
    found = _find(value, value.live, name, at, scope)
    return found if found is not None else UNKNOWN


@attribute.register
def _of_real(value: Real, name: str, at: ast.expr, scope: Scope) -> Value:
    if isinstance(value.obj, (ModuleType, type)):
        try:
            return lift(getattr(value.obj, name), scope, at)
        except Exception:  # whatever a metaclass raises
            return UNKNOWN
    found = _find(value, value.obj, name, at, scope)
    return found if found is not None else UNKNOWN


@attribute.register
def _of_super(value: RealSuper, name: str, at: ast.expr, scope: Scope) -> Value:
    obj = existing(value.receiver)
    found = None if is_missing(obj) else _find(value.receiver, obj, name, at, scope, value.after)
    return found if found is not None else UNKNOWN


@iterate.register
def _each_of_live(value: LiveInstance, scope: Scope, at: ast.expr) -> Tup:
    module = value.live
    if isinstance(module, nn.ModuleDict):
        return Tup(tuple(Const(key) for key in module))
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return Tup(tuple(lift(item, scope, at) for item in module._modules.values()))
    if isinstance(module, nn.ParameterList):
        return Tup(tuple(lift(item, scope, at, child(value.path, str(i))) for i, item in enumerate(module)))
    return Tup((UNKNOWN,), False)


@iterate.register
def _each_of_real(value: Real, scope: Scope, at: ast.expr) -> Tup:
    if type(value.obj) in (dict, OrderedDict, set, frozenset, list, tuple, range):
        return Tup(tuple(lift(item, scope, at) for item in list(value.obj)[:_MAX_ITEMS]), len(value.obj) <= _MAX_ITEMS)
    return Tup((UNKNOWN,), False)


@subscript.register
def _element(value: LiveInstance, key: Value, at: ast.expr, scope: Scope) -> Value:
    module = value.live
    items = iterate(value, scope, at).items
    if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) and isinstance(key, Const):
        return lift(module[key.value], scope, at) if key.value in module else UNKNOWN
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ParameterList)):
        if isinstance(key, Object) and key.name == "slice":
            bounds = [plain_value(part) for part in key.args]
            if any(is_missing(bound) for bound in bounds):
                return Tup(items, True, list)  # as if all were wanted: what becomes of each is seen
            part = items[slice(*bounds)]
            return (
                lift(module[slice(*bounds)], scope, at) if isinstance(module, nn.Sequential) else Tup(part, True, list)
            )
        if isinstance(key, Const) and isinstance(key.value, int) and -len(items) <= key.value < len(items):
            return items[key.value]
        return _some(items, scope.passes)
    getter = _find(value, module, "__getitem__", at, scope)
    return apply(getter, Arguments((key,)), at, scope) if isinstance(getter, RealFunction) else UNKNOWN


def _some(items: tuple[Value, ...], number: int) -> Value:
    """An element that is not known; in a loop another one in each pass, in no order that a list could be walked in."""
    wanted = items[:4] if number == 0 else items[-min(number, len(items)) :][:1]
    return Either(wanted) if wanted and all(is_callable(item) for item in wanted) else UNKNOWN


@subscript.register
def _entry(value: Real, key: Value, at: ast.expr, scope: Scope) -> Value:
    obj = value.obj
    wanted = plain_value(key)
    if isinstance(obj, (dict, list, tuple)) and not is_missing(wanted):
        try:
            return lift(obj[wanted], scope, at)
        except (KeyError, IndexError, TypeError):
            return UNKNOWN
    if isinstance(obj, type):
        return value  # Generic[T]
    getter = _find(value, obj, "__getitem__", at, scope)
    return apply(getter, Arguments((key,)), at, scope) if isinstance(getter, RealFunction) else UNKNOWN


# Calls


@apply.register
def _call_live(callee: LiveInstance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A module: one node for a leaf, else its `forward`."""
    module = callee.live
    known = facts.of_class(type(module))
    if is_leaf(module):
        if arguments.args and _is_idle(module):
            return arguments.args[0]
        known = dataclasses.replace(known, inplace=bool(getattr(module, "inplace", False)))
        return leaf(callee, known, _fed(arguments, scope), at, scope)
    forward, arguments = _forward(callee, arguments, at, scope)
    definition = _definition(forward.function) if forward is not None else None
    if forward is None or definition is None or _is_stuck(definition, callee, scope):
        if definition is None:
            scope.state.notes[f"{type(module).__qualname__} has no source text: seen as one step"] = None
        weight = any(sum(size > 1 for size in tensor.shape) > 1 for tensor in module.parameters())
        return leaf(callee, dataclasses.replace(known, weight=weight), arguments, at, scope)
    inputs = list(dict.fromkeys(arguments.nodes))
    call = Call(callee.path, type(module).__qualname__, known, scope.call, frames(scope, at), module, inputs)
    scope.state.calls.append(call)
    result = _run(forward, definition, arguments, at, scope, call, callee)
    call.outputs = list(dict.fromkeys(nodes_of(result)))
    call.bare = isinstance(result, fx.Node)
    return result


def _forward(
    instance: LiveInstance, arguments: Arguments, at: ast.expr, scope: Scope
) -> tuple[RealFunction | None, Arguments]:
    """The function that a call of a module runs, and its arguments."""
    found = _find(instance, instance.live, "forward", at, scope)
    if isinstance(found, Partial):
        partial, found = found, found.callee
        kwargs = {**partial.kwargs, **arguments.kwargs}
        arguments = Arguments(partial.args + arguments.args, kwargs, arguments.open)
    return _as_method(found, arguments) if isinstance(found, RealFunction) else (None, arguments)


def _as_method(callee: RealFunction, arguments: Arguments) -> tuple[RealFunction, Arguments]:
    """A function called with its module as first argument, `Block.step(self, x)`, is bound to it."""
    first = arguments.args[0] if arguments.args else None
    if callee.receiver is not None or not isinstance(first, LiveInstance):
        return callee, arguments
    own = [(value, type(first.live)) for value in vars(first.live).values() if callable(value)]
    own += [(vars(base)[name], base) for base in type(first.live).__mro__ for name in (callee.function.__name__,)
            if name in vars(base)]  # fmt: skip
    if any(method_function(value, base) is callee.function for value, base in own):
        return RealFunction(callee.function, first), dataclasses.replace(arguments, args=arguments.args[1:])
    return callee, arguments


def _fed(arguments: Arguments, scope: Scope) -> Arguments:
    """The arguments of a leaf; one of unknown origin counts as computed from the model's first input."""
    inputs = scope.state.calls[0].inputs[:1]
    if arguments.nodes or not arguments.args or not isinstance(arguments.args[0], Unknown) or not inputs:
        return arguments
    return dataclasses.replace(arguments, args=(inputs[0], *arguments.args[1:]))


def _is_idle(module: nn.Module) -> bool:
    """Whether a module of torch returns its operand as it is."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return not module.training or module.p == 0
    return isinstance(module, nn.Identity)


@apply.register
def _call_function(callee: RealFunction, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    callee, arguments = _as_method(callee, arguments)
    definition = _definition(callee.function)
    if definition is None or _is_stuck(definition, callee.receiver, scope):
        return unknown_call(arguments, at, scope)
    instance = callee.receiver if isinstance(callee.receiver, LiveInstance) else None
    try:
        return _run(callee, definition, arguments, at, scope, scope.call, instance)
    except Raised:
        if instance is not None or arguments.nodes:
            raise
        return UNKNOWN  # what it computes with is known in part only


@apply.register
def _call_object(callee: Real, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    obj = callee.obj
    if isinstance(obj, type):
        if issubclass(obj, nn.Module):
            return UNKNOWN
        return _made(obj, arguments, at, scope)
    method = _find(callee, obj, "__call__", at, scope)
    return (
        apply(method, arguments, at, scope) if isinstance(method, RealFunction) else unknown_call(arguments, at, scope)
    )


def _made(cls: type, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """An object that the model makes: its fields by name, as far as the class declares them."""
    declared = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    names = [one.name for one in declared] or list(getattr(cls, "_fields", ()))
    fields = {
        one.name: lift(one.default, scope, at) for one in declared if one.default is not dataclasses.MISSING
    }  # fmt: skip
    fields |= dict(zip(names, arguments.args, strict=False))
    return Object(cls.__name__, {**fields, **arguments.kwargs}, arguments.args[len(names) :])


def _is_stuck(definition: ast.AST, receiver: Value | None, scope: Scope) -> bool:
    path = receiver.path if isinstance(receiver, LiveInstance) else ""
    return too_much(scope) or scope.active.count((definition, path)) > 1


def _definition(function: FunctionType) -> sources.FunctionNode | None:
    """The text of a function, None where it cannot be had."""
    code = function.__code__
    return _definition_at(Place("", code.co_name, code.co_filename, code.co_firstlineno))


@sources.cached
def _definition_at(place: Place) -> sources.FunctionNode | None:
    try:
        return sources.function(place)
    except (ConversionError, RecursionError):
        return None


def _run(
    callee: RealFunction,
    definition: sources.FunctionNode,
    arguments: Arguments,
    at: ast.expr,
    scope: Scope,
    call: Call | None,
    instance: LiveInstance | None,
) -> Value:
    """Analyse a function that exists, a method of `instance` if that is given, in a scope of its own."""
    function, receiver = callee.function, callee.receiver
    file = function.__code__.co_filename
    foreign = file.startswith(OURS) or (file.startswith(TORCH) and instance is None)
    outer = scope.outer if instance is not None else frames(scope, at) if scope.place is not None else ()
    inner = Scope(
        scope.state,
        file,
        {},
        place_of(function),
        instance,
        call=call,
        outer=outer,
        callers=callers(scope, at, instance),
        active=(*scope.active, (definition, instance.path if instance is not None else "")),
        site=outer if foreign else None,
        real=_names(function),
    )
    same = instance is not None and instance is scope.instance
    if same:
        inner.env.update({key: value for key, value in scope.env.items() if key.startswith("self.")})
    bind(definition.args, file, _completed(function, definition.args, receiver, arguments, at, inner), inner, receiver)
    if isinstance(definition, ast.Lambda):
        return evaluate(definition.body, inner)
    execute(definition.body, inner)
    if same:
        scope.env.update({key: value for key, value in inner.env.items() if key.startswith("self.")})
    return join_all(inner.returns, inner, end(definition)) if inner.returns else Const(None)


def _names(function: FunctionType) -> Mapping[str, Any]:
    """What the names that are not local to a function stand for."""
    cells: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            cells[name] = cell.cell_contents
    return ChainMap(cells, function.__globals__, vars(builtins))


def _completed(
    function: FunctionType,
    signature: ast.arguments,
    receiver: Value | None,
    arguments: Arguments,
    at: ast.expr,
    scope: Scope,
) -> Arguments:
    """The arguments of a call with the function's real defaults for those not given."""
    names = [arg.arg for arg in (*signature.posonlyargs, *signature.args)][0 if receiver is None else 1 :]
    given = {*names[: len(arguments.args)], *arguments.kwargs}
    values = dict(zip(reversed(names), reversed(function.__defaults__ or ()), strict=False))
    values |= function.__kwdefaults__ or {}
    defaults = {name: lift(value, scope, at) for name, value in values.items() if name not in given}
    return Arguments(arguments.args, {**arguments.kwargs, **defaults})


@apply.register
def _call_special(callee: Special, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args = arguments.args
    if callee.receiver is not None:
        return _call_module_method(callee.receiver, callee.name, arguments, at, scope)
    if callee.name == "super":
        return _super(args, scope)
    name = plain_value(args[1]) if len(args) > 1 else None
    if not isinstance(name, str):
        return UNKNOWN
    obj = existing(args[0])
    if is_missing(obj) or isinstance(obj, (*_SCALARS, ModuleType, type)):
        return attribute(args[0], name, at, scope) if callee.name == "getattr" else DATA
    found = attribute(args[0], name, at, scope)
    here = found != UNKNOWN or _find(args[0], obj, name, at, scope) is not None
    if callee.name == "hasattr":
        return Const(here)
    return found if here or len(args) < 3 else args[2]


def _super(args: tuple[Value, ...], scope: Scope) -> Value:
    receiver: Value | None = scope.instance
    after = (scope.real or {}).get("__class__")
    if len(args) == 2:
        receiver, after = args[1], existing(args[0])
    return RealSuper(receiver, after) if receiver is not None and isinstance(after, type) else UNKNOWN


def _call_module_method(receiver: Value, name: str, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A method of `nn.Module` or of one of torch's containers."""
    if not isinstance(receiver, LiveInstance):
        return unknown_call(arguments, at, scope)
    module = receiver.live
    if is_module_method(name):
        return receiver
    if name in ("get_submodule", "get_parameter", "get_buffer") and arguments.args:
        path = plain_value(arguments.args[0])
        with contextlib.suppress(AttributeError):
            return lift(getattr(module, name)(path), scope, at) if isinstance(path, str) else UNKNOWN
    if name in ("__call__", "forward"):
        return apply(receiver, arguments, at, scope)
    if name == "__len__":
        return Const(len(module._modules))
    if name == "__getitem__" and arguments.args:
        return subscript(receiver, arguments.args[0], at, scope)
    if name in _SINGLE:
        found = module.modules() if name == "modules" else module.children()
        return Tup(tuple(lift(item, scope, at) for item in found))
    if name in _PAIRS:
        pairs = module.named_modules() if name == "named_modules" else module._modules.items()
        return Tup(tuple(Tup((Const(key), lift(item, scope, at))) for key, item in pairs))
    if name == "keys":
        return Tup(tuple(Const(key) for key in module._modules))
    return opaque_result(arguments, at, scope)
