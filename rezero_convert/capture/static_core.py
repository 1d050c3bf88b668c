"""The core of the abstract interpreter of static capture: what the parts share, and where they meet.

Functions of a file become nodes of a graph. Conditions are not evaluated (unless they test a constant at hand): both
arms run on copies of the environment, which are then joined. Loop bodies run once. What is not understood becomes an
opaque value. Expressions, statements and calls need each other, so each is a generic function defined here; the
modules that import this one add a method per kind of node or value.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

from torch import fx

from .. import sources
from . import facts
from .facts import Facts
from .static_values import (
    DATA,
    OPAQUE,
    UNKNOWN,
    Bound,
    Closure,
    Instance,
    Partial,
    Scope,
    Value,
    emit,
    nodes_in,
    opaque,
)


@dataclass(frozen=True, slots=True)
class Arguments:
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)
    open: bool = False
    """There may be more: a starred argument of unknown content."""

    @property
    def nodes(self) -> list[fx.Node]:
        return nodes_in(self.args, self.kwargs)


@singledispatch
def evaluate(node: ast.expr, scope: Scope) -> Value:
    """The abstract value of an expression; its operations become nodes. Unknown kinds of expressions are unknown."""
    return UNKNOWN


@singledispatch
def perform(node: ast.stmt, scope: Scope) -> bool:
    """Analyse a statement; False if control does not get past it. Those that bind and compute nothing are skipped."""
    return True


@singledispatch
def apply(callee: Value, arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """The result of a call."""
    return unknown_call(arguments, at, scope)


def execute(body: list[ast.stmt], scope: Scope) -> bool:
    """Analyse statements in order; False if control does not get past them."""
    for statement in body:
        scope.state.work += 1
        if scope.state.work > scope.state.limits.work:
            scope.state.notes["analysis cut short: too many statements"] = None
            return True
        if not perform(statement, scope):
            return False
    return True


def of_target(target: Any) -> Facts:
    return _facts_of(target)


@sources.cached
def _facts_of(target: Any) -> Facts:
    return facts.of_function(target)


def unknown_call(arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    """A call of something unknown. A function of ours as first argument runs, as in checkpointing wrappers."""
    if not scope.live:
        return UNKNOWN
    head = arguments.args[0] if arguments.args else None
    rest = dataclasses.replace(arguments, args=arguments.args[1:])
    ours = isinstance(head, (Bound, Closure, Instance, Partial)) and head != scope.instance
    if head is not None and ours and rest.nodes:
        return apply(head, Arguments(rest.args, {}, True), at, scope)
    nodes = arguments.nodes
    if not nodes:
        return UNKNOWN
    return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)


def opaque_result(arguments: Arguments, at: ast.expr, scope: Scope) -> Value:
    nodes = arguments.nodes
    if not nodes or not scope.live:
        return UNKNOWN if not scope.live else DATA
    return emit(scope, "call_function", opaque, nodes, {}, OPAQUE, at)
