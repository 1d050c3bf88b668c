"""The residual streams of a trace, by node numbers: which joins follow which, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from ..capture.trace import Call
from ..detect.blocks import Block, Nested, Refusal, find
from ..detect.drafts import is_gated
from ..detect.flow import Flow

_CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})


@dataclass(frozen=True, slots=True)
class Knot:
    """A join on a stream: a block, another sum, or a concatenation."""

    node: int
    before: tuple[int, ...]
    """The operations between the join before and this one."""
    block: Block | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    """Per branch of a block, all operations that only it needs."""
    reads: tuple[tuple[int, ...], ...] = ()
    """Per branch, the values that it takes from elsewhere."""
    start: int | None = None
    """Where the other value of a sum or concatenation leaves the stream."""


@dataclass(frozen=True, slots=True)
class Line:
    """A stream: joins in order, then what follows the last."""

    knots: tuple[Knot, ...]
    after: tuple[int, ...]
    source: int | None
    """The join of another stream that it begins at."""


@dataclass(frozen=True, slots=True)
class Found:
    """All adds of a trace."""

    flow: Flow
    blocks: dict[int, Block]
    refusals: dict[int, Refusal]
    nested: dict[int, Nested]
    inside: dict[int, tuple[int, ...]]
    """Per operation, the refused and nested sums that it is or holds: a module call may count as one operation."""


def found(flow: Flow) -> Found:
    """All adds of a trace, by their nodes."""
    blocks, refusals, nested = find(flow, partial(is_gated, flow))
    ends = {call: end for end, call in flow.steps.items()}
    inside: dict[int, tuple[int, ...]] = {}
    for node in (*(one.sum.node for one in refusals), *(one.block.sum.node for one in nested)):
        seat = _seat(flow, node, ends)
        inside[seat] = (*inside.get(seat, ()), node)
    return Found(
        flow,
        {block.sum.node: block for block in blocks},
        {refusal.sum.node: refusal for refusal in refusals},
        {one.block.sum.node: one for one in nested},
        inside,
    )


def _seat(flow: Flow, node: int, ends: dict[Call, int]) -> int:
    """An operation itself, or the end of the module call that counts as one and holds it."""
    call: Call | None = flow.origin(node).call
    while call is not None and call not in ends:
        call = call.parent
    return node if call is None else ends[call]


def lines(adds: Found) -> tuple[Line, ...]:
    """The streams of a trace, in the order of their first blocks; one without any block if there are none."""
    flow = adds.flow
    last = _last_blocks(adds)
    branches = {
        node: [_branch(adds, block, one.term.value) for one in block.branches] for node, block in adds.blocks.items()
    }
    taken = set(adds.blocks).union(*(inside for all_of in branches.values() for inside, _ in all_of))
    chains = _chains(adds, last)
    result = []
    for chain in chains:
        knots: list[Knot] = []
        for node in chain:
            block = adds.blocks[node]
            knots += _way(adds, block.skip, last, taken)
            before = _between(flow, block.skip, taken)
            taken.update(before)
            parts = branches[node]
            knots.append(
                Knot(node, before, block, tuple(inside for inside, _ in parts), tuple(ends for _, ends in parts))
            )
        end = _end(adds, chain[-1] if chain else -1, last, taken)
        if end is not None:
            knots += _way(adds, end, last, taken)
        after = _between(flow, end, taken) if end is not None else ()
        taken.update(after)
        source = last[adds.blocks[chain[0]].skip] if chain else -1
        result.append(Line(tuple(knots), after, source if source >= 0 else None))
    return tuple(result)


def _last_blocks(adds: Found) -> list[int]:
    """Per node, the last block that its value has passed through; -1 if none."""
    last: list[int] = []
    for node, inputs in enumerate(adds.flow.inputs):
        last.append(node if node in adds.blocks else max((last[source] for source in inputs), default=-1))
    return last


def _chains(adds: Found, last: list[int]) -> list[list[int]]:
    """Blocks that follow each other; where two follow one, the second begins a chain of its own."""
    chains: list[list[int]] = []
    ends: dict[int, list[int]] = {}
    for node, block in sorted(adds.blocks.items()):
        chain = ends.pop(last[block.skip], None)
        if chain is None:
            chains.append(chain := [])
        chain.append(node)
        ends[node] = chain
    return chains or [[]]


def _branch(adds: Found, block: Block, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The operations of a branch, side paths included, and the values that these take from before the skip."""
    inside: set[int] = set()
    outside: set[int] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inside or node in outside or adds.flow.constant[node] or node == block.skip:
            continue
        if node < block.skip or node in adds.blocks:
            outside.add(node)
            continue
        inside.add(node)
        stack += adds.flow.inputs[node]
    return tuple(sorted(inside)), tuple(sorted(outside))


def _way(adds: Found, end: int, last: list[int], taken: set[int]) -> Iterator[Knot]:
    """The joins that are no blocks on the way to a value, in order; they and what lies before them are taken."""
    for node in reversed(list(_spine(adds.flow, end, last, taken))):
        merges = adds.flow.name(node) in _CONCATENATIONS and node not in adds.flow.steps
        if not (merges or node in adds.refusals or node in adds.nested):
            continue
        main, others = _sides(adds.flow, node, last)
        start = max((one for other in others for one in _reached(adds.flow, other, taken, last)), default=None)
        if merges and (start is None or main is None or last[start] == last[main]):
            continue
        before = tuple(one for one in _between(adds.flow, node, taken) if one != node)
        taken.update(before, (node,))
        yield Knot(node, before, start=start)


def _spine(flow: Flow, end: int, last: list[int], taken: set[int]) -> Iterator[int]:
    """From a value upwards, at each step by the operand that has come through most blocks."""
    node: int | None = end
    while node is not None and node not in taken:
        yield node
        node = _sides(flow, node, last)[0]


def _sides(flow: Flow, node: int, last: list[int]) -> tuple[int | None, list[int]]:
    """The operand that a stream goes on from, and the others."""
    sources = [source for source in flow.inputs[node] if not flow.constant[source]]
    if not sources:
        return None, []
    main = max(sources, key=lambda source: (last[source], source))
    return main, [source for source in sources if source != main]


def _reached(flow: Flow, node: int, taken: set[int], last: list[int]) -> Iterator[int]:
    """Where a value leaves what has been drawn."""
    found = list(_spine(flow, node, last, taken))
    top = node if not found else _sides(flow, found[-1], last)[0]
    if top is not None:
        yield top


def _between(flow: Flow, end: int, taken: set[int]) -> tuple[int, ...]:
    """What a value is computed by since what has been drawn, itself included."""
    inside: set[int] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inside or node in taken or flow.constant[node]:
            continue
        inside.add(node)
        stack += flow.inputs[node]
    return tuple(sorted(inside))


def _end(adds: Found, block: int, last: list[int], taken: set[int]) -> int | None:
    """The last value computed from a block, and from no later one; of all values if there is no block."""
    flow = adds.flow
    ends: Iterable[int] = (
        node
        for node in range(len(flow.nodes) - 1, block, -1)
        if last[node] == block and node not in taken and not flow.constant[node] and _is_read(flow, node)
    )
    return next(iter(ends), None)


def _is_read(flow: Flow, node: int) -> bool:
    """Whether anything, or the model's caller, takes the value: not what is left over of one step."""
    return bool(flow.users[node]) or any(user.op == "output" for user in flow.nodes[node].users)
