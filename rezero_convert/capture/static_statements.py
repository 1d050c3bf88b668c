"""Statements of static capture."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator

from .. import sources
from .static_access import assign, iterate
from .static_core import evaluate, execute, perform
from .static_expressions import binary, evaluate_test, truth
from .static_names import (
    ClassRef,
    Import,
    imported,
    resolve_import,
)
from .static_values import (
    UNKNOWN,
    Closure,
    Const,
    Scope,
    Tup,
    Unknown,
    Value,
    join_all,
    join_environments,
)


class Raised(Exception):
    """The analysed code raises, whatever its inputs."""


@perform.register
def _expression_statement(node: ast.Expr, scope: Scope) -> bool:
    evaluate(node.value, scope)
    return True


@perform.register
def _assign_statement(node: ast.Assign, scope: Scope) -> bool:
    value = evaluate(node.value, scope)
    for target in node.targets:
        assign(target, value, scope)
    return True


@perform.register
def _annotated(node: ast.AnnAssign, scope: Scope) -> bool:
    if node.value is not None:
        assign(node.target, evaluate(node.value, scope), scope)
    return True


@perform.register
def _augmented(node: ast.AugAssign, scope: Scope) -> bool:
    before = evaluate(node.target, scope)
    value = evaluate(node.value, scope)
    assign(node.target, binary(node.op, before, value, node, scope, inplace=True), scope)
    return True


@perform.register
def _return(node: ast.Return, scope: Scope) -> bool:
    scope.returns.append(evaluate(node.value, scope) if node.value is not None else Const(None))
    return False


@perform.register
def _leave(node: ast.Raise, scope: Scope) -> bool:
    if scope.state.exact:
        raise Raised(f"{scope.file}:{node.lineno}")
    return False


@perform.register
def _escape(node: ast.Break | ast.Continue, scope: Scope) -> bool:
    told_apart = scope.breaks is not None and isinstance(node, ast.Break)
    (scope.breaks if told_apart and scope.breaks is not None else scope.escapes).append(scope.env)
    return False


@perform.register
def _if(node: ast.If, scope: Scope) -> bool:
    evaluate_test(node.test, scope)
    decided = truth(node.test, scope)
    if decided is not None:
        return execute(node.body if decided else node.orelse, scope)
    return _branches([node.body, node.orelse], node.test, scope)


@perform.register
def _match(node: ast.Match, scope: Scope) -> bool:
    evaluate(node.subject, scope)
    return _branches([*(case.body for case in node.cases), []], node.subject, scope)


def _branches(bodies: list[list[ast.stmt]], at: ast.expr, scope: Scope) -> bool:
    entry = scope.env
    joined: dict[str, Value] | None = None
    raised: list[Raised] = []
    for body in bodies:
        scope.env = dict(entry)
        try:
            passed = execute(body, scope)
        except Raised as error:
            raised.append(error)
            continue
        if passed:
            joined = scope.env if joined is None else join_environments(joined, scope.env, scope, at)
    scope.env = joined if joined is not None else entry
    if len(raised) == len(bodies):
        raise raised[0]
    return joined is not None


@perform.register
def _for(node: ast.For | ast.AsyncFor, scope: Scope) -> bool:
    elements = iterate(evaluate(node.iter, scope), scope, node.iter)
    if scope.state.exact:
        return _passes(node, _walked(node, elements, scope), scope, node.iter)
    unrolls = elements.exact and len(elements.items) <= scope.state.limits.unroll and not _has_escape(node)
    if unrolls and not any(isinstance(item, Unknown) for item in elements.items):
        for item in elements.items:
            assign(node.target, item, scope)
            if not execute(node.body, scope):
                break
        return execute(node.orelse, scope)
    _widen(node, scope)
    element = elements.items[0] if len(elements.items) == 1 else join_all(elements.items, scope, node.iter)
    return _loop(node.body, node.orelse, node.iter, scope, lambda: assign(node.target, element, scope))


_SOME = 2
"""Passes of a loop of unknown length."""


def _walked(node: ast.For | ast.AsyncFor, elements: Tup, scope: Scope) -> Iterator[bool]:
    """Binds the elements of a loop, pass by pass; whether each is one that certainly comes."""
    items = elements.items
    certain = elements.exact and len(items) <= scope.state.limits.unroll
    for item in items if certain else (items[0], items[-1]) if items else ():
        assign(node.target, item, scope)
        yield certain


def _tested(node: ast.While, scope: Scope) -> Iterator[bool]:
    """The passes of a `while` loop, as its condition decides or, where it does not, some."""
    for number in range(scope.state.limits.unroll):
        known = truth(node.test, scope)
        if known is False or (number >= _SOME and (known is None or bool(scope.breaks))):
            return
        yield known is True


def _passes(node: ast.For | ast.AsyncFor | ast.While, passes: Iterator[bool], scope: Scope, at: ast.expr) -> bool:
    """A loop pass by pass, as far as it goes."""
    outer = scope.escapes, scope.breaks, scope.passes
    scope.breaks = left = []
    all_certain = completed = True
    for number, certain in enumerate(passes, 1):
        scope.escapes, scope.passes = [], 0 if certain else number
        all_certain = all_certain and certain
        entry = dict(scope.env)
        try:
            passed = execute(node.body, scope)
        except Raised:
            if certain:
                raise
            passed, scope.env = True, entry  # not in every pass
        going_on = [*([scope.env] if passed else []), *scope.escapes]
        completed = bool(going_on)
        if not completed:
            break
        scope.env = _joined(going_on, scope, at)
    scope.escapes, scope.breaks, scope.passes = outer
    if completed and execute(node.orelse, scope):
        left.append(scope.env)
    if left:
        scope.env = _joined(left, scope, at)
    if not all_certain:
        _widen(node, scope)
    return bool(left)


def _joined(environments: list[dict[str, Value]], scope: Scope, at: ast.expr) -> dict[str, Value]:
    joined = environments[0]
    for env in environments[1:]:
        joined = join_environments(joined, env, scope, at)
    return joined


@perform.register
def _while(node: ast.While, scope: Scope) -> bool:
    if scope.state.exact:
        return _passes(node, _tested(node, scope), scope, node.test)
    _widen(node, scope)
    evaluate_test(node.test, scope)
    return _loop(node.body, node.orelse, node.test, scope, lambda: None)


def _loop(body: list[ast.stmt], orelse: list[ast.stmt], at: ast.expr, scope: Scope, enter: Callable[[], None]) -> bool:
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


@perform.register
def _with(node: ast.With | ast.AsyncWith, scope: Scope) -> bool:
    for item in node.items:
        evaluate(item.context_expr, scope)
        if item.optional_vars is not None:
            assign(item.optional_vars, UNKNOWN, scope)
    return execute(node.body, scope)


@perform.register
def _try(node: ast.Try, scope: Scope) -> bool:
    entry = dict(scope.env)
    raised: Raised | None = None
    try:
        passed = execute(node.body, scope) and execute(node.orelse, scope)
    except Raised as error:
        raised, passed = error, False
    env = scope.env
    for handler in node.handlers:
        scope.env = dict(entry)
        try:
            handled = execute(handler.body, scope)
        except Raised:
            continue
        if raised is not None:
            raised, passed, env = None, handled, scope.env
    scope.env = env
    if raised is not None:
        raise raised
    return execute(node.finalbody, scope) and passed


@perform.register
def _define(node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> bool:
    scope.env[node.name] = Closure(node, scope)
    return True


@perform.register
def _define_class(node: ast.ClassDef, scope: Scope) -> bool:
    scope.env[node.name] = ClassRef(scope.file, node.name, node)
    return True


@perform.register
def _import(node: ast.Import | ast.ImportFrom, scope: Scope) -> bool:
    for name, binding in imported(node).items():
        scope.env[name] = _loaded(binding, node, scope) if scope.state.exact else resolve_import(scope.file, binding)
    return True


def _loaded(binding: Import, node: ast.Import | ast.ImportFrom, scope: Scope) -> Value:
    """What an imported name stands for, if its module is loaded: none is for this."""
    package = str((scope.real or {}).get("__package__") or "").split(".")
    inside = package[: len(package) - binding.level + 1] if binding.level else []
    module = sys.modules.get(".".join([*inside, *([binding.module] if binding.module else [])]))
    if module is None or scope.state.lift is None:
        return UNKNOWN
    if binding.attribute is None:
        return scope.state.lift(module, scope, node, "")
    below = sys.modules.get(f"{module.__name__}.{binding.attribute}")
    return scope.state.lift(vars(module).get(binding.attribute, below), scope, node, "")


def _widen(loop: ast.For | ast.AsyncFor | ast.While, scope: Scope) -> None:
    """Forget the constants that the loop reassigns: a flag set in the first pass must not hide an arm."""
    for name in _stored(loop):
        if isinstance(scope.env.get(name), Const):
            scope.env[name] = UNKNOWN


@sources.cached
def _stored(loop: ast.stmt) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


@sources.cached
def _has_escape(loop: ast.stmt) -> bool:
    return any(isinstance(n, (ast.Break, ast.Continue, ast.Return, ast.Yield)) for n in ast.walk(loop))
