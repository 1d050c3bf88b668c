"""Which sums are residual blocks: the skip, the branches, the nesting; or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Literal

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from ..capture.graphs import is_flat
from ..capture.trace import Call
from ..plan import Operand
from . import code
from .flow import Flow
from .patterns import POINTWISE
from .shapes import keeps_shape
from .sums import UNWRITTEN, Sum, Term, halves, operands, sums

SkipKind = Literal["identity", "projection", "slice"]

_PRODUCTS = frozenset({"mul", "matmul", "mm", "bmm", "einsum", "baddbmm", "addcmul", "div", "tensordot"}) | frozenset(
    {"_grouped_mm", "grouped_mm", "_scaled_mm", "scaled_mm", "_scaled_grouped_mm", "scaled_grouped_mm"}
)
_MATRIX_PRODUCTS = _PRODUCTS - {"mul", "div", "addcmul"}
_NAMESPACES = frozenset({"aten", "prims", "prim", "_c10d_functional", "higher_order"})
_NONLINEAR_NAMES = frozenset(
    {"exp", "log", "pow", "square", "sqrt", "abs", "erf", "softmax", "maximum", "minimum", "sin"}
)
_SPLITS = frozenset({"split", "chunk", "unbind", "tensor_split"})
_PARTS = frozenset({"getitem", "narrow", "select", "slice"})
_COPIES = frozenset({"clone", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "Identity"})
_LINEAR_KINDS = frozenset({"linear", "norm", "pool", "pad", "layout", "dropout"})
_STATISTICS = frozenset({"mean", "norm", "linalg_norm", "vector_norm", "linalg_vector_norm", "var", "std"})
_ROUTING = frozenset({"topk", "index_add", "scatter_add", "index_put"})
_TURNS = frozenset({"cat", "stack", "roll", "neg"})
_REDUCTIONS = frozenset({"amax", "max", "mean"})  # over windows that a change of layout made: a pool, written out

_AT_TIMES = "a skip in one arm of a condition only: pass --model and --inputs"
_HALF = "half of a reversible pair of adds: what recomputes its operands from the results does not know of gates"


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: everything between the skip and one operand of the sum."""

    term: Term
    region: tuple[int, ...]
    """The nodes on paths from the skip (first) to the operand (last)."""
    cuts: tuple[int, ...]
    """Those that every path crosses."""


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block: `skip + branch + ...`."""

    sum: Sum
    shortcut: Term
    """The operand that carries the skip."""
    skip: int
    """Where skip and branches part: the shortcut's own value, or the input of its projection or slice."""
    kind: SkipKind
    branches: tuple[Branch, ...]
    certain: bool = True
    """False where shapes were not known (static route)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sum that is not a residual block, and why."""

    sum: Sum
    code: str
    reason: str
    interest: int = 0
    """How near it came to being a block; of several reasons the nearest is told."""
    whole_only: bool = False
    """Holds for the sum as a whole: its adds are not to be looked at one by one."""


@dataclass(frozen=True, slots=True)
class Nested:
    """A block that gets no gate of its own because of another one."""

    block: Block
    verdict: Literal["long-skip", "interior"]
    other: Block


def find(
    flow: Flow, gated: Callable[[Block], bool], left: Mapping[int, Refusal] = MappingProxyType({})
) -> tuple[list[Block], list[Refusal], list[Nested]]:
    """All sums of a graph: blocks to rewrite, refusals, and blocks that contain or are contained in others.

    Args:
        flow: of a trace.
        gated: whether a block was decided for before: it stays a block, whatever is around or inside it.
        left: blocks that cannot be rewritten, by their sums: those inside them stand for themselves.
    """
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    for whole in sums(flow):
        for result in _classify_whole(flow, whole):
            if isinstance(result, Block):
                blocks.append(result)
            else:
                refusals.append(result)
    crossing = dict(_crossing(flow, blocks))
    refusals += crossing.values()
    blocks = [block for block in blocks if block.sum.node not in crossing]
    coupled = _reversible(flow, blocks)
    refusals = [_half(one.sum, coupled[one.sum.node]) if one.sum.node in coupled else one for one in refusals]
    refusals += [_half(block.sum, coupled[block.sum.node]) for block in blocks if block.sum.node in coupled]
    refusals += [left[block.sum.node] for block in blocks if block.sum.node in left]
    blocks = [block for block in blocks if block.sum.node not in coupled and block.sum.node not in left]
    chosen, nested, parts = _nesting(flow, blocks, gated)
    return chosen, refusals + parts, nested


def _half(whole: Sum, at_times: bool) -> Refusal:
    return Refusal(whole, "RZ915", _AT_TIMES) if at_times else Refusal(whole, "RZ918", _HALF)


def _classify_whole(flow: Flow, whole: Sum) -> Iterator[Block | Refusal]:
    """The sum as one block; failing that, its adds one by one."""
    result = classify(flow, whole)
    if isinstance(result, Block) or not whole.inner or result.whole_only:
        yield result
        return
    for part in halves(flow, whole):
        yield from _classify_whole(flow, part)


