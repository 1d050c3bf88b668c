"""Expressions of static capture."""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from .. import sources
from . import static_builtins as builtins
from .static_access import assign, attribute, iterate, subscript, top_level
from .static_core import evaluate, of_target
from .static_exact import compare, holds
from .static_names import (
    ClassRef,
    ExpressionRef,
    External,
    resolve,
)
from .static_values import (
    DATA,
    UNKNOWN,
    Builtin,
    Closure,
    Const,
    Instance,
    Module,
    Object,
    Partial,
    Scope,
    Table,
    Tup,
    Value,
    emit,
    is_absent,
    is_callable,
    join,
    join_all,
    nodes_of,
    operand,
)

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


@evaluate.register
def _constant(node: ast.Constant, scope: Scope) -> Value:
    return Const(node.value)


@evaluate.register
def _name(node: ast.Name, scope: Scope) -> Value:
    found = scope.env.get(node.id)
    if found is not None:
        return found
    outer = scope.env.get("<closure>")
    if isinstance(outer, Closure):
        found = outer.scope.env.get(node.id)
        if found is not None:
            return found
    if scope.real is not None and scope.state.lift is not None:
        return scope.state.lift(scope.real[node.id], scope, node, "") if node.id in scope.real else UNKNOWN
    ref = resolve(scope.file, node.id)
    if isinstance(ref, ExpressionRef):
        return top_level(ref, scope)
    if ref is not None:
        return ref
    return Builtin(node.id) if node.id in builtins.BUILTINS else UNKNOWN


@evaluate.register
def _attribute(node: ast.Attribute, scope: Scope) -> Value:
    return attribute(evaluate(node.value, scope), node.attr, node, scope)


@evaluate.register
def _binop(node: ast.BinOp, scope: Scope) -> Value:
    return binary(node.op, evaluate(node.left, scope), evaluate(node.right, scope), node, scope)


def binary(
    op: ast.operator, left: Value, right: Value, at: ast.expr | ast.AugAssign, scope: Scope, inplace: bool = False
) -> Value:
    """The value of a binary operation or augmented assignment."""
    listed = _of_lists(op, left, right, at, scope)
    if listed is not None:
        return listed
    a, b = operand(left), operand(right)
    if scope.state.exact and isinstance(a, str) and isinstance(b, str) and isinstance(op, ast.Add):
        return Const(a + b)
    if isinstance(op, ast.Add) and (isinstance(a, str) or isinstance(b, str)):
        return DATA  # text, whatever the other is
    if not scope.live or not (isinstance(a, fx.Node) or isinstance(b, fx.Node)):
        return _fold(op, left, right) if isinstance(left, Const) and isinstance(right, Const) else DATA
    target = _OPERATORS[type(op)][1 if inplace else 0]
    if target in _ADDS and not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        scope.state.scalars += 1
    return emit(scope, "call_function", target, (a, b), {}, of_target(target), at)


def _of_lists(op: ast.operator, left: Value, right: Value, at: ast.expr | ast.AugAssign, scope: Scope) -> Value | None:
    """`list + list` and `list * number`; None for arithmetic."""
    written = at.right if isinstance(at, ast.BinOp) else at.value if isinstance(at, ast.AugAssign) else None
    if isinstance(op, ast.Add):
        if isinstance(left, Tup) and isinstance(right, Tup):
            joined = builtins.extend(left, right, scope)
            return dataclasses.replace(joined, exact=joined.exact and scope.loops == 0)
        for value in (left, right):
            if isinstance(value, Tup) and not value.exact:  # a list that was collected, no function's results
                return value
        if isinstance(written, (ast.Tuple, ast.List)):  # the left side is some list we know nothing of
            return right
        if isinstance(left, Tup) and isinstance(at, ast.BinOp) and isinstance(at.left, (ast.Tuple, ast.List)):
            return Tup((*left.items, UNKNOWN), False, left.builtin)  # a list of which the rest is not known
        if isinstance(left, Tup) and not any(nodes_of(left)) and not isinstance(right, fx.Node):
            return Tup((*left.items, UNKNOWN), False, left.builtin)
    return _repeated(left, right, scope) if isinstance(op, ast.Mult) else None


