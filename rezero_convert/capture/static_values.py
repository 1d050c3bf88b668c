"""Abstract values of static capture: what a name may stand for when nothing is executed."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

import torch
from torch import fx, nn

from .. import sources
from ..plan import Place
from .facts import Facts
from .static_names import ClassRef, ExpressionRef, External, FileRef, FunctionRef, Known, Method
from .trace import Call, Frame, Origin

ELEMENTS = "self.<elements>"
"""Environment key of the elements of a container module under construction."""


@dataclass(frozen=True, slots=True)
class Unknown:
    name: str


UNKNOWN = Unknown("unknown")
"""May be anything, a module included."""
DATA = Unknown("data")
"""Some plain Python value: a size, a flag, a string."""


@dataclass(frozen=True, slots=True)
class Const:
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Tup:
    """A tuple or list."""

    items: tuple[Value, ...]
    exact: bool = True
    """False: the last item stands for any number of its kind."""
    builtin: type = tuple


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A dictionary with constant keys; others are left out."""

    items: dict[Any, Value]


@dataclass(frozen=True, slots=True, eq=False)
class Object:
    """An instance of a class that is no module: a dataclass, a named tuple."""

    name: str
    fields: dict[str, Value]
    args: tuple[Value, ...] = ()


Role = Literal["leaf", "class", "sequential", "list", "parameter", "buffer", "opaque"]


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """A module (or parameter, or buffer) as constructed in some `__init__`."""

    role: Role
    facts: Facts
    torch: type[nn.Module] | None = None
    """The class of torch, for a leaf."""
    cls: ClassRef | None = None
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)
    open: bool = True
    """Arguments that are not in `args` and `kwargs` may have been given."""
    elements: tuple[tuple[str, Value], ...] = ()
    constructor: str = ""
    """Source text of a parameter's initial value; of the call that makes a leaf."""
    through: tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...] = ()
    """The functions that were given it and returned it: `zero_module(nn.Linear(4, 4))`."""
    optional: bool = False
    bypassed: bool = False
    """Under a condition an identity takes its place."""
    attributes: dict[str, Value] = field(default_factory=dict)
    """What `__init__` sets; filled when first asked for."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A module at its path from the root of the capture."""

    path: str
    module: Module


@dataclass(frozen=True, slots=True, eq=False)
class LiveInstance(Instance):
    """A module that exists, at its path from the root. There is one of these for each in a capture."""

    live: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class Real:
    """An object that exists, of a kind with no other form here."""

    obj: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Real) and other.obj is self.obj

    def __hash__(self) -> int:
        return id(self.obj)


@dataclass(frozen=True, slots=True)
class RealFunction:
    """A Python function that exists, with the `self` or class it is bound to."""

    function: FunctionType
    receiver: Value | None = None


@dataclass(frozen=True, slots=True)
class Special:
    """A function of Python or method of `nn.Module` that asks about objects."""

    name: str
    receiver: Value | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RealSuper:
    """`super()` in a method of an object that exists."""

    receiver: Value
    after: type


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A method of a module."""

    instance: Instance
    method: Method


@dataclass(frozen=True, slots=True, eq=False)
class BaseCall:
    """`super()` in a method that `after` defines."""

    instance: Instance
    after: ClassRef


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """An attribute of a value that only matters when called: a method of a tensor, a list, an object."""

    value: Value
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Closure:
    """A nested function or lambda, with the scope it was made in."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    callee: Value
    args: tuple[Value, ...]
    kwargs: dict[str, Value]


@dataclass(frozen=True, slots=True, eq=False)
class Builtin:
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Either:
    """One of several callables."""

    options: tuple[Value, ...]