def classify(flow: Flow, whole: Sum) -> Block | Refusal:
    """Whether the terms of a sum are a skip and residual branches from it."""
    values = [term.value for term in whole.terms]
    if flow.name(whole.node) in UNWRITTEN:
        return Refusal(whole, "RZ912", "the sum is not written as an add of its operands")
    if len(set(values)) < len(values):
        return Refusal(whole, "RZ910", "adds a tensor to itself")
    results = [result for term in _by_age(whole.terms) for result in _with_skip(flow, whole, term)]
    blocks = [result for result in results if isinstance(result, Block)]
    if blocks:
        return _collected(flow, blocks[0]) or blocks[0]
    return _weakly_joined(flow, whole) or _refusal(flow, whole, [r for r in results if isinstance(r, Refusal)])


def _collected(flow: Flow, block: Block) -> Refusal | None:
    """The refusal of a block whose branches are summed up elsewhere first: `x + sum(f(x) for f in fs)`.

    Where that is by `sum`, or in a loop by a variable that starts with a branch or at zero, no operand in the text is
    one branch; their sum is.
    """
    if not block.sum.inner or not _is_written(flow, block.sum.node):
        return None
    for branch in block.branches:
        frames = flow.origin(branch.term.add).frames
        at = Operand(frames[0].place, frames[0].span, branch.term.operand) if frames else None
        if at is not None and (not _is_written(flow, branch.term.add) or code.is_carried(at)):
            return Refusal(block.sum, "RZ912", f"no text is the one branch {describe(flow, branch.term.value)}")
    return None


def _is_written(flow: Flow, node: int) -> bool:
    """Whether the text of an add has its operands."""
    frames = flow.origin(node).frames
    return not frames or code.is_add(frames[0].span)


def _refusal(flow: Flow, whole: Sum, refusals: list[Refusal]) -> Refusal:
    added = next((term for term in whole.terms if flow.constant[term.value]), None)
    if added is not None:
        return Refusal(whole, "RZ907", f"adds {describe(flow, added.value)}, which does not depend on the input")
    unseen = next((term for term in whole.terms if _from_unseen(flow, term.value)), None)
    if unseen is not None:
        what = describe(flow, unseen.value)
        if flow.trace.model is None:
            told = f"the text does not tell what {what} comes from: pass --model and --inputs"
            return Refusal(whole, "RZ915", told)
        return Refusal(whole, "RZ920", f"{what} comes from a computation that is no torch call, perhaps of the skip")
    if refusals:
        return max(refusals, key=lambda refusal: refusal.interest)
    if any(_is_skip_at_times(flow, whole, term) for term in whole.terms):
        return Refusal(whole, "RZ915", _AT_TIMES)
    return Refusal(whole, "RZ901", f"the operands are independent: {_beside_each_other(flow, whole)}")


def _from_unseen(flow: Flow, value: int) -> bool:
    return any(flow.facts[node].kind == "unseen" and flow.reads(value, node) for node in range(value + 1))


def _is_skip_at_times(flow: Flow, whole: Sum, term: Term) -> bool:
    """Whether a term is, in an arm of a condition, what all others are computed from by weights."""
    others = [other.value for other in whole.terms if other is not term]
    return flow.name(term.value) == "choice" and any(
        all(flow.reaches(value, arm) and arm not in _arms(flow, value) for value in others)
        and all(any(has_weight(flow, node) for node in flow.region(arm, value)[1:]) for value in others)
        for arm in _arms(flow, term.value)
    )


def _beside_each_other(flow: Flow, whole: Sum) -> str:
    """How operands that are not computed from each other are related."""
    values = [term.value for term in whole.terms]
    factors = [frozenset(flow.inputs[value]) if flow.name(value) == "mul" else frozenset() for value in values]
    for gate in frozenset().union(*factors):
        if _complement(flow, gate) in frozenset().union(*factors):
            return f"a mean of two values, with {describe(flow, _complement(flow, gate) or gate)} and its complement"
    if all(_is_score(flow, value) for value in values):
        return "products of queries and keys, the scores of an attention"
    meeting = flow.meeting(values)
    if meeting is None:
        return "they come from different inputs"
    nodes = [node for value in values for node in flow.region(meeting, value)[1:]]
    routed = ", one of them by routing: rows chosen by their scores" if _any_named(flow, nodes, _ROUTING) else ""
    scales = ", at several resolutions" if any(_changes_resolution(flow, node) for node in nodes) else ""
    return f"all are computed from {describe(flow, meeting)}, none from another{routed or scales}"


def _is_score(flow: Flow, node: int) -> bool:
    """Whether a value is a matrix product that no weight takes part in, scaled, gathered or summed up."""
    terms = operands(flow, node)
    if terms:
        return all(_is_score(flow, term.value) for term in terms)
    if flow.name(node) in _MATRIX_PRODUCTS:
        return not has_weight(flow, node) or all(len(flow.shape(source) or ()) > 2 for source in flow.inputs[node])
    sources = [source for source in flow.inputs[node] if not flow.constant[source]]
    passes = flow.facts[node].kind == "layout" or flow.name(node) == "gather" or _is_scale(flow, node)
    return len(sources) == 1 and passes and _is_score(flow, sources[0])


def _changes_resolution(flow: Flow, node: int) -> bool:
    """Whether a node upsamples, or is a convolution with strides."""
    if _is_upsampling(flow, node):
        return True
    if flow.facts[node].kind != "linear" or not flow.inputs[node]:
        return False
    here, there = flow.shape(node), flow.shape(flow.inputs[node][0])
    return here is not None and there is not None and len(here) == len(there) == 4 and 2 * here[-1] <= there[-1]


def _any_named(flow: Flow, nodes: Iterable[int], names: frozenset[str]) -> bool:
    return any(flow.name(node) in names for node in nodes)


