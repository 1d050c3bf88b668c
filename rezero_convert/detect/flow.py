"""A trace as data flow: who depends on whose values, with norm and activation modules seen as one step.

Nodes are numbered in execution order and every analysis works on these numbers. Dependence does not pass through
shapes, integer and boolean tensors, masks, indices, the size of noise, `detach` or `zeros_like`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import fx, nn

from ..capture.facts import Facts, operation
from ..capture.trace import Call, Frame, Origin, Trace, origin
from ..plan import Span
from .chains import chains
from .patterns import summaries

# Results carry no values of their operands.
_DETACHED = frozenset(
    "detach zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
    "new_full new_tensor eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or argmax argmin "
    "argsort bernoulli size shape numel nonzero stop_gradient".split()
)
_NOISE = frozenset("randn randn_like normal normal_".split())
# Only the first operand's values reach the result; the others give shapes, indices or masks.
_FIRST = frozenset(
    "view_as expand_as reshape_as type_as index_select gather take_along_dim masked_fill masked_select getitem "
    "repeat_interleave topk to type".split()
)


class Shared(NamedTuple):
    """The calls that share an add."""

    levels: int
    """How many calls further out than the add the blocks are written."""
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """Data flow over the nodes of a trace, by number."""

    trace: Trace
    nodes: tuple[fx.Node, ...]
    index: dict[fx.Node, int]
    inputs: tuple[tuple[int, ...], ...]
    """Per node, the nodes whose values its own depends on."""
    users: tuple[tuple[int, ...], ...]
    facts: tuple[Facts, ...]
    """Of the node, or of the module call that it ends if that is one step."""
    steps: dict[int, Call]
    """Module calls seen as one step (custom norms and activations), by their last node; also what stands for the rows
    of operations that are one written out."""
    inner: frozenset[int]
    """The other nodes of such rows, and of such modules in graphs."""
    constant: tuple[bool, ...]
    """Depends on parameters and constants only, on no input of the model, be it as an index."""
    shared: Mapping[tuple[Span, ...], Shared] = field(default_factory=dict)
    """The adds, by the spans of their frames, that stand for several blocks."""

    def origin(self, node: int) -> Origin:
        here = origin(self.nodes[node])
        shared = self.shared.get(spans(here.frames)) if self.shared else None
        return here if shared is None else replace(here, frames=_further(here.frames, shared.levels))

    def shape(self, node: int) -> tuple[int, ...] | None:
        return self.origin(node).shape

    def name(self, node: int) -> str:
        """The operation's plain name: "add", "layer_norm", or the module's class."""
        target = self.nodes[node]
        return self.facts[node].type if target.op == "call_module" else operation(target.target)

    def parameter(self, node: int) -> str | None:
        """The path of the parameter or buffer, if the node is one."""
        target = self.nodes[node]
        return str(target.target) if target.op == "get_attr" else None

    def module(self, path: str) -> nn.Module | None:
        """The live module at a path; None on the static route."""
        if self.trace.model is None:
            return None
        try:
            return self.trace.model.get_submodule(path)
        except AttributeError:
            return None

    def reaches(self, target: int, start: int, *, avoid: frozenset[int] = frozenset()) -> bool:
        """Whether the value of `target` depends on that of `start`, by a path around `avoid`."""
        seen = {target}
        stack = [target]
        while stack:
            node = stack.pop()
            if node == start:
                return True
            for source in self.inputs[node]:
                if source >= start and source not in seen and source not in avoid:
                    seen.add(source)
                    stack.append(source)
        return False

    def reads(self, target: int, start: int) -> bool:
        """Whether `target` depends on `start` in any way, be it by shape, truth or index."""
        seen = {target}
        stack = [target]
        while stack:
            node = stack.pop()
            if node == start:
                return True
            for source in map(self.index.__getitem__, self.nodes[node].all_input_nodes):
                if source >= start and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    def meeting(self, values: Iterable[int]) -> int | None:
        """The last value that all of several are computed from, constants aside; None if there is none."""
        reached = {value: {value} for value in values}
        every = frozenset(reached)
        while reached:
            node = max(reached)
            ends = reached.pop(node)
            if ends == every:
                return node
            for source in self.inputs[node]:
                if not self.constant[source]:
                    reached.setdefault(source, set()).update(ends)
        return None

    def region(self, start: int, end: int) -> tuple[int, ...]:
        """The nodes on data paths from `start` to `end`, both included, in order; empty if there is none."""
        seen = {end}
        stack = [end]
        while stack:
            for source in self.inputs[stack.pop()]:
                if source >= start and source not in seen:
                    seen.add(source)
                    stack.append(source)
        found: set[int] = set()
        for node in sorted(seen):
            if node == start or any(source in found for source in self.inputs[node]):
                found.add(node)
        return tuple(sorted(found)) if end in found else ()

    def cuts(self, region: tuple[int, ...]) -> tuple[int, ...]:
        """The nodes that every path through `region` crosses, its first excepted."""
        position = {node: i for i, node in enumerate(region)}
        found = []
        furthest = 0
        for i, node in enumerate(region):
            if i and furthest <= i:
                found.append(node)
            furthest = max([furthest, *(position[user] for user in self.users[node] if user in position)])
        return tuple(found)


def spans(frames: tuple[Frame, ...]) -> tuple[Span, ...]:
    """What tells one text that ran from others: where it is, and is called up to the method that holds it."""
    nested = frames and frames[0].place == frames[-1].place
    return tuple(frame.span for frame in (frames[:1] if nested else frames))


def around(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """The frames of an operation, and those of the methods of the same module around them."""
    return (*frames[:-1], frames[-1]._replace(callers=()), *frames[-1].callers) if frames else ()


def shared(flow: Flow, node: int) -> Shared | None:
    """The calls that share the text of an add; None if it stands for one block."""
    return flow.shared.get(spans(origin(flow.nodes[node]).frames)) if flow.shared else None


def _further(frames: tuple[Frame, ...], levels: int) -> tuple[Frame, ...]:
    """The frames with methods as plain functions, up to one that calls them."""
    every = around(frames)
    outer = every[: levels + 1]
    return (*(frame._replace(owner=None) for frame in outer[:-1]), outer[-1]._replace(callers=every[levels + 1 :]))


def flow(trace: Trace, norm_types: tuple[type[nn.Module], ...] = ()) -> Flow:
    """The data flow of a trace; modules of `norm_types` are layer-type norms, whatever they compute."""
    nodes = tuple(node for node in trace.graph.nodes if node.op != "output")
    index = {node: i for i, node in enumerate(nodes)}
    facts = [origin(node).facts for node in nodes]
    inputs = [tuple(dict.fromkeys(index[source] for source in data_inputs(node))) for node in nodes]
    steps: dict[int, Call] = {}
    for summary in summaries(trace, norm_types):
        end, entry = index[summary.end], index[summary.entry]
        facts[end], inputs[end], steps[end] = summary.facts, (entry,), summary.call
    whole = set(steps.values())
    taken = {node for i, node in enumerate(nodes) if i in steps or is_within(origin(node).call, whole)}
    inner = {index[node] for node in taken if trace.generated} - steps.keys()
    for chain in chains(trace, taken):
        end, entry = index[chain.end], index[chain.entry]
        facts[end], inputs[end], steps[end] = chain.facts, (entry,), chain.call
        inner.update(map(index.__getitem__, chain.inside))
    returned = {node for call in trace.calls for node in call.outputs}
    written_back = _write_backs(nodes) - returned
    users: list[list[int]] = [[] for _ in nodes]
    constant: list[bool] = []
    for i, node in enumerate(nodes):
        detached = node.op in ("call_function", "call_method") and operation(node.target) in _DETACHED
        read = () if detached else inputs[i] if i in steps else map(index.__getitem__, node.all_input_nodes)
        constant.append(origin(node).facts.kind not in ("input", "unseen") and all(constant[source] for source in read))
        hidden = i in inner or (i not in steps and is_within(origin(node).call, whole))
        for source in () if hidden or node in written_back else inputs[i]:
            users[source].append(i)
    given = tuple(map(tuple, users))
    return Flow(trace, nodes, index, tuple(inputs), given, tuple(facts), steps, frozenset(inner), tuple(constant))


def is_within(call: Call | None, whole: set[Call]) -> bool:
    """Whether a module execution is part of one that counts as a single step."""
    while call is not None and call not in whole:
        call = call.parent
    return call is not None


def _write_backs(nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
    """What a capture notes of an in-place operation on a view, the change of its base, where nobody reads that."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        writes = node.op == "call_function" and operation(node.target) in ("setitem", "getattr")
        if writes and all(user in found for user in node.users):
            found.add(node)
    return found


def data_inputs(node: fx.Node) -> Iterable[fx.Node]:
    """The inputs whose values, not shapes or truth, make up the node's."""
    if node.op in ("placeholder", "get_attr"):
        return ()
    sources = node.all_input_nodes
    if node.op != "call_module":
        name = operation(node.target)
        if name in _DETACHED:
            return ()
        if name == "mul" and any(map(_is_noise, sources)):
            return ()
        if name in _FIRST:
            sources = sources[:1]
        elif name == "where" and len(node.args) > 1:
            sources = [source for source in node.args[1:] if isinstance(source, fx.Node)]
        elif name == "embedding":
            sources = [source for source in sources if source.op == "get_attr"]
        elif name == "scaled_dot_product_attention":
            mask = node.kwargs.get("attn_mask")
            sources = [source for source in sources if source is not mask and source not in node.args[3:]]
    return [source for source in sources if _has_values(source)]


def _is_noise(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operation(node.target) in _NOISE


def _has_values(node: fx.Node) -> bool:
    dtype = origin(node).dtype
    return dtype is None or dtype.is_floating_point or dtype.is_complex