def _repeated(left: Value, right: Value, scope: Scope) -> Value | None:
    """`list * number`; None for arithmetic."""
    for value, other in ((left, right), (right, left)):
        if isinstance(value, Tup) and not isinstance(other, fx.Node):
            if scope.state.exact and isinstance(other, Const) and isinstance(other.value, int):
                return Tup(value.items * min(other.value, scope.state.limits.elements), value.exact, value.builtin)
            return Tup(value.items[:1], False, value.builtin) if value.items else value
        if isinstance(value, Module) and value.role == "buffer":
            return value
    return None


def _fold(op: ast.operator, left: Const, right: Const) -> Value:
    a, b = left.value, right.value
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))) or isinstance(op, (ast.Pow, ast.LShift)):
        return DATA
    try:
        return Const(_OPERATORS[type(op)][0](a, b))
    except (ArithmeticError, TypeError, ValueError):
        return DATA


@evaluate.register
def _unary(node: ast.UnaryOp, scope: Scope) -> Value:
    value = evaluate(node.operand, scope)
    if isinstance(value, fx.Node) and scope.live:
        if isinstance(node.op, ast.USub):
            return emit(scope, "call_function", operator.neg, (value,), {}, of_target(operator.neg), node)
        if isinstance(node.op, ast.Invert):
            return emit(scope, "call_function", operator.invert, (value,), {}, of_target(operator.invert), node)
        return DATA
    if isinstance(value, Const) and isinstance(node.op, ast.USub) and isinstance(value.value, (int, float)):
        return Const(-value.value)
    if isinstance(value, Const) and isinstance(node.op, ast.Not):
        return Const(not value.value)
    if scope.state.exact and isinstance(node.op, ast.Not):
        truth_of_it = holds(value)
        return DATA if truth_of_it is None else Const(not truth_of_it)
    return DATA


@evaluate.register
def _compare(node: ast.Compare, scope: Scope) -> Value:
    left = evaluate(node.left, scope)
    right = evaluate(node.comparators[0], scope)
    target = _COMPARISONS.get(type(node.ops[0]))
    tensors = target is not None and (isinstance(left, fx.Node) or isinstance(right, fx.Node))
    if scope.state.exact and len(node.ops) == 1 and not tensors:
        return compare(node.ops[0], left, right)
    if scope.live and target is not None and (isinstance(left, fx.Node) or isinstance(right, fx.Node)):
        return emit(scope, "call_function", target, (operand(left), operand(right)), {}, of_target(target), node)
    return DATA


@evaluate.register
def _boolop(node: ast.BoolOp, scope: Scope) -> Value:
    if scope.state.exact:
        return _short_circuit(node, scope)
    values = []
    for part in node.values:
        values.append(evaluate(part, scope))
        if isinstance(node.op, ast.Or) and is_callable(values[-1]) and not isinstance(values[-1], (Module, Instance)):
            break  # a class or function is true
    if isinstance(node.op, ast.And):
        return values[-1] if not isinstance(values[-1], Const) else DATA
    present = [value for value in values if not is_absent(value) and not _is_false(value)]
    if not present:
        return values[-1] if not isinstance(values[-1], External) else UNKNOWN
    return join_all(present, scope, node)


def _short_circuit(node: ast.BoolOp, scope: Scope) -> Value:
    """`and` and `or` as Python evaluates them, operand by operand until one decides."""
    decisive = isinstance(node.op, ast.Or)
    possible: list[Value] = []
    for part in node.values:
        value = evaluate(part, scope)
        certain = holds(value)
        if certain is decisive:
            return value if not possible or not decisive else join_all([*possible, value], scope, node)
        if certain is None or part is node.values[-1]:
            possible.append(value)
    return join_all(possible, scope, node)


def _is_false(value: Value) -> bool:
    return isinstance(value, Const) and not value.value


@evaluate.register
def _ifexp(node: ast.IfExp, scope: Scope) -> Value:
    evaluate_test(node.test, scope)
    decided = truth(node.test, scope)
    if decided is not None:
        return evaluate(node.body if decided else node.orelse, scope)
    return join(evaluate(node.body, scope), evaluate(node.orelse, scope), scope, node)


@evaluate.register
def _subscript(node: ast.Subscript, scope: Scope) -> Value:
    value = evaluate(node.value, scope)
    if isinstance(value, (ClassRef, External)) and not scope.live:
        return value if isinstance(value, ClassRef) else UNKNOWN
    key = evaluate(node.slice, scope)
    return subscript(value, key, node, scope)


@evaluate.register
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


@evaluate.register
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