def _complement(flow: Flow, node: int) -> int | None:
    """What is subtracted from one to give the value."""
    numbers = [arg for arg in flow.nodes[node].args if isinstance(arg, (int, float))]
    ones = flow.name(node) in ("sub", "rsub") and 1 in numbers
    return flow.inputs[node][0] if ones and len(flow.inputs[node]) == 1 else None


def _weakly_joined(flow: Flow, whole: Sum) -> Refusal | None:
    """The refusal of a sum whose operands hang together without any value going from one to the other."""
    first, *others = sorted(whole.terms, key=lambda term: term.value)
    for term in others:
        if flow.reads(term.value, first.value) and not flow.reaches(term.value, first.value):
            skip, other = describe(flow, first.value), describe(flow, term.value)
            reason = f"{other} depends on {skip} only through detach, masks, shapes, indices or the size of noise"
            return Refusal(whole, "RZ914", reason)
    return None


def _by_age(terms: tuple[Term, ...]) -> list[Term]:
    return sorted((term for term in terms if not term.negative), key=lambda term: term.value)


def _with_skip(flow: Flow, whole: Sum, shortcut: Term) -> Iterator[Block | Refusal]:
    """The sum read with `shortcut` as the operand that carries the skip."""
    others = [term for term in whole.terms if term is not shortcut]
    for start, path in _origins(flow, shortcut.value, _joining_call(flow, whole.node)):
        if any(start > term.value for term in others):
            continue
        branches = tuple(branch for term in others if (branch := _branch(flow, start, term)))
        if len(branches) == len(others):
            yield _judge(flow, whole, shortcut, start, path, branches)
            return


def _branch(flow: Flow, start: int, term: Term) -> Branch | None:
    region = flow.region(start, term.value)
    return Branch(term, region, flow.cuts(region)) if len(region) > 1 else None


