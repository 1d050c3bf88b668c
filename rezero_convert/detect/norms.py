"""Which normalizations belong to a block, which of them go, and how each can be taken out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from ..capture.trace import Frame, origin
from ..plan import Norm, NormAction, Operand, Options, Span
from . import code, helpers
from .blocks import Block, Branch, has_weight
from .flow import Flow, is_within

Position = Literal["pre", "inside", "end", "post"]


@dataclass(frozen=True, slots=True)
class Member:
    """A normalization of a block, before it is decided what happens to it."""

    node: int
    position: Position
    norm: Norm
    in_arm: bool = False
    """Whether it runs in one arm of a condition only (static route)."""


def of_branch(flow: Flow, branch: Branch, block: Block, options: Options) -> Iterator[Member]:
    """The norms that every path of a branch crosses."""
    crossed = [node for node in branch.cuts if flow.facts[node].kind == "norm"]
    inside = {node for other in block.branches for node in other.region} | {block.sum.node, *block.sum.inner}
    for node in crossed:
        position = _position(flow, node, branch)
        readers = [user for user in flow.users[node] if user not in inside and not _is_dead(flow, user)]
        readers += [node] if flow.nodes[node] in flow.trace.root.outputs else []
        yield Member(node, position, _decide(flow, node, position, readers, options))


ONE_ARM = "it runs in one arm of a condition: --model and --inputs decide it"


def of_one_arm(flow: Flow, block: Block, options: Options) -> Iterator[Member]:
    """The norms that a branch, or the sum, crosses in one arm of a condition and not in the other (static route)."""
    inside = {node: branch for branch in block.branches for node in branch.region[1:] if node not in branch.cuts}
    for node in (*inside, *flow.users[block.sum.node]):
        if flow.facts[node].kind != "norm" or not path_of(flow, node):
            continue
        choices = [user for user in flow.users[node] if flow.name(user) == "choice"]
        if any(flow.inputs[node][0] in flow.inputs[choice] for choice in choices):
            position = _position(flow, node, inside[node]) if node in inside else "post"
            readers = [user for user in flow.users[node] if user not in inside and user not in choices]
            yield Member(node, position, _decide(flow, node, position, readers, options), in_arm=True)


def _position(flow: Flow, node: int, branch: Branch) -> Position:
    weighted = [i for i, one in enumerate(branch.region) if i and has_weight(flow, one)]
    place = branch.region.index(node)
    return "pre" if place < weighted[0] else "end" if place > weighted[-1] else "inside"


def _is_dead(flow: Flow, node: int) -> bool:
    """Whether nobody reads a value that no code asked for: a part of another, since `make_fx` keeps every output of an
    operator, or what a variable is behind a condition that sets it in one arm."""
    unread = not flow.users[node] and flow.nodes[node] not in flow.trace.root.outputs
    return unread and flow.name(node) in ("getitem", "choice")


def after(flow: Flow, node: int, options: Options) -> Member:
    """The norm of the sum, post-norm."""
    return Member(node, "post", _decide(flow, node, "post", [], options))


def _decide(flow: Flow, node: int, position: Position, readers: list[int], options: Options) -> Norm:
    facts = flow.facts[node]
    kind = facts.norm or "layer"
    path = path_of(flow, node)
    frame = frame_of(flow, node)
    at = Operand(frame.place, frame.span, 0) if frame is not None else None
    generated = frame is not None and frame.span in flow.trace.generated
    if generated:
        at = in_graph(flow, node)
    norm = Norm(path, facts.type, kind, position, "keep", "", at=at)
    bias = _bias(flow, node, path) if position in ("inside", "end") else ""
    if kind not in options.drop_norm:
        return _with(norm, "keep", f"{kind}-type norms stay")
    if readers:
        return _with(norm, "keep", "its output is also read outside the branch")
    if at is None:
        return _with(norm, "keep", "the value that it normalizes has no name in the generated code")
    if _is_hooked(flow, path):
        return _with(norm, "keep", "hooks are attached to it")
    if not path and generated:
        given = _flat_bias(flow, node) if position in ("inside", "end") else ""
        return _with(norm, "bypass", f"{kind}-type norm dropped", "", given)
    if not path:
        return _functional(flow, node, norm)
    if flow.trace.model is None and frame is not None and frame.place.file != _file(flow):
        return _with(norm, "keep", f"its call is in another file, {frame.span}")
    attribute = code.callee(frame.place, frame.span) if frame is not None else None
    owned = attribute is not None and frame is not None and _same(flow, frame.owner, attribute, path)
    if facts.fused:
        return _with(norm, "unfuse", f"{kind}-type norm dropped, its activation stays", bias=bias)
    if generated:
        return _with(norm, "bypass", f"{kind}-type norm dropped", "", bias)
    if owned and attribute is not None:
        return _with(norm, "bypass", f"{kind}-type norm dropped", attribute, bias)
    return _with(norm, "slot", f"{kind}-type norm dropped", "", bias)


def _is_hooked(flow: Flow, path: str) -> bool:
    """Whether the norm module does more than its class says: hooks run with it."""
    module = flow.module(path) if flow.trace.model is not None and path else None
    if module is None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _file(flow: Flow) -> str | None:
    """The file that a static trace is of."""
    return next((frames[-1].place.file for node in flow.nodes if (frames := origin(node).frames)), None)


def _with(norm: Norm, action: NormAction, reason: str, attribute: str = "", bias: str = "") -> Norm:
    return Norm(norm.path, norm.type, norm.kind, norm.position, action, reason, norm.at, attribute, bias)


def _functional(flow: Flow, node: int, norm: Norm) -> Norm:
    frames = flow.origin(node).frames
    if len(frames) > 1 and frames[0].owner is None and norm.at is not None:
        at = helpers.called(frames, norm.at)
        if at is None:
            function = frames[0].place.qualname
            return _with(norm, "keep", f"functional norm inside {function}, which does not just return it")
        norm = replace(norm, at=at)
    if any(flow.constant[source] and _reads_attribute(flow, source) for source in flow.inputs[node]):
        return _with(norm, "keep", "functional norm with parameters of its module, which would be left unused")
    if norm.at is None or code.operand(norm.at) is None:
        return _with(norm, "keep", "functional norm whose call is not found in the text")
    return _with(norm, "bypass", f"{norm.kind}-type norm dropped")


def _reads_attribute(flow: Flow, node: int) -> bool:
    return flow.parameter(node) is not None or any(_reads_attribute(flow, source) for source in flow.inputs[node])


def in_graph(flow: Flow, node: int) -> Operand | None:
    """A norm or activation in generated code: its argument; for one of several nodes the last, and what it is given."""
    last, step = flow.origin(node).frames[-1], flow.steps.get(node)
    if step is None or step.frames[-1].span == last.span:
        return Operand(last.place, last.span, 0)
    entry = flow.inputs[node][0]
    before = flow.origin(entry).frames
    if before and before[-1].span.file == last.span.file:
        variable, given = code.target(before[-1].span), flow.nodes[entry]
        if given.target is operator.getitem and flow.inputs[entry] and _is_element(flow, entry):
            variable = code.element(last.span.file, variable, given.args[1])
        return Operand(last.place, last.span, variable) if variable else None
    if flow.nodes[entry].op == "placeholder" and isinstance(flow.trace.model, fx.GraphModule):
        return Operand(last.place, last.span, str(flow.nodes[entry].target))
    return None


def _is_element(flow: Flow, node: int) -> bool:
    """Whether a node takes a result out of the tuple that one call of a module returned."""
    (source, *_) = flow.inputs[node]
    return flow.origin(source).frames == flow.origin(node).frames


def calls(flow: Flow) -> Iterator[int]:
    """The runs of norm modules."""
    return (node for node in _runs(flow) if path_of(flow, node))


def functional(flow: Flow) -> Iterator[int]:
    """The runs of norms without a module, in code that somebody wrote."""
    for node in _runs(flow):
        frames = flow.origin(node).frames
        if frames and frames[-1].span not in flow.trace.generated and not path_of(flow, node):
            yield node


def _runs(flow: Flow) -> Iterator[int]:
    """The runs of norms; what one calls of its base class, `super().forward(x)`, is part of its run."""
    whole = set(flow.steps.values())
    for node in range(len(flow.nodes)):
        part = node not in flow.steps and is_within(flow.origin(node).call, whole)
        if flow.facts[node].kind == "norm" and not part:
            yield node


def path_of(flow: Flow, node: int) -> str:
    if node in flow.steps:
        step = flow.steps[node]
        return step.path if step.module is not None or flow.trace.model is None else ""
    return str(flow.nodes[node].target) if flow.nodes[node].op == "call_module" else ""


def frame_of(flow: Flow, node: int) -> Frame | None:
    frames = flow.steps[node].frames if node in flow.steps else flow.origin(node).frames
    return frames[0] if frames else None


def _same(flow: Flow, owner: str | None, attribute: str, path: str) -> bool:
    """Whether `self.<attribute>` of the owner is the module at `path`."""
    if owner is None:
        return False
    here = f"{owner}.{attribute}" if owner else attribute
    if here == path or flow.trace.model is None:
        return here == path
    module = flow.module(here)
    return module is not None and module is flow.module(path)


def _flat_bias(flow: Flow, node: int) -> str:
    """The weight of the layer without bias in front of a norm of a graph that had one; by itself, not by its module."""
    entry, seen, stack = flow.inputs[node][0], {node}, [node]
    while stack:
        for source in map(flow.index.__getitem__, flow.nodes[stack.pop()].all_input_nodes):
            if source not in seen and source != entry:
                seen.add(source)
                stack.append(source)
    paths = {path for one in seen if (path := flow.parameter(one))}
    parameters = [path for path in paths if isinstance(_tensor(flow, path), nn.Parameter)]
    return _written_layer(flow, entry) if len(parameters) > 1 else ""


def _tensor(flow: Flow, path: str) -> object:
    holder, _, name = path.rpartition(".")
    return getattr(flow.module(holder), name, None)


def _bias(flow: Flow, node: int, path: str) -> str:
    """The layer without bias in front of a norm that had one."""
    if flow.trace.model is None:
        return ""
    norm = flow.module(path)
    if getattr(norm, "bias", None) is None:
        return ""
    source = flow.inputs[node][0]
    while flow.facts[source].kind == "layout" and len(flow.inputs[source]) == 1:
        source = flow.inputs[source][0]
    if flow.nodes[source].op != "call_module":
        return _written_layer(flow, source)
    layer = str(flow.nodes[source].target)
    module = flow.module(layer)
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return layer if plain and module is not None and module.bias is None else ""


_LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "convolution"})


def _written_layer(flow: Flow, node: int) -> str:
    """The module whose weight a layer without bias reads in generated code, which can be given one."""
    target, frames = flow.nodes[node], flow.origin(node).frames
    if flow.name(node) not in _LAYERS or not frames or frames[-1].span not in flow.trace.generated:
        return ""
    weight, *others = target.args[1:]
    transposed = flow.name(node) == "convolution" and bool(target.args[6])
    if transposed or any(others[:1]) or target.kwargs.get("bias") is not None or not isinstance(weight, fx.Node):
        return ""
    path = flow.parameter(flow.index[weight]) or ""
    layer, _, name = path.rpartition(".")
    return layer if layer and name == "weight" else path


@dataclass(frozen=True, slots=True)
class Held:
    """A norm with the classes whose code may use it: file and qualified name of each."""

    norm: Norm
    definitions: tuple[code.Definition, ...]
    dead_reads: bool = False
    """The classes read the norm's attributes only where a converted instance never comes."""
    in_arm: bool = False
    """As `Member.in_arm`."""


