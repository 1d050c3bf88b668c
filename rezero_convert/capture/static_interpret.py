"""The abstract interpreter of static capture: functions of a file become nodes of a graph.

Conditions are not evaluated (unless they test a constant at hand): both arms run on copies of the environment, which
are then joined. Loop bodies run once. What is not understood becomes an opaque value.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import sources
from ..plan import Place
from . import facts
from . import static_builtins as builtins
from .facts import Facts
from .static_builtins import attach, child
from .static_names import (
    ClassRef,
    ExpressionRef,
    External,
    FileRef,
    FunctionRef,
    Known,
    Method,
    class_attribute,
    imported,
    index,
    is_module,
    lineage,
    member,
    members,
    method,
    resolve,
    resolve_import,
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
    Closure,
    Const,
    Either,
    Instance,
    Module,
    Object,
    Partial,
    Scope,
    State,
    Table,
    Tup,
    Unknown,
    Value,
    emit,
    frames,
    is_absent,
    is_callable,
    join,
    join_all,
    join_environments,
    nodes_in,
    nodes_of,
    opaque,
    operand,
    optionally,
    plain,
    rearrange,
)
from .trace import Call

DEPTH = 3
"""Levels of submodules that are entered; deeper ones are opaque."""
HELPERS = 3
"""Levels of plain functions that are entered."""
MAX_STACK = 14
MAX_WORK = 30_000
MAX_NODES = 12_000
MAX_UNROLL = 8

_OPERATORS: dict[type[ast.operator], tuple[Callable[..., Any], Callable[..., Any]]] = {
    ast.Add: (operator.add, operator.iadd),
    ast.Sub: (operator.sub, operator.isub),
    ast.Mult: (operator.mul, operator.imul),
    ast.Div: (operator.truediv, operator.itruediv),
    ast.FloorDiv: (operator.floordiv, operator.ifloordiv),
    ast.Mod: (operator.mod, operator.imod),
    ast.Pow: (operator.pow, operator.ipow),
    ast.MatMult: (operator.matmul, operator.imatmul),
    ast.BitAnd: (operator.and_, operator.iand),
    ast.BitOr: (operator.or_, operator.ior),
    ast.BitXor: (operator.xor, operator.ixor),
    ast.LShift: (operator.lshift, operator.ilshift),
    ast.RShift: (operator.rshift, operator.irshift),
}
_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ADDS = (operator.add, operator.iadd, operator.sub, operator.isub)
_IDENTITY_MODULE = Module("leaf", Facts("layout", "Identity"), nn.Identity)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Arguments:
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)
    open: bool = False
    """There may be more: a starred argument of unknown content."""

    @property
    def nodes(self) -> list[fx.Node]:
        return nodes_in(self.args, self.kwargs)


# Statements


def execute(body: list[ast.stmt], scope: Scope) -> bool:
    """Analyse statements in order; False if control does not get past them."""
    for statement in body:
        scope.state.work += 1
        if scope.state.work > MAX_WORK:
            scope.state.notes["analysis cut short: too many statements"] = None
            return True
        run = _STATEMENTS.get(type(statement))
        if run is not None and not run(statement, scope):
            return False
    return True


def _expression_statement(node: ast.Expr, scope: Scope) -> bool:
    evaluate(node.value, scope)
    return True


def _assign_statement(node: ast.Assign, scope: Scope) -> bool:
    value = evaluate(node.value, scope)
    for target in node.targets:
        assign(target, value, scope)
    return True


def _annotated(node: ast.AnnAssign, scope: Scope) -> bool:
    if node.value is not None:
        assign(node.target, evaluate(node.value, scope), scope)
    return True


def _augmented(node: ast.AugAssign, scope: Scope) -> bool:
    before = evaluate(node.target, scope)
    value = evaluate(node.value, scope)
    assign(node.target, _binary(node.op, before, value, node, scope, inplace=True), scope)
    return True


def _return(node: ast.Return, scope: Scope) -> bool:
    scope.returns.append(evaluate(node.value, scope) if node.value is not None else Const(None))
    return False


def _leave(node: ast.stmt, scope: Scope) -> bool:
    return False


def _escape(node: ast.stmt, scope: Scope) -> bool:
    scope.escapes.append(scope.env)
    return False


def _if(node: ast.If, scope: Scope) -> bool:
    _evaluate_test(node.test, scope)
    decided = truth(node.test, scope)
    if decided is not None:
        return execute(node.body if decided else node.orelse, scope)
    return _branches([node.body, node.orelse], node.test, scope)


def _match(node: ast.Match, scope: Scope) -> bool:
    evaluate(node.subject, scope)
    return _branches([*(case.body for case in node.cases), []], node.subject, scope)


def _branches(bodies: list[list[ast.stmt]], at: ast.expr, scope: Scope) -> bool:
    entry = scope.env
    joined: dict[str, Value] | None = None
    for body in bodies:
        scope.env = dict(entry)
        if execute(body, scope):
            joined = scope.env if joined is None else join_environments(joined, scope.env, scope, at)
    scope.env = joined if joined is not None else entry
    return joined is not None


def _for(node: ast.For | ast.AsyncFor, scope: Scope) -> bool:
    elements = iterate(evaluate(node.iter, scope), scope, node.iter)
    if elements.exact and len(elements.items) <= MAX_UNROLL and not _has_escape(node):
        if all(not isinstance(item, Unknown) for item in elements.items):
            for item in elements.items:
                assign(node.target, item, scope)
                if not execute(node.body, scope):
                    break
            return execute(node.orelse, scope)
    _widen(node, scope)
    element = elements.items[0] if same(elements.items) else join_all(elements.items, scope, node.iter)
    return _loop(node.body, node.orelse, node.iter, scope, lambda: assign(node.target, element, scope))


def _while(node: ast.While, scope: Scope) -> bool:
    _widen(node, scope)
    _evaluate_test(node.test, scope)
    return _loop(node.body, node.orelse, node.test, scope, lambda: None)


def _loop(
    body: list[ast.stmt], orelse: list[ast.stmt], at: ast.expr, scope: Scope, enter: Callable[[], None]
) -> bool:
    entry, escapes = scope.env, scope.escapes
    scope.env, scope.escapes = dict(entry), []
    scope.loops += 1
    enter()
    passed = execute(body, scope)
    scope.loops -= 1
    after = [scope.env] if passed else []
    after += scope.escapes
    scope.escapes = escapes
    scope.env = after[0] if after else entry
    for env in after[1:]:
        scope.env = join_environments(scope.env, env, scope, at)
    return execute(orelse, scope)


def _with(node: ast.With | ast.AsyncWith, scope: Scope) -> bool:
    for item in node.items:
        evaluate(item.context_expr, scope)
        if item.optional_vars is not None:
            assign(item.optional_vars, UNKNOWN, scope)
    return execute(node.body, scope)


def _try(node: ast.Try, scope: Scope) -> bool:
    entry = dict(scope.env)
    passed = execute(node.body, scope) and execute(node.orelse, scope)
    env = scope.env
    for handler in node.handlers:
        scope.env = dict(entry)
        execute(handler.body, scope)
    scope.env = env
    return execute(node.finalbody, scope) and passed


def _define(node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> bool:
    scope.env[node.name] = Closure(node, scope)
    return True


def _define_class(node: ast.ClassDef, scope: Scope) -> bool:
    scope.env[node.name] = ClassRef(scope.file, node.name, node)
    return True


def _import(node: ast.Import | ast.ImportFrom, scope: Scope) -> bool:
    for name, binding in imported(node).items():
        scope.env[name] = resolve_import(scope.file, binding)
    return True


_STATEMENTS: dict[type[ast.stmt], Callable[[Any, Scope], bool]] = {
    ast.Expr: _expression_statement,
    ast.Assign: _assign_statement,
    ast.AnnAssign: _annotated,
    ast.AugAssign: _augmented,
    ast.Return: _return,
    ast.Raise: _leave,
    ast.Break: _escape,
    ast.Continue: _escape,
    ast.If: _if,
    ast.Match: _match,
    ast.For: _for,
    ast.AsyncFor: _for,
    ast.While: _while,
    ast.With: _with,
    ast.AsyncWith: _with,
    ast.Try: _try,
    ast.FunctionDef: _define,
    ast.AsyncFunctionDef: _define,
    ast.ClassDef: _define_class,
    ast.Import: _import,
    ast.ImportFrom: _import,
}


def _widen(loop: ast.For | ast.AsyncFor | ast.While, scope: Scope) -> None:
    """Forget the constants that the loop reassigns: a flag set in the first pass must not hide an arm."""
    for name in _stored(loop):
        if isinstance(scope.env.get(name), Const):
            scope.env[name] = UNKNOWN


@lru_cache(maxsize=4096)
def _stored(loop: ast.stmt) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


@lru_cache(maxsize=4096)
def _has_escape(loop: ast.stmt) -> bool:
    return any(isinstance(n, (ast.Break, ast.Continue, ast.Return, ast.Yield)) for n in ast.walk(loop))


def same(items: tuple[Value, ...]) -> bool:
    """Whether the first of several loop elements stands for them all."""
    return len(items) == 1


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
                    scope, "call_function", operator.setitem, (container, None, value), {}, _of(operator.setitem), target
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
            assign(target, _getitem(value, None if star else i, target, scope), scope)
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


def _getitem(value: fx.Node, key: Any, at: ast.expr, scope: Scope) -> Value:
    if not scope.live:
        return UNKNOWN
    return emit(scope, "call_function", operator.getitem, (value, key), {}, _of(operator.getitem), at)


# Expressions


def evaluate(node: ast.expr, scope: Scope) -> Value:
    """The abstract value of an expression; its operations become nodes."""
    handler = _EXPRESSIONS.get(type(node))
    return handler(node, scope) if handler is not None else UNKNOWN


def _constant(node: ast.Constant, scope: Scope) -> Value:
    return Const(node.value)


def _name(node: ast.Name, scope: Scope) -> Value:
    found = scope.env.get(node.id)
    if found is not None:
        return found
    outer = scope.env.get("<closure>")
    if isinstance(outer, Closure):
        found = outer.scope.env.get(node.id)
        if found is not None:
            return found
    ref = resolve(scope.file, node.id)
    if isinstance(ref, ExpressionRef):
        return _top_level(ref, scope)
    if ref is not None:
        return ref
    return Builtin(node.id) if node.id in builtins.BUILTINS else UNKNOWN


def _top_level(ref: ExpressionRef, scope: Scope) -> Value:
    """The value of a name assigned at the top of a file."""
    if scope.helpers > HELPERS + 2:
        return UNKNOWN
    state = State(None)
    if scope.state.work > MAX_WORK:
        return UNKNOWN
    return evaluate(ref.node, Scope(state, ref.file, {}, None, helpers=scope.helpers + 1))


def _attribute(node: ast.Attribute, scope: Scope) -> Value:
    return attribute(evaluate(node.value, scope), node.attr, node, scope)


def attribute(value: Value, name: str, at: ast.expr, scope: Scope) -> Value:
    """`value.name`."""
    if isinstance(value, fx.Node):
        if name in builtins.PLAIN_ATTRIBUTES:
            return DATA
        if name in ("T", "mT", "H", "mH", "real", "imag", "data"):
            return emit(scope, "call_function", getattr, (value, name), {}, Facts("layout", name), at)
        if hasattr(torch.Tensor, name):
            return Attribute(value, name)
        return emit(scope, "call_function", getattr, (value, name), {}, Facts("layout", "getattr"), at)
    if isinstance(value, Instance):
        return _of_instance(value, name, at, scope)
    if isinstance(value, BaseCall):
        return _of_base(value, name)
    if isinstance(value, (Known, FileRef)):
        found = member(value, name)
        if isinstance(found, ExpressionRef):
            return _top_level(found, scope)
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
        return _seen(scope.env["self." + name], child(value.path, name), at, scope)
    module = value.module
    if module.cls is not None:
        stored = None
        if scope.live or not own:
            stored = attributes(module).get(name)
        if stored is not None:
            return _seen(stored, child(value.path, name), at, scope)
        found = method(module.cls, name)
        if isinstance(found, Method):
            if "property" in found.decorators or "cached_property" in found.decorators:
                return inline(Bound(value, found), Arguments(), at, scope)
            if "staticmethod" in found.decorators:
                return FunctionRef(found.cls.file, f"{found.cls.qualname}.{name}", found.node)
            return Bound(value, found)
        assigned = class_attribute(module.cls, name)
        if assigned is not None:
            made = evaluate(assigned[1], Scope(State(None), assigned[0].file, {}, None, helpers=scope.helpers + 1))
            return made if is_callable(made) or isinstance(made, Const) else DATA
    for key, element in builtins.items_of(module) or ():
        if key == name:
            return _seen(element, child(value.path, name), at, scope)
    base = module.torch or (torch_base(module.cls) if module.cls is not None else None)
    parameter = builtins.torch_attribute(module, base, name)
    if parameter is not None:
        return _seen(parameter, child(value.path, name), at, scope)
    if base is not None and hasattr(base, name):
        return Attribute(value, name)
    if name == "training":
        return DATA
    if builtins.is_module_method(name) or name in ("__call__", "items", "values", "keys", "children", "forward"):
        return Attribute(value, name)
    if module.role == "leaf":
        return DATA
    return Instance(child(value.path, name), UNKNOWN_MODULE) if scope.live else UNKNOWN


def _seen(stored: Value, path: str, at: ast.expr, scope: Scope) -> Value:
    """An attribute's value as an expression meets it."""
    if not scope.live:
        return stored
    if isinstance(stored, Module) and stored.role in ("parameter", "buffer"):
        node = emit(scope, "get_attr", path, (), {}, stored.facts, at)
        node.meta["constructor"] = stored.constructor
        node.meta["conditional"] = stored.optional
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


