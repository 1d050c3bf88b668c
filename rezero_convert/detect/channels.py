"""Which dimension of a branch's output holds the channels, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .blocks import Branch, has_weight
from .flow import Flow

_KEEPS = frozenset({"contiguous", "clone", "to", "identity", "Identity", "getitem", "requires_grad"})


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of a branch."""

    trailing: int
    """How many dimensions follow theirs."""
    count: int | None
    """None where shapes are not known (static route)."""
    layer: str
    """The path of the module that makes them; "" for a function."""
    attribute: str
    """What the module calls their number."""


def channels(flow: Flow, branch: Branch) -> Channels | str:
    """The channels of what a branch adds: the last dimension behind a linear layer, the first but one behind a
    convolution, followed through permutations; or a phrase that says why they cannot be told."""
    moves: list[int] = []
    node = branch.term.value
    while not has_weight(flow, node):
        sources = [source for source in flow.inputs[node] if not flow.constant[source]]
        moved = flow.facts[node].kind == "layout" and flow.name(node) not in _KEEPS
        if moved and flow.name(node) not in ("permute", "transpose") and not _keeps_last(flow, node):
            return f"{flow.name(node)} between the last weight of the branch and the add may move its channels"
        if not sources or node <= branch.region[0]:
            return "the branch has no last weight by itself"
        if len(sources) > 1 and flow.facts[node].kind not in ("activation", "norm"):
            return f"several values meet in {flow.name(node)} behind the weights of the branch"
        moves += [node] if moved else []
        node = sources[0]
    name = flow.name(node).lower()
    rank = _rank(flow, node)
    dim = None
    if "conv" in name:
        rank = rank or next((int(letter) + 2 for letter in name if letter in "123"), None)
        dim = 1
    if rank is None and (moves or dim is not None):
        return "the shapes are not known"
    place = (rank or 0) - 1 if dim is None else dim
    for move in reversed(moves):
        after = _rank(flow, move) or 0
        target = _moved(flow, move, place, rank or 0, after)
        if target is None:
            return f"{flow.name(move)} moves the channels in a way that is not known"
        place, rank = target, after
    shape = flow.shape(branch.term.value)
    if shape is not None and len(shape) != (rank or len(shape)):
        return "the rank of the branch changes behind its last weight"
    target_node = flow.nodes[node]
    layer = str(target_node.target) if target_node.op == "call_module" else ""
    attribute = "out_channels" if dim is not None else "out_features" if flow.facts[node].kind == "linear" else ""
    attribute = "embed_dim" if flow.name(node) == "MultiheadAttention" else attribute
    trailing = 0 if rank is None else rank - 1 - place
    count = None if shape is None else shape[len(shape) - 1 - trailing]
    given = getattr(flow.module(layer), attribute, None) if layer and attribute else None
    count = given if count is None and isinstance(given, int) else count
    if count is None and flow.trace.model is not None:
        return "the shapes are not known: pass example inputs"
    return Channels(trailing, count, layer, attribute)


def _rank(flow: Flow, node: int) -> int | None:
    shape = flow.shape(node)
    return None if shape is None else len(shape)


def _keeps_last(flow: Flow, node: int) -> bool:
    """Whether a change of shape leaves the last dimension as it is."""
    shape, before = flow.shape(node), flow.shape(flow.inputs[node][0]) if flow.inputs[node] else None
    names = ("view", "reshape", "flatten", "unflatten", "_unsafe_view")
    return flow.name(node) in names and bool(shape and before) and (shape or ())[-1] == (before or ())[-1]


def _moved(flow: Flow, node: int, dim: int, rank: int, after: int) -> int | None:
    """Where a permutation, or a change of shape that keeps the last dimension, puts a dimension."""
    if flow.name(node) not in ("permute", "transpose"):
        return after - 1 if dim == rank - 1 else None
    target = flow.nodes[node]
    given: list[Any] = [*target.args[1:], *target.kwargs.values()]
    order = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if not all(isinstance(one, int) for one in order):
        return None
    places: list[int] = [one % rank for one in order]
    if flow.name(node) == "transpose":
        first, second = places
        return {first: second, second: first}.get(dim, dim)
    return places.index(dim) if dim in places else None