def _origins(flow: Flow, value: int, owner: Call) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The operand's own value, then the values it is a linear function of, up to an input of the module that adds.

    With the steps in between, last first.
    """
    path: tuple[int, ...] = ()
    yield value, path
    while True:
        source = _linear_source(flow, value)
        if source is None:
            return
        path = (*path, value)
        if flow.name(value) == "choice" and source not in _arms(flow, value):
            path += flow.inputs[value]  # a projection in every arm
        if flow.name(source) not in _SPLITS:  # a tuple of values, not one
            yield source, path
        if flow.nodes[source] in owner.inputs:
            return
        value = source


def _linear_source(flow: Flow, node: int) -> int | None:
    """The one value that `node` is a linear function of, if it is a single step of a shortcut."""
    sources = [source for source in flow.inputs[node] if not flow.constant[source]]
    name = flow.name(node)
    if name == "choice" and sources:  # `x` in one arm, `downsample(x)` in the other
        return _common_source(flow, sources)
    if name == "cat" and len(sources) > 1:  # a pooled grid beside its class token
        return _parted_from(flow, sources)
    if len(sources) != 1 or flow.constant[node]:
        return None
    facts = flow.facts[node]
    scaled = name in ("mul", "div", "add", "sub", "cat", "neg") or name in _REDUCTIONS
    return sources[0] if facts.kind in _LINEAR_KINDS or scaled or _is_projected(flow, node) else None


def _is_projected(flow: Flow, node: int) -> bool:
    """Whether a node is the product of one value, once, and a given matrix: a linear layer without a module."""
    factors: list[fx.Node] = []
    fx.node.map_arg((flow.nodes[node].args, flow.nodes[node].kwargs), factors.append)
    return flow.name(node) in _MATRIX_PRODUCTS and len(factors) == 2 and has_weight(flow, node)


def _carried(flow: Flow, node: int) -> Iterator[int]:
    """The values that `node` is a part or another layout of; last first."""
    while len(flow.inputs[node]) == 1 and flow.facts[node].kind == "layout":
        node = flow.inputs[node][0]
        yield node


def _parted_from(flow: Flow, nodes: list[int]) -> int | None:
    """The last value that all of several are parts of, be they pooled."""

    def step(node: int) -> int | None:
        moved = flow.facts[node].kind in ("layout", "pool") or flow.name(node) in _REDUCTIONS
        return flow.inputs[node][0] if moved and len(flow.inputs[node]) == 1 else None

    return _met(flow, nodes, step)


def _common_source(flow: Flow, arms: list[int]) -> int | None:
    """The last value that all arms of a choice are linear functions of, be one by a module of unknown class."""

    def step(node: int) -> int | None:
        is_arm = any(flow.name(user) == "choice" for user in flow.users[node])
        unknown = is_arm and flow.nodes[node].op == "call_module" and flow.facts[node].kind == "other"
        return flow.inputs[node][0] if unknown and len(flow.inputs[node]) == 1 else _linear_source(flow, node)

    return _met(flow, arms, step)


def _met(flow: Flow, nodes: list[int], step: Callable[[int], int | None]) -> int | None:
    """The value that all of several come from, step by step and whichever arm is taken; None if they do not meet."""
    heads = set(nodes)
    while len(heads) > 1:
        node = max(heads)
        heads.remove(node)
        sources = flow.inputs[node] if flow.name(node) == "choice" else (step(node),)
        if None in sources:
            return None
        heads.update(source for source in sources if source is not None)
    return heads.pop()


def _judge(
    flow: Flow, whole: Sum, shortcut: Term, skip: int, path: tuple[int, ...], branches: tuple[Branch, ...]
) -> Block | Refusal:
    """The conditions of a block, given a skip that every branch is computed from."""
    for branch in branches:
        inside = branch.region[1:]
        if _is_upsampled(flow, branch, path) and not _is_closed(flow, whole, skip, branch):
            return Refusal(whole, "RZ905", "merges resolutions: there is upsampling between the operands", 3)
        if not any(has_weight(flow, node, frozenset(branch.region)) for node in inside):
            what = f"{describe(flow, branch.term.value)}{_without_weight(flow, branch.region)}"
            return Refusal(whole, "RZ902", f"no linear or convolution weight between the skip and {what}", 1)
        if flow.constant[skip] and _is_given(flow, skip):
            return Refusal(whole, "RZ907", f"adds {describe(flow, skip)}, which does not depend on the input", 2)
        if _is_masked(flow, skip, path, branch):
            reason = (
                f"{describe(flow, skip)} and the branch are masked, by a mask and its complement: halves of a coupling"
            )
            return Refusal(whole, "RZ901", reason, 4)
        if _is_beside(flow, skip, branch.term.value):
            return Refusal(whole, "RZ904", f"{describe(flow, skip)} is added to a stream that does not begin there", 2)
    if all(_is_scale(flow, node) for node in path):
        return _same_shape(flow, whole, shortcut, skip, branches)
    return _projection(flow, whole, shortcut, skip, path, branches)


def _without_weight(flow: Flow, region: tuple[int, ...]) -> str:
    """What kind of function a branch without weights is, as far as its operations tell."""
    nodes = region[1:]
    kinds = {flow.facts[node].kind for node in nodes}
    if all(flow.name(node) in POINTWISE or flow.facts[node].kind in ("activation", "dropout") for node in nodes):
        return ": a pointwise function of the skip, as in an activation"
    if "pool" in kinds:
        return ": the skip is only pooled"
    if _any_named(flow, nodes, _STATISTICS):
        return ": the skip is scaled by statistics of its own"
    turned = _any_named(flow, nodes, frozenset({"mul"})) and _any_named(flow, nodes, _TURNS)
    if turned and not _is_nonlinear(flow, region):
        return ": parts of the skip times given factors, as in a rotation"
    return ""


def _same_shape(flow: Flow, whole: Sum, shortcut: Term, skip: int, branches: tuple[Branch, ...]) -> Block | Refusal:
    if len(branches) > 1 and all(_is_one_convolution(flow, branch) for branch in branches):
        reason = "parallel convolutions beside the identity, made to be merged into one"
        return Refusal(whole, "RZ903", reason, 2, whole_only=True)
    sizes = {flow.shape(whole.node), flow.shape(skip)}
    if None not in sizes and len(sizes) > 1:
        return Refusal(
            whole, "RZ906", f"the skip's shape {flow.shape(skip)} is broadcast to {flow.shape(whole.node)}", 2
        )
    if None in sizes and any(_is_centered(flow, skip, branch) for branch in branches):
        return Refusal(
            whole, "RZ906", f"{describe(flow, skip)} is broadcast: what it was taken of is centered by it", 2
        )
    return Block(whole, shortcut, skip, "identity", branches, certain=None not in sizes)


def _is_centered(flow: Flow, skip: int, branch: Branch) -> bool:
    """Whether a skip of unknown shape is a statistic, and a branch starts with the difference to what it is one of."""
    starts = [user for user in flow.users[skip] if user in branch.region and operands(flow, user)]
    others = [source for user in starts for source in flow.inputs[user] if source != skip]
    return flow.name(skip) in _STATISTICS and any(flow.reaches(skip, other) for other in others)


def _projection(
    flow: Flow, whole: Sum, shortcut: Term, skip: int, path: tuple[int, ...], branches: tuple[Branch, ...]
) -> Block | Refusal:
    """A skip through a projection, pool or slice."""
    operand = describe(flow, shortcut.value)
    for branch in branches:
        if not _is_nonlinear(flow, branch.region):
            return Refusal(
                whole, "RZ903", f"parallel linear paths: {operand} and {describe(flow, branch.term.value)}", 2
            )
        split = _elementwise_split(flow, path)
        around = not split or flow.reaches(branch.term.value, skip, avoid=frozenset(split))
        if not around or _reads_other_parts(flow, skip, path[-1], branch):
            parted = describe(flow, split[0] if split else skip)
            return Refusal(whole, "RZ901", f"the branch reads other elements of {parted} than {operand}", 4)
    call = _joining_call(flow, whole.node)
    if flow.nodes[skip] not in call.inputs and not _within(flow.origin(skip).call, call):
        return Refusal(whole, "RZ904", "skip and branch part outside the module that adds them", 1)
    if any(skip in _arms(flow, branch.term.value) for branch in branches):
        return Refusal(whole, "RZ903", f"parallel paths that may both be {describe(flow, skip)} itself", 2)
    maybe_identity = all(_is_scale(flow, node) or flow.name(node) == "choice" for node in path)
    if not maybe_identity and not is_flat(call.module) and not _is_output(flow, whole.node, call, path):
        unknown = next((user for user in flow.users[whole.node] if _is_of_unknown_class(flow, user)), None)
        if unknown is not None:
            told = f"whether {describe(flow, unknown)} only passes the sum on, the text does not tell"
            return Refusal(whole, "RZ915", f"{told}: pass --model and --inputs", 2)
        return Refusal(whole, "RZ916", "the sum is not the output of the module that makes it", 2)
    here, there = flow.shape(whole.node), flow.shape(skip)
    certain = here is not None and there is not None
    moved = all(flow.facts[node].kind in ("layout", "dropout") and flow.name(node) != "choice" for node in path)
    alike = here == there if certain else all(keeps_shape(flow, node) or _is_scale(flow, node) for node in path)
    if alike and not moved:
        return Refusal(whole, "RZ903", f"a parallel path of the same shape, {operand}, instead of a skip", 2)
    if not certain and _is_pooled(flow, path) and not any(_may_pool(flow, b.region) for b in branches):
        return Refusal(whole, "RZ906", f"{operand} is pooled, the branch is not: it is broadcast", 2)
    same = moved and certain and prod(here or ()) == prod(there or ())
    kind: SkipKind = "identity" if same else "slice" if moved else "projection"
    beside = frozenset(flow.index[node] for node in call.inputs) - {skip}
    if kind == "projection" and not all(flow.reaches(b.term.value, skip, avoid=beside) for b in branches):
        return Refusal(whole, "RZ904", f"{operand} and the branch are of different inputs of the module", 2)
    return Block(whole, shortcut, skip, kind, branches, certain)


def _is_pooled(flow: Flow, path: tuple[int, ...]) -> bool:
    """Whether a shortcut is reduced to one value, along dimensions that no change of layout has made."""
    return any(flow.name(node) in _REDUCTIONS for node in path) and not any(
        flow.facts[node].kind == "layout" for node in path
    )


def _may_pool(flow: Flow, region: tuple[int, ...]) -> bool:
    """Whether a branch may be as small as a pooled shortcut."""
    return not all(
        keeps_shape(flow, node) or flow.name(node) in POINTWISE or flow.facts[node].weight for node in region[1:]
    )


def _is_one_convolution(flow: Flow, branch: Branch) -> bool:
    """Whether a branch is a convolution and at most norms, as in RepVGG; in each arm, if there is a choice."""
    weighted = [node for node in branch.region[1:] if has_weight(flow, node)]
    if _is_nonlinear(flow, branch.region) or not all(flow.name(node).lower().startswith("conv") for node in weighted):
        return False
    return not any(flow.reaches(later, node) for i, node in enumerate(weighted) for later in weighted[i + 1 :])


def _is_scale(flow: Flow, node: int) -> bool:
    """Whether a step of a shortcut copies it, multiplies it by a number or parameter, or adds nothing."""
    name = flow.name(node)
    return name in _COPIES or name in ("mul", "div") or _adds_nothing(flow, node) or _is_stream(flow, node)


def _is_stream(flow: Flow, node: int) -> bool:
    """Whether a value is another one or, under a condition, its norm: the skip of Bloom's and OPT's blocks."""
    if flow.name(node) != "choice" or not flow.inputs[node]:
        return False
    first = min(flow.inputs[node])
    return all(
        flow.facts[arm].kind == "norm" and flow.inputs[arm] == (first,) for arm in flow.inputs[node] if arm != first
    )


def _adds_nothing(flow: Flow, node: int) -> bool:
    """`0 + x`, as `sum([x, ...])` begins."""
    return flow.name(node) == "add" and 0 in [arg for arg in flow.nodes[node].args if isinstance(arg, int)]


def _elementwise_split(flow: Flow, path: tuple[int, ...]) -> tuple[int, ...]:
    """The nodes of multi-output splits on a shortcut."""
    return tuple(node for node in path if flow.name(node) in _SPLITS)


def _reads_other_parts(flow: Flow, skip: int, first: int, branch: Branch) -> bool:
    """Whether the shortcut starts with a slice of the skip and the branch with slices that differ from it."""
    if flow.name(first) not in _PARTS:
        return False
    inside = set(branch.region)
    own = str((flow.nodes[first].args[1:], flow.nodes[first].kwargs))
    return all(
        flow.name(user) in _PARTS and str((flow.nodes[user].args[1:], flow.nodes[user].kwargs)) != own
        for user in flow.users[skip]
        if user in inside
    )


def _is_masked(flow: Flow, skip: int, path: tuple[int, ...], branch: Branch) -> bool:
    """Whether the branch is multiplied by the complement of what the skip, or all that the branch reads of it, is
    multiplied by: the masks of a coupling (RealNVP, Dinh et al. 2017, eq. 9)."""
    inside = set(branch.region)
    reads = [user for user in flow.users[skip] if user in inside]
    masked = (skip, *path, *(reads if all(flow.name(node) == "mul" for node in reads) else ()))
    masks = [source for node in masked if flow.name(node) == "mul" for source in flow.inputs[node]]
    kept = (_complement(flow, factor) for factor in _factors(flow, branch.term.value))
    return any(one is not None and _is_same(flow, one, mask) for one in kept for mask in masks)


def _factors(flow: Flow, value: int) -> Iterator[int]:
    """What a product is made of."""
    for source in flow.inputs[value] if flow.name(value) == "mul" else ():
        yield source
        yield from _factors(flow, source)


def _is_same(flow: Flow, one: int, other: int) -> bool:
    """Whether two nodes are one value that was read twice: `mask[i]`."""
    here, there = flow.nodes[one], flow.nodes[other]
    given = [[arg for arg in node.args if not isinstance(arg, fx.Node)] for node in (here, there)]
    if (here.op, here.target) != (there.op, there.target) or given[0] != given[1]:
        return False
    pairs = zip(here.all_input_nodes, there.all_input_nodes, strict=False)
    return all(_is_same(flow, flow.index[left], flow.index[right]) for left, right in pairs)


def _is_beside(flow: Flow, skip: int, node: int) -> bool:
    """Whether `node` is a residual stream that the value of `skip` was given to from the side.

    Position embeddings are added again in each layer: the stream depends on them, and is no branch from them.
    """
    while node > skip:
        terms = sorted(operands(flow, node), key=lambda term: term.value)
        sources = [source for source in flow.inputs[node] if flow.constant[node] or not flow.constant[source]]
        if terms and any(term.value == skip for term in terms):
            node = next((term.value for term in terms if term.value != skip), skip)
        elif terms and flow.reaches(terms[1].value, terms[0].value):
            node = terms[0].value
        elif len(sources) == 1 and (
            flow.facts[node].kind in ("layout", "dropout")
            or (flow.facts[node].kind in ("norm", "activation") and operands(flow, sources[0]))
        ):
            node = sources[0]
        else:
            return not flow.reaches(node, skip)
    return node != skip


def _is_given(flow: Flow, node: int) -> bool:
    """Whether a constant is added, in whatever layout, to what is not computed from it: a bias or mask that comes
    again in each layer, and no stream of its own."""
    stack = [node]
    while stack:
        here = stack.pop()
        for user in flow.users[here]:
            others = [term.value for term in operands(flow, user) if term.value != here]
            if any(not flow.constant[other] and not flow.reaches(other, node) for other in others):
                return True
            if flow.facts[user].kind == "layout":
                stack.append(user)
    return False


def _is_closed(flow: Flow, whole: Sum, skip: int, branch: Branch) -> bool:
    """Whether a module adds to its input what it alone computes from that, with no sum of that kind within: a block
    that works at a lower resolution inside, such as attention, not the merge of a U-Net."""
    call = owner_call(flow, whole.node)
    inside = branch.region[1:]
    if call.parent is None or flow.nodes[skip] not in call.inputs:
        return False
    return all(_within(flow.origin(node).call, call) for node in inside) and not any(
        flow.reaches(terms[1].value, terms[0].value) or flow.reaches(terms[0].value, terms[1].value)
        for node in inside
        if (terms := operands(flow, node))
    )


def _is_upsampled(flow: Flow, branch: Branch, path: tuple[int, ...]) -> bool:
    """Whether the shortcut or all of the branch is upsampled, or what is added is an upsampled value in part.

    A map of gates at a lower resolution or the repeated keys of an attention only take part in the branch.
    """
    cuts = frozenset((*branch.cuts, *path))
    for node in (*branch.region[1:], *path):
        if _is_upsampling(flow, node) and (node in cuts or _is_part_of(flow, node, branch.term.value)):
            return True
    return False


def _is_part_of(flow: Flow, node: int, end: int) -> bool:
    """Whether `node` comes to `end` by changes of layout alone, be it beside other parts."""
    while node != end:
        users = flow.users[node]
        if len(users) != 1 or not (flow.facts[users[0]].kind in ("layout", "pad") or flow.name(users[0]) == "cat"):
            return False
        node = users[0]
    return True


def _is_upsampling(flow: Flow, node: int) -> bool:
    """Whether a node makes its input larger, in all instances of its class."""
    name = flow.name(node)
    repeats = ("ConvTranspose", "conv_transpose", "repeat_interleave")
    return not flow.facts[node].optional and (flow.facts[node].kind == "upsample" or name.startswith(repeats))


def has_weight(flow: Flow, node: int, within: frozenset[int] = frozenset()) -> bool:
    """Whether the node multiplies by a matrix or kernel that is a parameter, and not one of the values `within`."""
    if flow.facts[node].weight:
        return True
    if flow.name(node) not in _MATRIX_PRODUCTS and not _is_foreign(flow, node):
        return False
    sources = [source for source in flow.inputs[node] if source not in within]
    return any(flow.constant[source] and _is_matrix(flow, source) for source in sources)


def _is_foreign(flow: Flow, node: int) -> bool:
    """Whether the node is an operator that another library defined: it may do anything with a matrix."""
    target = flow.nodes[node].target
    called = isinstance(target, (OpOverload, OpOverloadPacket))
    return called and str(target).partition(".")[0] not in _NAMESPACES


def _is_matrix(flow: Flow, node: int) -> bool:
    shape = flow.shape(node)
    return shape is None or sum(size > 1 for size in shape) >= 2


def _is_nonlinear(flow: Flow, region: tuple[int, ...]) -> bool:
    """Whether the last node of a region is something else than a linear function of its first, the others given."""
    within = frozenset(region)
    return any(_is_curved(flow, node, within) for node in region[1:])


def _is_curved(flow: Flow, node: int, within: frozenset[int]) -> bool:
    kind, name = flow.facts[node].kind, flow.name(node)
    if kind in ("activation", "attention", "recurrent") or name in _NONLINEAR_NAMES or flow.facts[node].fused:
        return True
    if name in _PRODUCTS:
        return sum(source in within for source in flow.inputs[node]) > 1
    unknown = flow.nodes[node].op == "call_module" and kind == "other"
    return unknown or name == "opaque" or _is_foreign(flow, node)


def owner_call(flow: Flow, node: int) -> Call:
    """The module execution whose code holds the operation: the one of its frame's `self`, if that is running."""
    here = flow.origin(node)
    owner = here.frames[-1].owner if here.frames else None
    call: Call | None = here.call
    while call is not None and call.path != owner:
        call = call.parent
    return call or here.call