def _binop(node: ast.BinOp, scope: Scope) -> Value:
    return _binary(node.op, evaluate(node.left, scope), evaluate(node.right, scope), node, scope)


def _binary(
    op: ast.operator, left: Value, right: Value, at: ast.expr | ast.AugAssign, scope: Scope, inplace: bool = False
) -> Value:
    tensors = isinstance(left, fx.Node) or isinstance(right, fx.Node)
    if not tensors and isinstance(op, ast.Add):
        if isinstance(left, Tup) and isinstance(right, Tup):
            joined = builtins.extend(left, right)
            return dataclasses.replace(joined, exact=joined.exact and scope.loops == 0)
        if isinstance(left, (Tup, Object)) and any(nodes_of(left)) or isinstance(right, Tup) and any(nodes_of(right)):
            a, b = operand(left), operand(right)
            tensors = isinstance(a, fx.Node) and isinstance(b, fx.Node)
            if not tensors:
                return left if isinstance(left, Tup) else right
        elif isinstance(left, Tup):
            return Tup((*left.items, UNKNOWN), False, left.builtin)
    if not tensors and isinstance(op, ast.Mult):
        for listed, times in ((left, right), (right, left)):
            if isinstance(listed, Tup):
                return Tup(listed.items[:1], False, listed.builtin) if listed.items else listed
            if isinstance(listed, Module) and listed.role == "buffer":
                return listed
    if not tensors or not scope.live:
        if isinstance(left, Const) and isinstance(right, Const):
            return _fold(op, left, right)
        return DATA
    target = _OPERATORS[type(op)][1 if inplace else 0]
    a, b = operand(left), operand(right)
    if target in _ADDS and not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        scope.state.scalars += 1
    return emit(scope, "call_function", target, (a, b), {}, _of(target), at)