Value = (
    fx.Node
    | Unknown
    | Const
    | Tup
    | Table
    | Object
    | Module
    | Instance
    | Real
    | RealFunction
    | RealSuper
    | Special
    | Bound
    | BaseCall
    | Attribute
    | Closure
    | Partial
    | Builtin
    | Either
    | Known
    | FileRef
    | ClassRef
    | FunctionRef
    | ExpressionRef
    | External
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an analysis goes."""

    work: int = 30_000
    """Statements."""
    nodes: int = 12_000
    stack: int = 14
    """Functions within functions."""
    depth: int = 3
    """Levels of submodules that are entered; deeper ones are opaque."""
    helpers: int = 3
    """Levels of plain functions that are entered."""
    unroll: int = 8
    """Passes of a loop; longer ones are seen once."""
    elements: int = 64
    """Lists longer than this are seen as loops over their first element."""


@dataclass(slots=True, eq=False)
class State:
    """What one capture has produced so far."""

    graph: fx.Graph | None
    """None while an `__init__` is read for the types of attributes."""
    calls: list[Call] = field(default_factory=list)
    count: int = 0
    work: int = 0
    """Statements analysed."""
    scalars: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    limits: Limits = Limits()
    lift: Callable[[Any, Scope, ast.expr | ast.stmt, str], Value] | None = None
    """For objects that exist: the value of one, given where it is met and its path from the root ("" if it has none).
    Then constants are facts, and conditions on them are decided. None where only text is known."""

    @property
    def exact(self) -> bool:
        return self.lift is not None


@dataclass(slots=True, eq=False)
class Scope:
    """A function being analysed."""

    state: State
    file: str
    env: dict[str, Value]
    place: Place | None
    instance: Instance | None = None
    """The method's `self`."""
    cls: ClassRef | None = None
    """The class whose text defines the method."""
    call: Call | None = None
    outer: tuple[Frame, ...] = ()
    """Frames of the call site, for functions without a `self`."""
    callers: tuple[Frame, ...] = ()
    """For methods, `Frame.callers`."""
    depth: int = 0
    """Submodules entered."""
    helpers: int = 0
    """Plain functions entered."""
    loops: int = 0
    active: tuple[tuple[ast.AST, str], ...] = ()
    returns: list[Value] = field(default_factory=list)
    escapes: list[dict[str, Value]] = field(default_factory=list)
    """Environments at `continue`, and at `break` where it is not told apart."""
    breaks: list[dict[str, Value]] | None = None
    """Environments at `break` of a loop that is taken pass by pass."""
    passes: int = 0
    """The pass of a loop of unknown length, counted from 1."""
    site: tuple[Frame, ...] | None = None
    """Where everything is said to come from, for functions that are no code of the model's."""
    real: Mapping[str, Any] | None = None
    """What names that are not local stand for, where the function exists."""

    @property
    def live(self) -> bool:
        return self.state.graph is not None


def choice(*values: Any) -> Any:
    """Marker: one of its arguments, depending on a condition that is not evaluated."""
    return values[0]


def opaque(*values: Any) -> Any:
    """Marker: an unknown function of its arguments."""
    return values[0]


def rearrange(value: Any, *_: Any) -> Any:
    """Marker: `einops.rearrange` and `einops.repeat`, which move values and compute nothing."""
    return value


CHOICE = Facts("layout", "choice")
OPAQUE = Facts("other", "opaque")
UNKNOWN_MODULE = Module("opaque", Facts("other", "", weight=True))


def frames(scope: Scope, node: ast.expr | ast.stmt) -> tuple[Frame, ...]:
    if scope.site is not None:
        return scope.site
    assert scope.place is not None
    owner = scope.instance.path if scope.instance is not None else None
    own = Frame(scope.place, sources.span_of(scope.file, node), owner, scope.callers if owner is not None else ())
    return (own,) if owner is not None else (own, *scope.outer)


def callers(scope: Scope, node: ast.expr | ast.stmt, instance: Value | None) -> tuple[Frame, ...]:
    """The callers of a method of `instance` that is called at `node`, itself in a method of the same module."""
    same = instance is not None and instance == scope.instance and scope.place is not None and scope.site is None
    return (frames(scope, node)[0]._replace(callers=()), *scope.callers) if same else ()


def emit(
    scope: Scope,
    op: str,
    target: Any,
    args: Iterable[Any],
    kwargs: dict[str, Any],
    facts: Facts,
    at: ast.expr | ast.stmt,
) -> fx.Node:
    """A new node of the graph, with its origin."""
    state = scope.state
    assert state.graph is not None
    assert scope.call is not None
    state.count += 1
    node = state.graph.create_node(op, target, tuple(args), kwargs)
    node.meta["origin"] = Origin(scope.call, frames(scope, at), facts)
    if facts.inplace and node.args and isinstance(node.args[0], fx.Node):
        for name, value in scope.env.items():  # every name of the overwritten tensor has the new value
            if value is node.args[0]:
                scope.env[name] = node
    return node


def plain(value: Value) -> Any:
    """A value as an argument of a graph node; None for what is neither tensor nor constant."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, Const):
        return value.value if isinstance(value.value, (int, float, str, bool, complex)) else None
    if isinstance(value, Known):
        return value.obj if isinstance(value.obj, (torch.dtype, torch.device)) else None
    if isinstance(value, Tup):
        return tuple(plain(item) for item in value.items)
    if isinstance(value, Object):
        return tuple(nodes_of(value))
    return None


def operand(value: Value) -> Any:
    """A value as an operand of arithmetic: of a tuple (a function that returns more at times) the first tensor."""
    if isinstance(value, (Tup, Object)):
        return next(nodes_of(value), None)
    return plain(value)


def nodes_of(value: Value) -> Iterator[fx.Node]:
    """The tensors in a value, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, Tup):
        for item in value.items:
            yield from nodes_of(item)
    elif isinstance(value, Table):
        for item in value.items.values():
            yield from nodes_of(item)
    elif isinstance(value, Object):
        for item in (*value.args, *value.fields.values()):
            yield from nodes_of(item)