@evaluate.register
def _comprehension(node: ast.ListComp | ast.GeneratorExp | ast.SetComp, scope: Scope) -> Value:
    saved = dict(scope.env)
    sources_ = [iterate(evaluate(node.generators[0].iter, scope), scope, node)]
    results: list[Value] = []
    only = len(node.generators) == 1
    unrolled = only and sources_[0].exact and len(sources_[0].items) <= scope.state.limits.unroll
    exact = unrolled and (scope.state.exact or not node.generators[0].ifs)
    scope.loops += 1
    for item in sources_[0].items if unrolled else sources_[0].items[:1]:
        assign(node.generators[0].target, item, scope)
        wanted = [truth(test, scope) for test in node.generators[0].ifs] if scope.state.exact else []
        if False in wanted:
            continue
        exact = exact and None not in wanted
        for generator in node.generators[1:]:
            inner = iterate(evaluate(generator.iter, scope), scope, node)
            assign(generator.target, inner.items[0] if inner.items else UNKNOWN, scope)
        results.append(evaluate(node.elt, scope))
    scope.loops -= 1
    scope.env = saved
    return Tup(tuple(results), exact, list)


@evaluate.register
def _dict_comprehension(node: ast.DictComp, scope: Scope) -> Value:
    saved = dict(scope.env)
    for generator in node.generators:
        inner = iterate(evaluate(generator.iter, scope), scope, node)
        assign(generator.target, inner.items[0] if inner.items else UNKNOWN, scope)
    value = evaluate(node.value, scope)
    scope.env = saved
    return Table({"*": value})


@evaluate.register
def _walrus(node: ast.NamedExpr, scope: Scope) -> Value:
    value = evaluate(node.value, scope)
    assign(node.target, value, scope)
    return value


@evaluate.register
def _inner(node: ast.Await | ast.Starred | ast.YieldFrom, scope: Scope) -> Value:
    return evaluate(node.value, scope)


@evaluate.register
def _yield(node: ast.Yield, scope: Scope) -> Value:
    if node.value is not None:
        scope.returns.append(Tup((evaluate(node.value, scope),), False))
    return UNKNOWN


@evaluate.register
def _lambda(node: ast.Lambda, scope: Scope) -> Value:
    return Closure(node, scope)


@evaluate.register
def _slice(node: ast.Slice, scope: Scope) -> Value:
    parts = (evaluate(part, scope) if part is not None else Const(None) for part in (node.lower, node.upper, node.step))
    return Object("slice", {}, tuple(parts))


@evaluate.register
def _data(node: ast.JoinedStr | ast.FormattedValue, scope: Scope) -> Value:
    if scope.state.exact and isinstance(node, ast.JoinedStr):
        parts = [evaluate(p.value if isinstance(p, ast.FormattedValue) else p, scope) for p in node.values]
        plain_text = not any(isinstance(p, ast.FormattedValue) and p.format_spec is not None for p in node.values)
        if plain_text and all(isinstance(part, Const) for part in parts):
            return Const("".join(str(part.value) for part in parts if isinstance(part, Const)))
    return DATA


def evaluate_test(node: ast.expr, scope: Scope) -> None:
    """Bind what a condition binds. Its operations are no data flow and make no nodes."""
    if not scope.state.exact and _binds(node):
        evaluate(node, scope)


@sources.cached
def _binds(node: ast.expr) -> bool:
    return any(isinstance(part, ast.NamedExpr) for part in ast.walk(node))


def truth(node: ast.expr, scope: Scope) -> bool | None:
    """Whether a condition holds, if that is certain from constants at hand."""
    if scope.state.exact:
        return _exact_truth(node, scope)
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
            present = isinstance(value, (Tup, Table, Closure, Partial)) or (isinstance(value, Const) and not absent)
            return (absent == isinstance(node.ops[0], ast.Is)) if absent or present else None
        if isinstance(node.ops[0], (ast.Eq, ast.NotEq)) and isinstance(value, Const):
            return bool(value.value == other.value) == isinstance(node.ops[0], ast.Eq)
    return None


def _exact_truth(node: ast.expr, scope: Scope) -> bool | None:
    """The truth of a condition whose operations are carried out on values, as far as Python would."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _exact_truth(node.operand, scope)
        return None if inner is None else not inner
    if isinstance(node, ast.BoolOp):
        decisive = isinstance(node.op, ast.Or)
        found: bool | None = not decisive
        for part in node.values:
            certain = _exact_truth(part, scope)
            if certain is decisive:
                return decisive
            found = None if certain is None else found
        return found
    return holds(evaluate(node, scope))