def _fold(op: ast.operator, left: Const, right: Const) -> Value:
    a, b = left.value, right.value
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))) or isinstance(op, (ast.Pow, ast.LShift)):
        return DATA
    try:
        return Const(_OPERATORS[type(op)][0](a, b))
    except (ArithmeticError, TypeError, ValueError):
        return DATA


def _unary(node: ast.UnaryOp, scope: Scope) -> Value:
    value = evaluate(node.operand, scope)
    if isinstance(value, fx.Node) and scope.live:
        if isinstance(node.op, ast.USub):
            return emit(scope, "call_function", operator.neg, (value,), {}, _of(operator.neg), node)
        if isinstance(node.op, ast.Invert):
            return emit(scope, "call_function", operator.invert, (value,), {}, _of(operator.invert), node)
        return DATA
    if isinstance(value, Const) and isinstance(node.op, ast.USub) and isinstance(value.value, (int, float)):
        return Const(-value.value)
    if isinstance(value, Const) and isinstance(node.op, ast.Not):
        return Const(not value.value)
    return DATA


def _compare(node: ast.Compare, scope: Scope) -> Value:
    left = evaluate(node.left, scope)
    right = evaluate(node.comparators[0], scope)
    target = _COMPARISONS.get(type(node.ops[0]))
    if scope.live and target is not None and (isinstance(left, fx.Node) or isinstance(right, fx.Node)):
        return emit(scope, "call_function", target, (operand(left), operand(right)), {}, _of(target), node)
    return DATA