def _joining_call(flow: Flow, node: int) -> Call:
    """The module execution that brings the operands of a sum together: the caller of one that only adds."""
    call = owner_call(flow, node)
    while call.parent is not None and not _computes(flow, call, node):
        call = call.parent
    return call


def _computes(flow: Flow, call: Call, node: int) -> bool:
    """Whether a module execution holds a weight or norm; `node` is one of its operations."""
    for step in (range(node, -1, -1), range(node + 1, len(flow.nodes))):
        for other in step:
            if not _within(flow.origin(other).call, call):
                break
            if has_weight(flow, other) or flow.facts[other].kind == "norm":
                return True
    return False


def _within(call: Call | None, outer: Call) -> bool:
    while call is not None:
        if call is outer:
            return True
        call = call.parent
    return False


def _is_output(flow: Flow, start: int, call: Call, path: tuple[int, ...]) -> bool:
    """Whether a sum leaves its module: at most through norms and the like, as a part, or as the skip of later sums."""
    wholes = frozenset(flow.inputs[node][0] for node in path if flow.name(node) in _PARTS)
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if flow.nodes[node] in call.outputs:
            return True
        users = flow.users[node]
        for user in users:
            passes = len(users) == 1 and flow.facts[user].kind in ("activation", "norm", "dropout")
            if user not in seen and (passes or _is_carried_by(flow, node, user, start, wholes)):
                seen.add(user)
                stack.append(user)
    return False


