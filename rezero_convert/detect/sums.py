"""Adds as n-ary sums: `x + a + b` over one expression or several statements is one sum of three terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..capture.facts import operation
from .flow import Flow

_ADDS = frozenset({"add", "sub", "rsub"})
_FUSED = {
    "addmm": (("input", 0), ("mat1", 1), ("mat2", 2)),
    "addmv": (("input", 0), ("mat", 1), ("vec", 2)),
    "addbmm": (("input", 0), ("batch1", 1), ("batch2", 2)),
    "baddbmm": (("input", 0), ("batch1", 1), ("batch2", 2)),
    "addcmul": (("input", 0), ("tensor1", 1), ("tensor2", 2)),
    "lerp": (("input", 0), ("end", 1), ("weight", 2)),
    "scatter_add": (("input", 0), ("src", 3)),
    "index_add": (("input", 0), ("source", 3)),
    "index_put": (("input", 0), ("values", 2)),
}
"""Operations that do more than add: the names and positions of the arguments in question, the skip's first."""
_PRODUCTS = frozenset({"addmm", "addmv", "addbmm", "baddbmm"})
"""Those that add a product of matrices: mostly of a layer to its bias."""
_PARTS = frozenset({"scatter_add", "index_add", "index_put"})
"""Those that add to parts of a tensor."""
UNWRITTEN = _PRODUCTS | {"sum", "rsub"}
"""Operations that add what is written as no add."""
_PASSES_ON = frozenset({"mul", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"})


@dataclass(frozen=True, slots=True)
class Term:
    """One operand of a sum."""

    value: int
    add: int
    """The add it is an operand of."""
    operand: int | str
    """Which operand: position or keyword; "" if none can take a gate."""
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
    """The tensor operands of an add of floating-point tensors, mostly two; empty for anything else."""
    target = flow.nodes[node]
    if target.op not in ("call_function", "call_method") or node in flow.steps or node in flow.inner:
        return ()
    if flow.name(node) == "sum":
        return _stacked(flow, node)
    if flow.name(node) in _FUSED:
        return _fused(flow, node)
    if flow.name(node) not in _ADDS:
        return ()
    places: list[tuple[int | str, object]] = [*enumerate(target.args[:2])]
    places += [(key, target.kwargs[key]) for key in ("input", "other") if key in target.kwargs]
    terms = tuple(
        Term(flow.index[value], node, place, place in _NEGATIVE.get(flow.name(node), ()))
        for place, value in places
        if isinstance(value, fx.Node) and flow.index[value] in flow.inputs[node]
    )
    return terms if len(terms) == 2 and not _is_bias(flow, terms) else ()


_NEGATIVE: dict[str, tuple[int | str, ...]] = {"sub": (1, "other"), "rsub": (0, "input")}


def _stacked(flow: Flow, node: int) -> tuple[Term, ...]:
    """The operands of `torch.stack([x, f(x)]).sum(0)`, none of which can take a gate where it stands."""
    target = flow.nodes[node]
    stack = target.args[0] if target.args else target.kwargs.get("input")
    if not isinstance(stack, fx.Node) or operation(stack.target) != "stack" or not stack.args:
        return ()
    over = target.args[1] if len(target.args) > 1 else target.kwargs.get("dim")
    dim = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    parts = stack.args[0] if isinstance(stack.args[0], (tuple, list)) else ()
    values = [flow.index[part] for part in parts if isinstance(part, fx.Node)]
    if over not in (dim, (dim,), [dim]) or len({value for value in values if not flow.constant[value]}) < 2:
        return ()
    return tuple(Term(value, node, "") for value in values)


def _is_bias(flow: Flow, terms: tuple[Term, ...]) -> bool:
    """Whether a graph adds a vector of parameters to a product with weights: a linear layer, decomposed."""
    moving = [term.value for term in terms if not flow.constant[term.value]]
    if not flow.trace.generated or len(moving) != 1:
        return False
    (vector,) = (term.value for term in terms if term.value not in moving)
    node, shape = moving[0], flow.shape(vector)
    while flow.name(node) in _PASSES_ON and flow.inputs[node] and not flow.constant[flow.inputs[node][0]]:
        node = flow.inputs[node][0]
    product = flow.name(node) in ("mm", "bmm", "matmul") and any(flow.constant[one] for one in flow.inputs[node])
    return product and shape is not None and sum(size > 1 for size in shape) <= 1


def _fused(flow: Flow, node: int) -> tuple[Term, ...]:
    """The skip of an operation that does more than add, and the operand that a gate on its branch goes on.

    `addcmul(x, f, g)` is x + f * g, `addmm(x, f, g)` x + f @ g: a factor. `lerp(x, f, w)` is x + w * (f - x): the
    weight. `index_add(x, d, i, f)` adds to a part of x: f; into a value that starts empty it collects parts, and is no
    sum.
    """
    name, target = flow.name(node), flow.nodes[node]
    given: list[tuple[int | str, int | None]] = []
    for key, position in _FUSED[name]:
        place = position if position < len(target.args) else key
        value = target.args[position] if position < len(target.args) else target.kwargs.get(key)
        given.append((place, flow.index[value] if isinstance(value, fx.Node) else None))
    (place, skip), *others = given
    if skip is None:
        return ()
    if name == "lerp":
        (_, end), (weight, tensor) = others
        if end is None:
            return ()
        rounded = tensor is None and flow.origin(node).dtype in (torch.float16, torch.bfloat16)
        scaled = "" if rounded or flow.reaches(skip, end) else weight  # `lerp(f(x), x, w)` scales the skip too
        return Term(skip, node, scaled and place), Term(end, node, scaled)
    moving = [(value, place) for place, value in others if value is not None and not flow.constant[value]]
    if not moving or (name in _PARTS | _PRODUCTS and flow.constant[skip]):
        return ()
    if name in _PARTS and not _accumulates(target):
        return ()
    value, place_of_branch = max(moving, key=lambda item: item[0])
    return Term(skip, node, place), Term(value, node, place_of_branch)


def weight(flow: Flow, lerp: int) -> int | None:
    """The weight of a `lerp`; None if it is a number."""
    target = flow.nodes[lerp]
    value = target.args[2] if len(target.args) > 2 else target.kwargs.get("weight")
    return flow.index[value] if isinstance(value, fx.Node) else None


def _accumulates(node: fx.Node) -> bool:
    """Whether `index_put` adds what it puts; the others always do."""
    put = operation(node.target) == "index_put"
    return not put or bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate"))


def _is_inner(flow: Flow, node: int, adds: dict[int, tuple[Term, ...]]) -> bool:
    users = flow.users[node]
    return (
        len(users) == 1
        and users[0] in adds
        and not any(term.negative and term.value == node for term in adds[users[0]])
        and flow.shape(users[0]) == flow.shape(node)
        and (flow.name(users[0]) in _PARTS) == (flow.name(node) in _PARTS)
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