def _boolop(node: ast.BoolOp, scope: Scope) -> Value:
    values = [evaluate(value, scope) for value in node.values]
    if isinstance(node.op, ast.And):
        return values[-1] if not isinstance(values[-1], Const) else DATA
    present = [value for value in values if not is_absent(value) and not _is_false(value)]
    if not present:
        return values[-1] if not isinstance(values[-1], External) else UNKNOWN
    return join_all(present, scope, node)


def _is_false(value: Value) -> bool:
    return isinstance(value, Const) and not value.value


def _ifexp(node: ast.IfExp, scope: Scope) -> Value:
    _evaluate_test(node.test, scope)
    decided = truth(node.test, scope)
    if decided is not None:
        return evaluate(node.body if decided else node.orelse, scope)
    return join(evaluate(node.body, scope), evaluate(node.orelse, scope), scope, node)


def _subscript(node: ast.Subscript, scope: Scope) -> Value:
    value = evaluate(node.value, scope)
    if isinstance(value, (ClassRef, External)) and not scope.live:
        return value if isinstance(value, ClassRef) else UNKNOWN
    key = evaluate(node.slice, scope)
    return subscript(value, key, node, scope)


def subscript(value: Value, key: Value, at: ast.expr, scope: Scope) -> Value:
    """`value[key]`."""
    if isinstance(value, fx.Node):
        return _getitem(value, plain(key), at, scope)
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


def _from_table(table: Table, key: Value, scope: Scope, at: ast.expr, made: bool) -> Value:
    """An entry of a table of classes; `made`: the table hands out instances."""
    if isinstance(key, Const) and isinstance(key.value, str) and key.value in table.items:
        entry = table.items[key.value]
        return apply(entry, Arguments(), at, scope) if made and not isinstance(entry, Tup) else entry
    if made:
        kind = builtins.table_facts(table)
        return Module("opaque", kind) if kind is not None else UNKNOWN
    return join_all(list(table.items.values())[:6], scope, at)


def _sliced(value: Tup, key: Object) -> Value:
    bounds = [item.value if isinstance(item, Const) else 0 for item in key.args]
    if all(isinstance(item, Const) for item in key.args) and value.exact:
        if all(bound is None or isinstance(bound, int) for bound in bounds) and bounds[2] != 0:
            return Tup(value.items[slice(*bounds)], True, value.builtin)
    return Tup(value.items, False, value.builtin)


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
                return _seen(item, child(path, name), at, scope)
        if items and isinstance(key.value, int):
            return _seen(items[-1][1], child(path, wanted), at, scope)
    if not items:
        return Instance(child(path, "*"), UNKNOWN_MODULE) if scope.live else UNKNOWN
    elements = iterate(value, scope, at)
    return elements.items[0] if len(elements.items) == 1 else _either(elements.items, scope, at)


def _either(items: tuple[Value, ...], scope: Scope, at: ast.expr) -> Value:
    return Either(items[:4]) if all(is_callable(item) for item in items) else join_all(items[:4], scope, at)


def _tuple(node: ast.Tuple | ast.List | ast.Set, scope: Scope) -> Value:
    items: list[Value] = []
    exact = True
    for element in node.elts:
        if isinstance(element, ast.Starred):
            inner = iterate(evaluate(element.value, scope), scope, element)
            items += inner.items
            exact = exact and inner.exact
        else:
            items.append(evaluate(element, scope))
    return Tup(tuple(items), exact, tuple if isinstance(node, ast.Tuple) else list)


def _dict(node: ast.Dict, scope: Scope) -> Value:
    items: dict[Any, Value] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        made = evaluate(value, scope)
        if key is None:
            if isinstance(made, Table):
                items.update(made.items)
            continue
        name = evaluate(key, scope)
        items[name.value if isinstance(name, Const) and isinstance(name.value, (str, int)) else "*"] = made
    return Table(items)