def _is_of_unknown_class(flow: Flow, node: int) -> bool:
    """Whether a node is a module of which the text does not tell the class: an activation perhaps."""
    return flow.trace.model is None and flow.nodes[node].op == "call_module" and flow.facts[node].kind == "other"


def _is_carried_by(flow: Flow, node: int, user: int, start: int, wholes: frozenset[int]) -> bool:
    """Whether `user` passes on a stream: moves or scales it, adds to it what is computed from it (from `start` on), or
    joins it with other parts of the same whole, be it by writing it back, `x[i] = x[i] + f(x[i])`."""
    others = [source for source in flow.inputs[user] if source != node and not flow.constant[source]]
    if flow.name(user) == "choice":  # of the sum and what there is without it, or another sum
        return all(flow.reaches(start, other) or operands(flow, other) for other in others)
    if flow.name(user) == "cat":
        return any(not wholes.isdisjoint(_carried(flow, other)) for other in others)
    if flow.name(user) == "setitem" and flow.nodes[user].args[-1] is flow.nodes[node]:
        return bool(others) or flow.nodes[user].args[0] is flow.nodes[node]
    if operands(flow, user) and not others:  # a bias of one number, as FixUp has them
        return all(prod(flow.shape(source) or (2,)) == 1 for source in flow.inputs[user] if source != node)
    if operands(flow, user) or flow.name(user) == "setitem":
        return bool(others) and all(flow.reaches(other, start) for other in others)
    return not others and (flow.facts[user].kind == "layout" or flow.name(user) in ("mul", "div"))


