"""Norms and activations written out operation by operation in the code of a graph.

Decompositions leave no module around them: a layer norm is `var_mean`, `sub`, `rsqrt`, `mul`, `add` in a row, a batch
norm in eval mode a subtraction and products with constants, GELU a handful of pointwise operations. What such a row
computes decides, as for modules (`patterns`): a norm does not change with the scale of its input.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..capture.facts import Facts, operation
from ..capture.trace import Call, Trace, origin
from ..plan import NormKind
from .patterns import POINTWISE, REDUCTIONS, degree, reduced_kind

_LONGEST = 32
"""Operations in a row: the longest decomposition (layer norm with casts, GELU by tanh) has half as many."""
_CASTS = frozenset("to float half bfloat16 double type type_as _to_copy clone contiguous alias".split())
_LAYOUT = _CASTS | frozenset("view reshape _unsafe_view permute transpose flatten unflatten squeeze unsqueeze".split())
_BELOW_STATISTICS = _LAYOUT | frozenset("pow square mul sub abs neg expand".split())
_EVEN = frozenset("var std var_mean std_mean norm linalg_norm vector_norm linalg_vector_norm pow square abs".split())
"""What a norm divides by has one of them in it, or a square as a product; weights that sum up to one have not."""
_ROOTS = frozenset({"rsqrt", "sqrt", "reciprocal"})
_BENT = frozenset(
    "relu erf erfc tanh sigmoid exp expm1 log1p softplus where clamp clamp_min clamp_max minimum maximum".split()
)
"""Without one of them a pointwise row is no activation."""
_SUMS = frozenset({"amax", "sum"})
_POINTWISE = POINTWISE | _SUMS | frozenset("where le lt ge gt eq ne logical_not any full_like".split())


@dataclass(frozen=True, slots=True)
class Chain:
    """Operations that are one step from `entry` to `end`."""

    call: Call
    """Stands for them: as if a module had run them."""
    entry: fx.Node
    end: fx.Node
    inside: frozenset[fx.Node]
    """All between the two."""
    facts: Facts


def chains(trace: Trace, taken: set[fx.Node]) -> Iterator[Chain]:
    """The written-out norms and activations of generated code; no two share an operation.

    Args:
        trace: from any capture.
        taken: operations that are part of a step already; those found are added.
    """
    if not trace.generated:
        return
    reader = _Reader(trace, taken)
    for find in (reader.norms, reader.fixed_norms, reader.activations):
        for chain in find():
            taken.update(chain.inside, (chain.end,))
            yield chain


class _Reader:
    """A graph in order of execution, and what in it depends on no input."""

    def __init__(self, trace: Trace, taken: set[fx.Node]) -> None:
        self.trace = trace
        self.taken = taken
        self.order = {node: number for number, node in enumerate(trace.graph.nodes)}
        self.constant: set[fx.Node] = set()
        self.dead: set[fx.Node] = set()
        for node in self.order:
            given = origin(node).facts.kind == "input" or node.op in ("placeholder", "output", "call_module")
            if not given and all(source in self.constant for source in node.all_input_nodes):
                self.constant.add(node)
        returned = {node for call in trace.calls for node in call.outputs}
        for node in reversed(self.order):
            if node.op.startswith("call_") and node not in returned and all(user in self.dead for user in node.users):
                self.dead.add(node)

    def moving(self, node: fx.Node) -> list[fx.Node]:
        """The operands that depend on an input."""
        return [source for source in node.all_input_nodes if source not in self.constant]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user not in self.dead]

    def is_free(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and node not in self.taken

    # --- norms that take their statistics from their input ---

    def norms(self) -> Iterator[Chain]:
        for node in self.order:
            if self.is_free(node) and node not in self.constant and operation(node.target) in REDUCTIONS:
                for entry in self.entries(node):
                    work = self.normalized(entry)
                    chain = None if work is None else self.affine(entry, work, _kind(work, entry))
                    if chain is not None:
                        yield chain
                        break

    def entries(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a statistic may be one of: its operand, or what that is a power, a distance or a copy of."""
        for _ in range(6):
            sources = [source for source in self.moving(node) if not _is_statistic(source)]
            if not sources:
                return
            node = min(sources, key=self.order.__getitem__)
            yield node
            if not self.is_free(node) or operation(node.target) not in _BELOW_STATISTICS:
                return

    def normalized(self, entry: fx.Node) -> list[fx.Node] | None:
        """The operations from `entry` to the first that its scale does not change and that all of them lead to."""
        degrees: dict[fx.Node, float] = {entry: 1.0}
        work: list[fx.Node] = []
        waiting = [(self.order[user], user) for user in self.readers(entry)]
        heapq.heapify(waiting)
        while waiting and len(work) < _LONGEST:
            _, node = heapq.heappop(waiting)
            if node in degrees or not self.is_free(node):
                continue
            moving = self.moving(node)
            name = operation(node.target)
            found = degree(name, node, degrees) if all(source in degrees for source in moving) else None
            if found is None:
                continue
            degrees[node] = found
            work.append(node)
            if found == 0 and all(user in degrees for one in work[:-1] for user in self.readers(one)):
                return work if any(map(_is_even, work)) else None
            for user in self.readers(node):
                heapq.heappush(waiting, (self.order[user], user))
        return None

    # --- norms with statistics of their own: batch norm in eval mode ---

    def fixed_norms(self) -> Iterator[Chain]:
        for node in self.order:
            if not self.is_free(node) or node in self.constant or operation(node.target) not in ("mul", "div"):
                continue
            moving = self.moving(node)
            factors = [source for source in node.all_input_nodes if source in self.constant]
            if len(moving) != 1 or len(factors) != 1 or not self.is_deviation(factors[0]):
                continue
            entry, work = moving[0], [node]
            if self.is_free(entry) and operation(entry.target) == "sub" and len(self.moving(entry)) == 1:
                entry, work = self.moving(entry)[0], [entry, node]
            chain = self.affine(entry, work, "batch")
            if chain is not None:
                yield chain

    def is_deviation(self, node: fx.Node) -> bool:
        """Whether a constant is computed by a root from a buffer."""
        seen, stack, rooted = {node}, [node], False
        while stack and len(seen) < _LONGEST:
            here = stack.pop()
            rooted = rooted or (here.op != "get_attr" and operation(here.target) in _ROOTS)
            if here.op == "get_attr" and (isinstance(self.value(here), nn.Parameter) or self.value(here) is None):
                return False
            for source in here.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return rooted and any(one.op == "get_attr" for one in seen)

    def value(self, node: fx.Node) -> torch.Tensor | None:
        holder, _, name = str(node.target).rpartition(".")
        try:
            module = None if self.trace.model is None else self.trace.model.get_submodule(holder)
        except AttributeError:
            return None
        found = getattr(module, name, None)
        return found if isinstance(found, torch.Tensor) else None

    # --- weight and bias ---

    def affine(self, entry: fx.Node, work: list[fx.Node], kind: NormKind) -> Chain | None:
        """The chain with the weight and bias that follow, if it ends in a tensor like the one it is given."""
        wanted = ["mul", "add"]
        ends = [work[-1]]
        rows = [work]
        while len(work) < _LONGEST:
            users = self.readers(work[-1])
            if len(users) != 1 or not self.is_free(users[0]) or len(self.moving(users[0])) != 1:
                break
            name = operation(users[0].target)
            if name in wanted and self.is_vector(users[0]):
                del wanted[: wanted.index(name) + 1]
                ends.append(users[0])
            elif name not in _LAYOUT:
                break
            work = [*work, users[0]]
            rows.append(work)
        rows = [row for row in rows if _is_alike(row[-1], entry)]
        rows = [row for row in rows if row[-1] in ends] or rows
        return self.chain(entry, rows[-1], Facts("norm", f"{kind}_norm", norm=kind)) if rows else None

    def is_vector(self, node: fx.Node) -> bool:
        """Whether the constant operand has one number a channel, or one at all."""
        constants = [source for source in node.all_input_nodes if source in self.constant]
        shape = origin(constants[0]).shape if len(constants) == 1 else None
        return shape is not None and sum(size > 1 for size in shape) <= 1

    # --- activations ---

    def activations(self) -> Iterator[Chain]:
        for node in self.order:
            users = self.readers(node)
            if node in self.constant or len(users) < 2 or not self.is_pointwise(users[0]):
                continue
            work = self.rejoined(node)
            if work and _is_alike(work[-1], node):
                softmax = any(operation(one.target) in _SUMS for one in work)
                yield self.chain(node, work, Facts("activation", "softmax" if softmax else "activation"))

    def rejoined(self, entry: fx.Node) -> list[fx.Node] | None:
        """The pointwise operations that `entry` alone goes into, up to the one that all of them lead to."""
        own = {entry}
        work: list[fx.Node] = []
        waiting = [(self.order[user], user) for user in self.readers(entry)]
        heapq.heapify(waiting)
        while waiting and len(work) < _LONGEST:
            _, node = heapq.heappop(waiting)
            if node in own:
                continue
            if not self.is_pointwise(node) or any(source not in own for source in self.moving(node)):
                return None
            own.add(node)
            work.append(node)
            closed = all(user in own for one in (entry, *work[:-1]) for user in self.readers(one))
            if closed and _is_activation(work):
                return self.scaled(work)
            for user in self.readers(node):
                heapq.heappush(waiting, (self.order[user], user))
        return None

    def scaled(self, work: list[fx.Node]) -> list[fx.Node]:
        """With the division by a number that ends a hard activation."""
        users = self.readers(work[-1])
        hard = any(operation(node.target).startswith("clamp") for node in work)
        last = len(users) == 1 and operation(users[0].target) in ("mul", "div") and len(users[0].all_input_nodes) == 1
        return [*work, users[0]] if hard and last and self.is_free(users[0]) else work

    def is_pointwise(self, node: fx.Node) -> bool:
        """Whether a node computes each number from those at its place, with no parameter; or is a part of softmax."""
        name = operation(node.target)
        constants = [source for source in node.all_input_nodes if source in self.constant]
        plain = all((origin(source).shape or ()) == () and not _is_read(source) for source in constants)
        return self.is_free(node) and name in _POINTWISE and plain

    def chain(self, entry: fx.Node, work: list[fx.Node], facts: Facts) -> Chain:
        here = origin(work[-1])
        frames = origin(work[0]).frames
        call = Call(here.call.path, facts.type, facts, here.call, frames, None, [entry], [work[-1]])
        return Chain(call, entry, work[-1], frozenset(work[:-1]), facts)