def _comprehension(node: ast.ListComp | ast.GeneratorExp | ast.SetComp, scope: Scope) -> Value:
    saved = dict(scope.env)
    sources_ = [iterate(evaluate(node.generators[0].iter, scope), scope, node)]
    results: list[Value] = []
    only = len(node.generators) == 1 and not node.generators[0].ifs
    unrolled = only and sources_[0].exact and len(sources_[0].items) <= MAX_UNROLL
    scope.loops += 1
    for item in sources_[0].items if unrolled else sources_[0].items[:1]:
        assign(node.generators[0].target, item, scope)
        for generator in node.generators[1:]:
            inner = iterate(evaluate(generator.iter, scope), scope, node)
            assign(generator.target, inner.items[0] if inner.items else UNKNOWN, scope)
        results.append(evaluate(node.elt, scope))
    scope.loops -= 1
    scope.env = saved
    return Tup(tuple(results), unrolled, list)


def _dict_comprehension(node: ast.DictComp, scope: Scope) -> Value:
    saved = dict(scope.env)
    for generator in node.generators:
        inner = iterate(evaluate(generator.iter, scope), scope, node)
        assign(generator.target, inner.items[0] if inner.items else UNKNOWN, scope)
    value = evaluate(node.value, scope)
    scope.env = saved
    return Table({"*": value})


def _walrus(node: ast.NamedExpr, scope: Scope) -> Value:
    value = evaluate(node.value, scope)
    assign(node.target, value, scope)
    return value


def _inner(node: ast.Await | ast.Starred | ast.YieldFrom, scope: Scope) -> Value:
    return evaluate(node.value, scope)


def _yield(node: ast.Yield, scope: Scope) -> Value:
    if node.value is not None:
        scope.returns.append(Tup((evaluate(node.value, scope),), False))
    return UNKNOWN


def _lambda(node: ast.Lambda, scope: Scope) -> Value:
    return Closure(node, scope)


def _slice(node: ast.Slice, scope: Scope) -> Value:
    parts = (evaluate(part, scope) if part is not None else Const(None) for part in (node.lower, node.upper, node.step))
    return Object("slice", {}, tuple(parts))


def _data(node: ast.expr, scope: Scope) -> Value:
    return DATA


def _evaluate_test(node: ast.expr, scope: Scope) -> None:
    """Bind what a condition binds. Its operations are no data flow and make no nodes."""
    if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
        evaluate(node, scope)


def truth(node: ast.expr, scope: Scope) -> bool | None:
    """Whether a condition holds, if that is certain from constants at hand."""
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.Name):
        value = scope.env.get(node.id)
        return bool(value.value) if isinstance(value, Const) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = truth(node.operand, scope)
        return None if inner is None else not inner
    if isinstance(node, ast.BoolOp):
        parts = [truth(value, scope) for value in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.left, ast.Name):
        value = scope.env.get(node.left.id)
        other = node.comparators[0]
        if not isinstance(other, ast.Constant):
            return None
        if isinstance(node.ops[0], (ast.Is, ast.IsNot)) and other.value is None:
            absent = isinstance(value, Const) and value.value is None
            present = isinstance(value, (Tup, Table, Closure, Partial)) or isinstance(value, Const) and not absent
            return (absent == isinstance(node.ops[0], ast.Is)) if absent or present else None
        if isinstance(node.ops[0], (ast.Eq, ast.NotEq)) and isinstance(value, Const):
            return bool(value.value == other.value) == isinstance(node.ops[0], ast.Eq)
    return None


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
                return Tup((_seen(stored[0], child(path, "*"), at, scope),), False)
            seen = tuple(_seen(item, child(path, name), at, scope) for name, item in items[:MAX_UNROLL])
            return Tup(seen, all(name != "*" for name, _ in items))
        if scope.live and isinstance(value, Instance):
            return Tup((Instance(child(path, "*"), UNKNOWN_MODULE),), False)
    if isinstance(value, Table):
        return Tup(tuple(Const(key) for key in value.items))
    if isinstance(value, fx.Node):
        return Tup((_getitem(value, None, at, scope),), False)
    if isinstance(value, Object):
        present = tuple(item for item in (*value.args, *value.fields.values()) if not is_absent(item))
        return Tup(present) if present else Tup((UNKNOWN,), False)
    return Tup((DATA if value == DATA else UNKNOWN,), False)


# Calls


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
    grown = builtins.grown(base, name, arguments.args, scope)
    if grown is not None:
        assign(func.value, grown, scope)
        return Const(None)
    if isinstance(base, BaseCall) and name == "__init__":
        return _base_init(base, arguments, at, scope)
    if isinstance(base, Instance) and base == scope.instance:
        if name in ("register_parameter", "register_buffer", "add_module", "register_module") and not scope.live:
            return _register(name, arguments, scope)
    if isinstance(base, (Tup, Table)):
        result = builtins.container_method(base, name, arguments.args, scope, at)
        return result if result is not None else DATA
    if isinstance(base, Module):
        return base if builtins.is_module_method(name) else UNKNOWN
    return apply(attribute(base, name, func, scope), arguments, at, scope)


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
        elif name in ("add_module", "register_module"):
            known = scope.env.get(ELEMENTS)
            items = known.items if isinstance(known, Tup) else ()
            scope.env[ELEMENTS] = Tup((*items, args[1]), False)
    return Const(None)