def settle(
    held: list[Held], outside: Mapping[str, str], arms: frozenset[Span], by_text: Callable[[Norm], frozenset[Span]]
) -> dict[Norm, Norm]:
    """Which drops hold, given all of a model: a norm can go only if nothing else reads or calls it.

    A norm that different arms of a condition call, each for a block, goes as a whole: an identity takes its place.

    Args:
        held: every norm of every block.
        outside: where norms are called outside of blocks, by their paths.
        arms: calls on paths that did not run, which the plan bypasses as well.
        by_text: the calls of norms that are parts of blocks by the text of the class which calls a norm.

    Returns:
        For each norm its final form: as it was, in another way, or kept with the reason.
    """
    dropped: dict[str, set[Span]] = {}
    in_arms: dict[str, set[Span]] = {}
    kept = {path: f"it also runs outside a residual block, at {where}" for path, where in outside.items() if path}
    for one in held:
        if one.norm.action == "keep" and one.norm.path:
            kept.setdefault(one.norm.path, one.norm.reason)
        elif one.norm.at is not None:
            (in_arms if one.in_arm else dropped).setdefault(one.norm.path, set()).add(one.norm.at.span)
    whole: set[str] = set()
    for one in held:  # the uses of one norm go together or not at all
        norm = one.norm
        if norm.path in kept or not (one.in_arm or (norm.action == "bypass" and norm.attribute)):
            continue
        gone = dropped.get(norm.path, set()) | arms
        if not one.in_arm and _other_use(one, gone) is None:
            continue
        reason = _other_use(one, gone | in_arms.get(norm.path, set()) | by_text(norm)) if norm.attribute else ONE_ARM
        if reason is None:
            whole.add(norm.path)
        else:
            kept[norm.path] = reason

    def final(norm: Norm) -> Norm:
        if norm.action == "keep" or not norm.path:
            return norm
        if norm.path in kept:
            return _with(norm, "keep", kept[norm.path])
        return _with(norm, "slot", norm.reason, "", norm.bias) if norm.path in whole else norm

    return {one.norm: final(one.norm) for one in held}


def _other_use(held: Held, bypassed: set[Span]) -> str | None:
    for definition in held.definitions:
        if held.norm.attribute.partition(".")[0] in definition.unread:
            return f"a method of {definition.qualname} whose text cannot be had names it"
        calls, reads = code.uses(definition.file, definition.qualname, held.norm.attribute, definition.hidden)
        if reads and not held.dead_reads:
            return f"its attributes are read at {reads[0]}"
        left = [span for span in calls if span not in bypassed]
        if left:
            return f"it is also called at {left[0]}"
    return None