def nodes_in(args: Iterable[Value], kwargs: dict[str, Value]) -> list[fx.Node]:
    return [node for value in (*args, *kwargs.values()) for node in nodes_of(value)]


def is_absent(value: Value | None) -> bool:
    return value is None or isinstance(value, (Unknown, External)) or (isinstance(value, Const) and value.value is None)


def is_identity(value: Value) -> bool:
    if isinstance(value, Module):
        return value.torch is nn.Identity or (value.torch is nn.Sequential and not value.elements)
    if isinstance(value, FunctionRef):
        return _returns_argument(value.node)
    return isinstance(value, Known) and value.obj is nn.Identity


def _returns_argument(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function gives back its first argument, and does nothing else: fastai's `noop`."""
    *before, last = function.body
    arguments = [*function.args.posonlyargs, *function.args.args]
    said = all(isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant) for stmt in before)
    value = last.value if isinstance(last, ast.Return) else None
    return said and bool(arguments) and isinstance(value, ast.Name) and value.id == arguments[0].arg


def is_callable(value: Value) -> bool:
    kinds = (Module, Instance, Bound, Closure, Partial, Either, ClassRef, FunctionRef, RealFunction)
    return isinstance(value, kinds) or (isinstance(value, (Known, Real)) and callable(value.obj))


def optionally(module: Module) -> Module:
    """The module, made only under a condition."""
    if module.optional:
        return module
    return dataclasses.replace(module, optional=True, facts=dataclasses.replace(module.facts, optional=True))


def join(a: Value | None, b: Value | None, scope: Scope, at: ast.expr | ast.stmt) -> Value:
    """What a name stands for after two paths met."""
    if a is b or a == b:
        return a if a is not None else UNKNOWN
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return emit(scope, "call_function", choice, (a, b), {}, CHOICE, at) if scope.live else a
    if scope.state.exact and Const(None) in (a, b) and (isinstance(a, fx.Node) or isinstance(b, fx.Node)):
        made = emit(scope, "call_function", choice, (a if isinstance(a, fx.Node) else b,), {}, CHOICE, at)
        made.meta["optional"] = True
        return made
    if isinstance(a, Module) or isinstance(b, Module):
        return _join_modules(a, b)
    if is_absent(a) or is_absent(b):
        kept = b if is_absent(a) else a
        if kept is None or is_absent(kept):
            return UNKNOWN if UNKNOWN in (a, b) or kept is None else DATA if DATA in (a, b) else UNKNOWN
        return kept if not isinstance(kept, Const) else DATA
    assert a is not None
    assert b is not None
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return _join_tensor(a, b, scope, at)
    return _join_present(a, b, scope, at)


def _join_present(a: Value, b: Value, scope: Scope, at: ast.expr | ast.stmt) -> Value:
    """Two values that are neither tensors nor modules nor absent."""
    if isinstance(a, Tup) and isinstance(b, Tup):
        return _join_lists(a, b, scope, at)
    if isinstance(a, Table) and isinstance(b, Table):
        keys = dict.fromkeys((*a.items, *b.items))
        return Table({key: join(a.items.get(key), b.items.get(key), scope, at) for key in keys})
    if isinstance(a, Object) and isinstance(b, Object):
        keys = dict.fromkeys((*a.fields, *b.fields))
        fields = {str(key): join(a.fields.get(key), b.fields.get(key), scope, at) for key in keys}
        return Object(a.name, fields, a.args or b.args)
    if is_identity(a) or is_identity(b):
        return b if is_identity(a) else a
    if is_callable(a) and is_callable(b):
        options = [*(a.options if isinstance(a, Either) else (a,)), *(b.options if isinstance(b, Either) else (b,))]
        return Either(tuple(dict.fromkeys(options))[:4])
    for value in (a, b):
        if is_callable(value) or isinstance(value, (Tup, Table, Object)):
            return value
    return DATA