def apply(callee: Value, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """The result of a call."""
    if isinstance(callee, Instance):
        return call_module(callee, arguments, at, scope)
    if isinstance(callee, (Bound, Closure, FunctionRef)):
        return inline(callee, arguments, at, scope)
    if isinstance(callee, Partial):
        merged = Arguments(callee.args + arguments.args, {**callee.kwargs, **arguments.kwargs}, arguments.open)
        return apply(callee.callee, merged, at, scope)
    if isinstance(callee, Either):
        return join_all([apply(option, arguments, at, scope) for option in callee.options], scope, at)
    if isinstance(callee, Known):
        return _call_known(callee.obj, arguments, at, scope)
    if isinstance(callee, ClassRef):
        return _construct(callee, arguments, scope)
    if isinstance(callee, Builtin):
        return _call_builtin(callee.name, arguments, at, scope)
    if isinstance(callee, Attribute):
        return _call_method(callee, arguments, at, scope)
    if isinstance(callee, External):
        return _call_external(callee, arguments, at, scope)
    if isinstance(callee, Const) and callee.value is None:
        return UNKNOWN
    return _unknown_call(arguments, at, scope)


def _unknown_call(arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A call of something unknown. If it is handed a function of ours first, as checkpointing wrappers are, that runs."""
    if not scope.live:
        return UNKNOWN
    head = arguments.args[0] if arguments.args else None
    rest = dataclasses.replace(arguments, args=arguments.args[1:])
    if head is not None and head != scope.instance and isinstance(head, (Bound, Closure, Instance, Partial)):
        if rest.nodes:
            return apply(head, Arguments(rest.args, {}, True), at, scope)
    nodes = arguments.nodes
    if not nodes:
        return UNKNOWN
    return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)


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
    return _unknown_call(arguments, at, scope)


def _call_known(target: Any, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A class or function of torch or of the standard library."""
    args, kwargs = arguments.args, arguments.kwargs
    if isinstance(target, type):
        if issubclass(target, (nn.Module, nn.Parameter)):
            # tensors in a constructor of torch.nn in `forward` are rare and of no interest here
            return builtins.construct(target, args, kwargs, scope, at if isinstance(at, ast.Call) else None)
        if target.__module__ == "functools" and target.__name__ == "partial":
            return Partial(args[0], args[1:], kwargs) if args else UNKNOWN
        if issubclass(target, torch.Tensor) and arguments.nodes:
            return emit(scope, "call_function", opaque, arguments.nodes, {}, OPAQUE, at)
        return DATA
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
    if home.split(".")[0] == "operator" or home == "_operator":
        if name == "getitem" and len(args) == 2:
            return subscript(args[0], args[1], at, scope)
    nodes = arguments.nodes
    if not nodes and name not in builtins.FACTORIES:
        return DATA
    if nodes and (head := args[0] if args else None) is not None and is_callable(head):
        return _unknown_call(arguments, at, scope)
    if not isinstance(target, type(operator.add)) and not hasattr(target, "__name__"):
        return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)
    own = _of(target)
    if name in ("addcmul", "addmm", "lerp"):
        own = dataclasses.replace(own)
    flag = kwargs.get("inplace")
    if isinstance(flag, Const) and flag.value is True:
        own = dataclasses.replace(own, inplace=True)
    _count_scalar(own, args, kwargs, scope)
    given = {key: plain(value) for key, value in kwargs.items()}
    return emit(scope, "call_function", target, (plain(value) for value in args), given, own, at)


def _known_in_init(target: Any, name: str, home: str, args: tuple[Value, ...]) -> Value:
    if args and isinstance(args[0], (Module, Tup)) and (builtins.wraps(target) or name == "_get_clones"):
        return Tup((args[0],), False) if name == "_get_clones" else args[0]
    if home == "torch.nn.init" or home.startswith(("math", "operator", "_operator")) or name in builtins.PLAIN_FUNCTIONS:
        return DATA
    if args and isinstance(args[0], Module) and args[0].role != "buffer":
        return args[0]
    return builtins.tensor_attribute_value() if builtins.is_torch_function(target) else DATA


def _count_scalar(own: Facts, args: tuple[Value, ...], kwargs: dict[str, Value], scope: Scope) -> None:
    if own.type in ("add", "sub") and len(nodes_in(args, kwargs)) < 2:
        scope.state.scalars += 1


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
        return _opaque_result(arguments, at, scope)
    if isinstance(value, BaseCall):
        base = torch_base(value.instance.module.cls) if value.instance.module.cls is not None else None
        if name == "forward" and base is not None and base is not nn.Module and scope.live:
            return _call_torch_base(value.instance, base, arguments, at, scope)
        return _opaque_result(arguments, at, scope)
    if isinstance(value, Object):
        if name in ("to_tuple", "values"):
            return iterate(value, scope, at)
        extra = Arguments((*arguments.args, *nodes_of(value)), arguments.kwargs, arguments.open)
        return _unknown_call(extra, at, scope)
    return _unknown_call(arguments, at, scope)


def _opaque_result(arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    nodes = arguments.nodes
    if not nodes or not scope.live:
        return UNKNOWN if not scope.live else DATA
    return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)


def _call_torch_base(
    instance: Instance, base: type[nn.Module], arguments: Arguments, at: ast.expr, scope: Scope
) -> Value:
    """`super().forward(x)` where torch's own class provides it."""
    if issubclass(base, nn.Sequential):
        return _call_elements(instance, arguments, at, scope)
    return _leaf(instance, facts.of_class(base), arguments, at, scope)


_FUNCTION_OF_BUILTIN: dict[str, Any] = {"abs": torch.abs, "pow": torch.pow, "round": torch.round}


def _call_builtin(name: str, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args = arguments.args
    if name in _FUNCTION_OF_BUILTIN and args and isinstance(args[0], fx.Node):
        return _call_known(_FUNCTION_OF_BUILTIN[name], arguments, at, scope)
    if name == "range" or name in builtins.PLAIN_BUILTINS:
        return Tup((DATA,), False) if name == "range" else DATA
    if name in ("list", "tuple", "set", "frozenset", "sorted", "iter"):
        made = iterate(args[0], scope, at) if args else Tup(())
        return Tup(made.items, made.exact, tuple if name == "tuple" else list)
    if name == "reversed" and args:
        inner = iterate(args[0], scope, at)
        return Tup(inner.items[::-1], inner.exact)
    if name == "enumerate" and args:
        inner = iterate(args[0], scope, at)
        return Tup(tuple(Tup((DATA, item)) for item in inner.items), inner.exact)
    if name == "zip" and args:
        return _zip([iterate(value, scope, at) for value in args])
    if name == "getattr" and len(args) > 1:
        if isinstance(args[1], Const) and isinstance(args[1].value, str):
            return attribute(args[0], args[1].value, at, scope)
        return _some_attribute(args[0], at, scope)
    if name == "map" and len(args) > 1:
        inner = iterate(args[1], scope, at)
        items = inner.items[:MAX_UNROLL]
        return Tup(tuple(apply(args[0], Arguments((item,)), at, scope) for item in items), inner.exact)
    if name == "filter" and len(args) > 1:
        return iterate(args[1], scope, at)
    if name == "dict":
        table = args[0].items if args and isinstance(args[0], Table) else {}
        return Table({**table, **arguments.kwargs})
    if name in ("min", "max"):
        return join_all(args, scope, at) if any(isinstance(value, fx.Node) for value in args) else DATA
    if name == "sum" and args:
        return _sum(iterate(args[0], scope, at), at, scope)
    if name == "next" and args:
        inner = iterate(args[0], scope, at)
        return inner.items[0] if inner.items else UNKNOWN
    return _unknown_call(arguments, at, scope) if scope.live else UNKNOWN


def _some_attribute(value: Value, at: ast.expr, scope: Scope) -> Value:
    """`getattr(self, f"layer{i}")`: a module of unknown name."""
    if isinstance(value, Known) or not isinstance(value, Instance) or not scope.live:
        return UNKNOWN
    return Instance(child(value.path, "*"), UNKNOWN_MODULE)


def _zip(parts: list[Tup]) -> Tup:
    if all(part.exact for part in parts):
        rows = zip(*(part.items for part in parts), strict=False)
        return Tup(tuple(Tup(tuple(row)) for row in rows))
    lengths = [len(part.items) for part in parts if part.exact]
    if lengths and min(lengths) <= MAX_UNROLL and all(part.items for part in parts):
        rows = zip(*(part.items if part.exact else (*part.items, *part.items[-1:] * 64) for part in parts), strict=False)
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
        total = emit(scope, "call_function", operator.add, (total, node), {}, _of(operator.add), at)
    return total


# Modules


def call_module(instance: Instance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """`self.attribute(...)`."""
    if not scope.live:
        return UNKNOWN
    module = instance.module
    if module.cls is not None:
        found = method(module.cls, "forward")
        base = torch_base(module.cls)
        if isinstance(found, Method):
            if scope.depth < DEPTH and not _too_much(scope) and not _entered(found.node, instance.path, scope):
                return _inline_module(instance, found, arguments, at, scope)
            return _leaf(instance, module_facts(module), arguments, at, scope)
        if base is not None and issubclass(base, nn.Sequential):
            return _call_elements(instance, arguments, at, scope)
        return _leaf(instance, module_facts(module), arguments, at, scope)
    if module.role == "sequential":
        return _call_elements(instance, arguments, at, scope)
    if module.role in ("parameter", "buffer"):
        return UNKNOWN
    nodes = arguments.nodes
    if module.role == "opaque" and not nodes:
        return DATA
    return _leaf(instance, module.facts, arguments, at, scope)


def _leaf(instance: Instance, own: Facts, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    args = [plain(value) for value in arguments.args]
    kwargs = {key: plain(value) for key, value in arguments.kwargs.items()}
    return emit(scope, "call_module", instance.path or "self", args, kwargs, own, at)


def _too_much(scope: Scope) -> bool:
    state = scope.state
    if state.work > MAX_WORK or state.count > MAX_NODES:
        state.notes["analysis cut short: too large"] = None
        return True
    return len(scope.active) > MAX_STACK


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
    return result


def _call_elements(instance: Instance, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A Sequential: its elements in order, called from where it is called."""
    module = instance.module
    if module.cls is not None:
        attributes(module)
    items = builtins.items_of(module)
    if not items or all(value == UNKNOWN for _, value in items):
        own = dataclasses.replace(module_facts(module), weight=True)
        return _leaf(instance, own, arguments, at, scope)
    name = module.cls.qualname if module.cls is not None else module.facts.type
    call = _enter(instance, module_facts(module), name, arguments, at, scope)
    outer, scope.call = scope.call, call
    value: Value = arguments.args[0] if arguments.args else next(iter(arguments.kwargs.values()), UNKNOWN)
    for key, element in items:
        seen = _seen(element, child(instance.path, key), at, scope)
        before = value
        if isinstance(seen, Const) and seen.value is None:
            continue
        scope.depth += 1 if isinstance(seen, Instance) and seen.module.role == "sequential" else 0
        value = apply(seen, Arguments((value,)), at, scope)
        scope.depth -= 1 if isinstance(seen, Instance) and seen.module.role == "sequential" else 0
        if is_absent(value):
            value = before
    scope.call = outer
    call.outputs = list(nodes_of(value))
    return value


@lru_cache(maxsize=8192)
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
                if isinstance(value, Known) and isinstance(value.obj, type) and issubclass(value.obj, nn.Module):
                    if facts.of_class(value.obj).kind == "activation":
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


def _construct(cls: ClassRef, arguments: Arguments, scope: Scope) -> Value:
    if is_module(cls):
        own = class_facts(cls) if torch_base(cls) is not None else Facts("other", cls.name)
        return Module("class", own, cls=cls, args=arguments.args, kwargs=arguments.kwargs, open=arguments.open)
    names = [n.target.id for n in cls.node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = dict(zip(names, arguments.args, strict=False))
    return Object(cls.name, {**fields, **arguments.kwargs}, arguments.args[len(fields) :])


_shared: dict[Any, dict[str, Value]] = {}
_pending: set[int] = set()
_MAX_SHARED = 4000


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


# Functions


def inline(callee: Bound | Closure | FunctionRef, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """Analyse the body of a function, method or lambda in place of its call."""
    if isinstance(callee, Bound):
        found, instance = callee.method, callee.instance
        if instance != scope.instance and found.node.name in ("forward", "__call__"):
            return call_module(instance, arguments, at, scope)
        if _too_much(scope) or _entered(found.node, instance.path, scope):
            return _opaque_result(arguments, at, scope)
        if found.decorators and "classmethod" in found.decorators:
            return _opaque_result(arguments, at, scope)
        deeper = scope.depth if instance == scope.instance else scope.depth + 1
        if deeper > DEPTH:
            return _opaque_result(arguments, at, scope)
        return _run(found.node, found.cls.file, _place(found), arguments, scope, at, instance, found.cls, scope.call)
    if isinstance(callee, Closure):
        if _too_much(scope) or _entered(callee.node, "", scope):
            return _opaque_result(arguments, at, scope)
        return _run_closure(callee, arguments, at, scope)
    if scope.helpers >= HELPERS or _too_much(scope) or _entered(callee.node, "", scope):
        return _unknown_call(arguments, at, scope)
    if not scope.live and not callee.node.args.args and not callee.node.args.kwonlyargs and not callee.node.args.kwarg:
        if not any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(callee.node)):
            return UNKNOWN
    place = Place("", callee.qualname, callee.file, _first_line(callee.node))
    result = _run(callee.node, callee.file, place, arguments, scope, at, None, None, scope.call)
    if scope.live and is_absent(result) and arguments.nodes and any(_returns(callee.node)):
        return emit(scope, "call_function", opaque, arguments.nodes, {}, OPAQUE, at)
    return result


def _returns(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[bool]:
    return [True for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None]


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
        depth=scope.depth + (1 if instance is not None and not own_self else 0),
        helpers=scope.helpers + (1 if instance is None else 0),
        loops=scope.loops if not scope.live and own_self else 0,
        active=(*scope.active, (node, instance.path if instance is not None else "")),
    )
    if own_self:
        inner.env.update({key: value for key, value in scope.env.items() if key.startswith("self.")})
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    bind(node.args, file, arguments, inner, None if static else instance)
    loops, inner.loops = inner.loops, 0
    inner.loops = loops
    execute(node.body, inner)
    if own_self:
        scope.env.update({key: value for key, value in inner.env.items() if key.startswith("self.")})
    return join_all(inner.returns, inner, _end(node)) if inner.returns else Const(None)


def _end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.stmt:
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
        depth=max(scope.depth, made_in.depth),
        helpers=scope.helpers,
        active=(*scope.active, (callee.node, "")),
    )
    inner.env = dict(made_in.env)
    bind(callee.node.args, made_in.file, arguments, inner, None)
    if isinstance(callee.node, ast.Lambda):
        return evaluate(callee.node.body, inner)
    execute(callee.node.body, inner)
    return join_all(inner.returns, inner, _end(callee.node)) if inner.returns else Const(None)


def bind(signature: ast.arguments, file: str, arguments: Arguments, inner: Scope, instance: Instance | None) -> None:
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


def _of(target: Any) -> Facts:
    return _facts_of(target)


@lru_cache(maxsize=4096)
def _facts_of(target: Any) -> Facts:
    return facts.of_function(target)


_EXPRESSIONS: dict[type[ast.expr], Callable[[Any, Scope], Value]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.BinOp: _binop,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolop,
    ast.Compare: _compare,
    ast.IfExp: _ifexp,
    ast.Subscript: _subscript,
    ast.Tuple: _tuple,
    ast.List: _tuple,
    ast.Set: _tuple,
    ast.Dict: _dict,
    ast.ListComp: _comprehension,
    ast.GeneratorExp: _comprehension,
    ast.SetComp: _comprehension,
    ast.DictComp: _dict_comprehension,
    ast.NamedExpr: _walrus,
    ast.Await: _inner,
    ast.Starred: _inner,
    ast.YieldFrom: _inner,
    ast.Yield: _yield,
    ast.Lambda: _lambda,
    ast.Slice: _slice,
    ast.Call: _call,
    ast.JoinedStr: _data,
    ast.FormattedValue: _data,
}