def _crossing(flow: Flow, blocks: list[Block]) -> Iterator[tuple[int, Refusal]]:
    """The sums whose branches come from the skip only by way of a block of another stream, outside of their module:
    attention scores to which those of the layer before are added, by way of that layer's own block."""
    at = {block.sum.node: block for block in blocks}
    for block in blocks:
        call = _joining_call(flow, block.sum.node)
        crossed = [at[node] for branch in block.branches for node in branch.cuts[:-1] if node in at]
        for other in crossed:
            if not flow.reaches(other.skip, block.skip) and not _within(flow.origin(other.sum.node).call, call):
                skip, origin = describe(flow, block.skip), flow.origin(other.sum.node)
                where = origin.written or (origin.frames[0].span if origin.frames else "another add")
                reason = f"the branch comes from {skip} only through the block at {where}, which is not of its stream"
                yield block.sum.node, Refusal(block.sum, "RZ904", reason)


def _reversible(flow: Flow, blocks: list[Block]) -> dict[int, bool]:
    """The sums of reversible pairs, `p = a + f(b)` and `q = b + g(p)`, where p is read elsewhere too.

    Each with whether g reads p in one arm of a condition only: in the other it may be no pair.
    """
    found: dict[int, bool] = {}
    for block in blocks:
        for branch in block.branches:
            inside = set(branch.region)
            for cut in branch.cuts[:-1]:
                coupled = [node for node in _arms(flow, cut) if _is_coupled(flow, node, block.skip)]
                if coupled and _leaves(flow, cut, inside):
                    later = [arm for node in branch.region if node > cut for arm in _arms(flow, node)]
                    at_times = any(not flow.reaches(arm, cut) for arm in later)
                    found |= dict.fromkeys((*coupled, block.sum.node), at_times)
    return found


def _arms(flow: Flow, node: int) -> Iterator[int]:
    """What a conditional value may be, else the value itself."""
    if flow.name(node) != "choice":
        yield node
        return
    for source in flow.inputs[node]:
        yield from _arms(flow, source)