def join_all(values: Iterable[Value], scope: Scope, at: ast.expr | ast.stmt) -> Value:
    result: Value | None = None
    for value in values:
        result = value if result is None else join(result, value, scope, at)
    return result if result is not None else UNKNOWN


def join_environments(
    a: dict[str, Value], b: dict[str, Value], scope: Scope, at: ast.expr | ast.stmt
) -> dict[str, Value]:
    merged = dict(a)
    for name, value in a.items():
        other = b.get(name)
        if other is not value:
            given = _instead(name, value, other) or _instead(name, other, value)
            merged[name] = given if given is not None else join(value, other, scope, at)
    for name, value in b.items():
        if name not in a:
            merged[name] = join(None, value, scope, at)
    return merged


def _instead(name: str, value: Value | None, other: Value | None) -> fx.Node | None:
    """What stands for an argument that is left out, as in `if query is None: query = x` where x is an argument too."""
    if not isinstance(value, fx.Node) or not isinstance(other, fx.Node) or {value.op, other.op} != {"placeholder"}:
        return None
    return other if value.meta.get("left out") and value.target == name else None


def _join_modules(a: Value | None, b: Value | None) -> Value:
    if not isinstance(a, Module):
        a, b = b, a
    assert isinstance(a, Module)
    if isinstance(b, Module):
        if a.role == "list" and b.role == "list" and (not a.elements or not b.elements):
            return a if a.elements else b
        if a.role == b.role == "sequential" and a.attributes is b.attributes:
            return _grown(*sorted((a, b), key=lambda module: len(module.elements)))
        if is_identity(a) != is_identity(b):
            return dataclasses.replace(optionally(b if is_identity(a) else a), bypassed=True)
        kept = b if a.role == "opaque" or (a.role == "class" and _is_linear(b)) else a
        if a.bypassed or b.bypassed:
            return dataclasses.replace(optionally(kept), bypassed=True)
        return optionally(kept) if a.optional or b.optional else kept
    if is_absent(b):
        if is_identity(a) and b == UNKNOWN:
            return UNKNOWN
        return optionally(a)
    if b is not None and is_identity(b) and not is_identity(a):
        return dataclasses.replace(optionally(a), bypassed=True)
    return a


def _grown(shorter: Module, longer: Module) -> Module:
    """A container that was added to under a condition."""
    more = longer.elements[len(shorter.elements) :]
    added = ((name, optionally(value) if isinstance(value, Module) else value) for name, value in more)
    return dataclasses.replace(longer, elements=(*shorter.elements, *added))


def _is_linear(module: Module) -> bool:
    """Whether it is a layer of torch's with a weight: one that others, that a factory makes at times, stand in for."""
    return module.role == "leaf" and module.facts.kind == "linear"


def _join_tensor(a: Value, b: Value, scope: Scope, at: ast.expr | ast.stmt) -> Value:
    node, other = (a, b) if isinstance(a, fx.Node) else (b, a)
    if isinstance(other, (Tup, Object)):
        inner = next(nodes_of(other), None)
        if inner is None:
            return node
        if isinstance(other, Tup) and other.items and other.items[0] is inner:
            return Tup((join(inner, node, scope, at), *other.items[1:]), other.exact, other.builtin)
        return other
    return node


def _join_lists(a: Tup, b: Tup, scope: Scope, at: ast.expr | ast.stmt) -> Value:
    if len(a.items) == len(b.items):
        items = tuple(join(x, y, scope, at) for x, y in zip(a.items, b.items, strict=True))
        return Tup(items, a.exact and b.exact, a.builtin)
    longer, shorter = (a, b) if len(a.items) > len(b.items) else (b, a)
    common = tuple(join(x, y, scope, at) for x, y in zip(longer.items, shorter.items, strict=False))
    return Tup(common + longer.items[len(common) :], longer.exact and longer.builtin is tuple, longer.builtin)
