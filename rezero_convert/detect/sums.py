"""Adds as n-ary sums: `x + a + b` over one expression or several statements is one sum of three terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .flow import Flow

_ADDS = frozenset({"add", "sub"})


@dataclass(frozen=True, slots=True)
class Term:
    """One operand of a sum."""

    value: int
    add: int
    """The add it is an operand of."""
    operand: int | str
    """Which operand: position or keyword."""
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Sum:
    """A tree of adds whose inner results nobody else reads."""

    node: int
    terms: tuple[Term, ...]
    inner: tuple[int, ...] = ()
    """The adds below the root."""


def sums(flow: Flow) -> Iterator[Sum]:
    """The maximal sums of a graph, in order."""
    adds = {node: terms for node in range(len(flow.nodes)) if (terms := operands(flow, node))}
    inner = {node for node in adds if _is_inner(flow, node, adds)}
    for node in adds:
        if node not in inner:
            yield _flatten(node, adds, inner)


def halves(flow: Flow, whole: Sum) -> Iterator[Sum]:
    """A sum that is no block as a whole, add by add: the root's own operands, then what is below."""
    yield Sum(whole.node, operands(flow, whole.node))
    inner = set(whole.inner)
    adds = {node: operands(flow, node) for node in (whole.node, *whole.inner)}
    for term in adds[whole.node]:
        if term.value in inner:
            yield _flatten(term.value, adds, inner - {term.value})


def operands(flow: Flow, node: int) -> tuple[Term, ...]:
    """The two tensor operands of an add of floating-point tensors; empty for anything else."""
    target = flow.nodes[node]
    if target.op not in ("call_function", "call_method") or node in flow.steps:
        return ()
    if flow.name(node) in ("addcmul", "lerp"):
        return _fused(flow, node)
    if flow.name(node) not in _ADDS:
        return ()
    places: list[tuple[int | str, object]] = [*enumerate(target.args[:2])]
    places += [(key, target.kwargs[key]) for key in ("input", "other") if key in target.kwargs]
    terms = tuple(
        Term(flow.index[value], node, place, flow.name(node) == "sub" and place in (1, "other"))
        for place, value in places
        if isinstance(value, fx.Node) and flow.index[value] in flow.inputs[node]
    )
    return terms if len(terms) == 2 else ()


def _fused(flow: Flow, node: int) -> tuple[Term, ...]:
    """`addcmul(x, f, g)` is x + f * g: the gate goes on a factor. `lerp(x, f, w)`, x + w * (f - x), is not edited."""
    target = flow.nodes[node]
    given = [flow.index[value] if isinstance(value, fx.Node) else None for value in target.args[:3]]
    if len(given) < 3 or given[0] is None:
        return ()
    skip = Term(given[0], node, 0)
    if flow.name(node) == "lerp":
        return (skip, Term(given[1], node, 2)) if given[1] is not None else ()
    factors = [(value, place) for place, value in enumerate(given) if place and value is not None]
    moving = [(value, place) for value, place in factors if not flow.constant[value]]
    return (skip, Term(max(moving)[0], node, max(moving)[1])) if moving else ()


def _is_inner(flow: Flow, node: int, adds: dict[int, tuple[Term, ...]]) -> bool:
    users = flow.users[node]
    return (
        len(users) == 1
        and users[0] in adds
        and not any(term.negative and term.value == node for term in adds[users[0]])
        and flow.shape(users[0]) == flow.shape(node)
        and flow.nodes[node] not in flow.origin(node).call.outputs
    )


def _flatten(root: int, adds: dict[int, tuple[Term, ...]], inner: set[int]) -> Sum:
    terms: list[Term] = []
    below: list[int] = []
    stack = [*reversed(adds[root])]
    while stack:
        term = stack.pop()
        if term.value in inner and term.value in adds:
            below.append(term.value)
            stack += reversed(adds[term.value])
        else:
            terms.append(term)
    return Sum(root, tuple(terms), tuple(below))