def _leaves(flow: Flow, node: int, inside: set[int]) -> bool:
    """Whether a value is read elsewhere too, be it in a variable that conditions decide about, if that is read."""
    if flow.nodes[node] in flow.trace.root.outputs:
        return True
    choices = [user for user in flow.users[node] if user not in inside and flow.name(user) == "choice"]
    others = any(user not in inside and user not in choices for user in flow.users[node])
    return others or any(_leaves(flow, choice, inside) for choice in choices)


def _is_coupled(flow: Flow, node: int, other: int) -> bool:
    """Whether a sum adds to one value what is computed from another one alone."""
    terms = {term.value: flow.reaches(term.value, other) for term in operands(flow, node)}
    own = [value for value, derived in terms.items() if not derived and _carries_input(flow, value)]
    rest = [value for value, derived in terms.items() if derived]
    return len(own) == len(rest) == 1 and not flow.reaches(rest[0], own[0], avoid=frozenset({other}))


def _carries_input(flow: Flow, value: int) -> bool:
    """Whether values of an input are in a value: no constant, nor what an input only chooses among constants."""
    kinds = (flow.facts[node].kind for node in range(value + 1) if flow.reaches(value, node))
    return any(kind in ("input", "unseen") for kind in kinds)


def _nesting(
    flow: Flow, blocks: list[Block], gated: Callable[[Block], bool]
) -> tuple[list[Block], list[Nested], list[Refusal]]:
    """Sort out blocks within blocks, outermost first.

    A block whose branch holds joins of its own stream is a long skip: a zero gate there would stop their gradient.
    Any other block wins over those inside its branches.
    """
    at = {block.sum.node: block for block in blocks}
    chosen: list[Block] = []
    nested: list[Nested] = []
    refusals: list[Refusal] = []
    buried: set[int] = set()
    pending = sorted(at)
    while pending:
        node = pending.pop()
        block = at[node]
        if node in buried:
            continue
        inner = _inner(block, at)
        spanned = [other for other in inner if not _is_handed_in(flow, other, block)]
        long = any(_on_stream(flow, other.skip, block.skip, at) for other in spanned) and not gated(block)
        if long and block.sum.inner:  # `x = x + f(x)`, then `x + entry`: the last block and the long skip are one sum
            del at[node]
            parts = [result for half in halves(flow, block.sum) for result in _classify_whole(flow, half)]
            refusals += [part for part in parts if isinstance(part, Refusal)]
            at |= {part.sum.node: part for part in parts if isinstance(part, Block)}
            pending = sorted({*pending, *(part.sum.node for part in parts if isinstance(part, Block))})
            continue
        if long:
            nested.append(Nested(block, "long-skip", spanned[0]))
            continue
        chosen.append(block)
        for other in _interior(flow, block, inner, at):
            if other.sum.node not in buried and not gated(other):
                buried.add(other.sum.node)
                nested.append(Nested(other, "interior", block))
    return chosen[::-1], nested[::-1], refusals


def _inner(block: Block, at: dict[int, Block]) -> list[Block]:
    """The blocks whose sum lies on a branch of `block`."""
    found = []
    for branch in block.branches:
        found += [at[node] for node in branch.region[1:] if node in at]
    return found


def _is_handed_in(flow: Flow, inner: Block, outer: Block) -> bool:
    """Whether the branch of `inner` is handed to the module that adds it, beside the skip, and the same module's
    `outer` goes on from that very skip: queries with positions that an earlier layer has refined, not a block."""
    call = owner_call(flow, inner.sum.node)
    given = all(flow.nodes[term.value] in call.inputs for term in inner.sum.terms)
    return given and inner.skip == outer.skip and call is owner_call(flow, outer.sum.node)


def _interior(flow: Flow, block: Block, inner: list[Block], at: dict[int, Block]) -> list[Block]:
    """The inner blocks whose stream ends on the branches of `block`; one that goes on beside it is a stream of its own
    (two-way attention)."""
    inside = {block.sum.node, *block.sum.inner}.union(*(branch.region for branch in block.branches))
    found: list[Block] = []
    going_on: list[Block] = []
    for other in sorted(inner, key=lambda one: one.sum.node, reverse=True):
        node = other.sum.node
        if _leaves(flow, node, inside) or any(_on_stream(flow, one.skip, node, at) for one in going_on):
            going_on.append(other)
        else:
            found.append(other)
    return found


def _on_stream(flow: Flow, node: int, start: int, at: dict[int, Block]) -> bool:
    """Whether `node` is `start` carried along by skips alone."""
    while node > start:
        if node in at:
            node = at[node].skip
            continue
        terms = operands(flow, node)
        if terms:  # a mean of the stream with itself
            return all(_on_stream(flow, term.value, start, at) for term in terms)
        sources = [source for source in flow.inputs[node] if not flow.constant[source]]
        kind = flow.facts[node].kind
        carries = kind in ("layout", "dropout") or _is_scale(flow, node)
        carries = carries or (kind in ("activation", "norm") and bool(sources) and sources[0] in at)
        if len(sources) != 1 or not carries:
            return False
        node = sources[0]
    return node == start


def describe(flow: Flow, node: int) -> str:
    """A value as a reader knows it: module path or operation."""
    target = flow.nodes[node]
    if target.op == "placeholder":
        return f"the input {target.name}"
    if target.op in ("get_attr", "call_module"):
        return str(target.target)
    if node in flow.steps and flow.steps[node].path:
        return flow.steps[node].path
    return f"{flow.name(node)}(...)"