def _is_read(node: fx.Node) -> bool:
    """Whether a constant comes from a parameter or buffer."""
    return node.op == "get_attr" or any(map(_is_read, node.all_input_nodes))


def _is_even(node: fx.Node) -> bool:
    name = operation(node.target)
    return name in _EVEN or (name == "mul" and node.args[0] is node.args[1])


def _is_activation(work: list[fx.Node]) -> bool:
    """Whether pointwise operations bend what they are given, or are a softmax; a sum at their end is no part of it."""
    names = {operation(node.target) for node in work}
    bent = "exp" in names if names & _SUMS else names & _BENT
    return bool(bent) and operation(work[-1].target) not in ("add", "sub", "exp")


def _is_statistic(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operation(node.target) in REDUCTIONS


def _is_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same shape and dtype, as far as is known."""
    (shape, dtype), (other_shape, other_dtype) = ((origin(node).shape, origin(node).dtype) for node in (one, other))
    alike = shape == other_shape or shape is None or other_shape is None
    return alike and (dtype == other_dtype or dtype is None or other_dtype is None)


def _kind(work: list[fx.Node], entry: fx.Node) -> NormKind:
    """What the statistics of a norm go over."""
    statistic = next(node for node in work if operation(node.target) in REDUCTIONS)
    source = statistic.all_input_nodes[0]
    kind = reduced_kind(statistic, entry)
    given, shape = origin(entry).shape, origin(source).shape
    if kind != "batch":
        return kind if given is None or shape is None or given == shape else "group"
    if source is entry and operation(entry.target) in _LAYOUT and entry.all_input_nodes:
        given = origin(entry.all_input_nodes[0]).shape
    folded = given is not None and shape is not None and shape[:2] == (1, given[0] * given[1])
    return "instance" if folded and given != shape else kind  # a batch norm of one sample with the channels of all
