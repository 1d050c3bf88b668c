"""One block by itself: everything that can be said of it before the others are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

from torch import fx, nn

from ..capture.trace import Frame
from ..methods import METHODS, Method
from ..plan import Activation, Gate, Operand, Options, Repair, Scale, Site, SkipGate, Span, Verdict
from . import carries, code, gates, helpers, names, norms
from .biases import biases
from .blocks import Block, Branch, Refusal, describe, has_weight, owner_call
from .channels import channels
from .flow import Flow, shared
from .sums import Sum, Term

_KEPT_ACTIVATIONS = frozenset({"sigmoid", "softmax", "Sigmoid", "Softmax", "Softmax2d", "LogSoftmax", "log_softmax"})


@dataclass(frozen=True, slots=True)
class Draft:
    """A block on its way to a site."""

    block: Block
    site: Site
    members: tuple[norms.Member, ...] = ()
    requests: tuple[names.Request | None, ...] = ()
    """Per branch; None for a gate that is reused."""
    weights: tuple[str, ...] = ()
    """The modules whose weights the branches end in; tells iterations of a loop apart."""


def of_block(flow: Flow, block: Block, options: Options) -> Draft:
    """All that can be said of a block by itself."""
    site = site_of(
        flow, block.sum, "converted", {"identity": "RZ101", "projection": "RZ102", "slice": "RZ103"}[block.kind]
    )
    found_at = unwanted(site, options) or placed(flow, block, site)
    if not isinstance(found_at[0], Site):
        number, reason = found_at
        return Draft(block, replace(site, verdict="refused", code=str(number), reason=str(reason)))
    site, operands = found_at
    method = METHODS[options.method]
    members = [member for branch in block.branches for member in norms.of_branch(flow, branch, block, options)]
    if method.placement:  # what is to move, is known when all blocks are
        return Draft(block, _described(flow, block, site, operands), tuple(members))
    scaled = _skip_gate(flow, block, operands, method)
    if isinstance(scaled, str):
        return Draft(block, replace(site, verdict="refused", code="RZ919", reason=scaled))
    site = replace(site, skip_gate=scaled)
    activation = _activation(flow, block, site, options)
    moved = activation is not None and activation.action == "move"
    made: list[Gate] = []
    requests: list[names.Request | None] = []
    weights: list[str] = []
    repairs: list[Repair] = []
    for branch in block.branches:
        found = gates.last_norm(flow, branch) if method.norm_gate else gates.existing(flow, branch)
        settled = _carried(flow, block, site) if method.map == "carry" else None
        settled = settled or _present(flow, site, found)
        if settled is not None:
            return Draft(block, replace(settled, skip_gate=None))
        problem = _unformed(flow, branch, site, found, options)
        if problem is not None:
            return Draft(block, replace(site, verdict="refused", code="RZ919", reason=problem, skip_gate=None))
        gate, repair, last = _gate(flow, branch, site, operands[branch.term], found, moved, options)
        made.append(replace(gate, carries=operands[block.shortcut]) if method.map == "carry" else gate)
        weights.append(last)
        requests.append(None if gate.existing else request(flow, site, operands[branch.term], gate.child))
        repairs += repair
        if method.biases:
            given = biases(flow, branch, site, activation)
            if isinstance(given, str):
                return Draft(block, replace(site, verdict="refused", code="RZ919", reason=given))
            site = replace(site, shifts=(*site.shifts, *given[0]))
            repairs += given[1]
            continue
        if not options.preserve:
            repairs += gates.repairs(flow, branch)
            cause = gates.held_at_zero(flow, branch, {one.parameter for one in repairs})
            if cause is not None:
                reason = f"the branch is zero by {cause}, which nothing can undo: its alpha would never get a gradient"
                return Draft(block, replace(site, verdict="refused", code="RZ913", reason=reason))
    site = replace(
        _described(flow, block, site, operands),
        gates=tuple(made),
        activation=activation,
        repairs=tuple(dict.fromkeys(repairs)),
    )
    return Draft(block, site, tuple(members), tuple(requests), tuple(weights))


def _described(flow: Flow, block: Block, site: Site, operands: dict[Term, Operand]) -> Site:
    return replace(
        site,
        reason=_reason(flow, block),
        skip=code.text(operands[block.shortcut]),
        skip_kind=block.kind,
        confidence=1.0 if block.certain else 0.8,
    )


def request(flow: Flow, site: Site, at: Operand, child: str) -> names.Request:
    module = flow.module(site.path)
    bases = [base.__qualname__ for base in type(module).__mro__] if module is not None else [site.cls]
    rank = bases.index(at.place.cls) if at.place.cls in bases else int(at.place.cls != site.cls)
    return names.Request(site.cls, rank, replace(at, span=flow.trace.generated.get(at.span, at.span)), child)


def _reason(flow: Flow, block: Block) -> str:
    skip = describe(flow, block.skip)
    if block.kind == "identity":
        return "every other operand is computed from the skip"
    return f"the skip is {describe(flow, block.shortcut.value)} of {skip}, the branch is computed from the same value"


def site_of(flow: Flow, whole: Sum, verdict: Verdict, number: str) -> Site:
    frames = flow.origin(whole.node).frames
    frame = frames[0] if frames else None
    owner = frames[-1].owner if frames else None
    call = owner_call(flow, whole.node)
    path = owner if owner is not None else call.path
    written = flow.origin(whole.node).written
    return Site(
        verdict=verdict,
        code=number,
        reason="",
        path=path,
        cls=class_name(flow, path) or call.cls,
        place=frame.place if frame else None,
        span=frame.span if frame else None,
        text=(written and code.line(written)) or (code.line(frame.span) if frame else ""),
        written=written,
    )


def of_refusal(flow: Flow, refusal: Refusal) -> Site:
    return replace(site_of(flow, refusal.sum, "refused", refusal.code), reason=refusal.reason)


def class_name(flow: Flow, path: str) -> str:
    module = flow.module(path)
    if isinstance(module, fx.GraphModule):
        return "GraphModule"  # each has a class of its own
    plain = type(module) is nn.Module  # torch.fx keeps the children of a module, not its class
    return type(module).__qualname__ if module is not None and not plain else ""


def frame_of(flow: Flow, node: int) -> Frame | None:
    frames = flow.origin(node).frames
    return frames[0] if frames else None


def operand_of(flow: Flow, add: int, index: int | str) -> Operand:
    frame = frame_of(flow, add)
    assert frame is not None
    return Operand(frame.place, frame.span, index, is_receiver(flow, add, frame.span))


def is_receiver(flow: Flow, node: int, span: Span) -> bool:
    target = flow.nodes[node]
    return target.op == "call_method" and code.is_receiver(span, len(target.args) + len(target.kwargs))


def placed(flow: Flow, block: Block, site: Site) -> tuple[Site, dict[Term, Operand]] | tuple[str, str]:
    """The site at the text that is to be edited, and the operands there; or code and reason why there is none."""
    operands: dict[Term, Operand] = {}
    for term in block.sum.terms:
        frames = flow.origin(term.add).frames
        problem = _unreadable(frames)
        if problem is not None:
            return problem
        at = operand_of(flow, term.add, term.operand)
        if term.operand == "":
            return "RZ912", "no operand of the lerp scales the branch, and only that, in the stream's precision"
        if code.operand(at) is None:
            return "RZ912", "the operands of the add are not found in its text"
        if in_helper(flow, term.add) and term is not block.shortcut:
            several = shared(flow, term.add)
            argument = helpers.argument(flow, frames, at, shared=several is not None)
            if not isinstance(argument, Operand):
                return ("RZ912", argument) if several is None else ("RZ911", f"{_served(several.lines)}: {argument}")
            at = argument
        operands[term] = at
    frames = flow.origin(block.sum.node).frames
    if in_helper(flow, block.sum.node):
        site = replace(site, place=frames[-1].place, span=frames[-1].span, text=code.line(frames[-1].span))
        return unwanted(site, Options()) or (site, operands)
    return site, operands


def in_helper(flow: Flow, node: int) -> bool:
    """Whether an add ran in a function other than the method that holds its blocks.

    A comprehension is part of its method, a nested function too, unless several calls share it.
    """
    frames = flow.origin(node).frames
    return shared(flow, node) is not None or (frames[0].owner is None and frames[0].place != frames[-1].place)


def _served(lines: tuple[int, ...]) -> str:
    return f"one add for the calls in line{'s' * (len(lines) > 1)} {' and '.join(map(str, lines))}"


def _unreadable(frames: tuple[Frame, ...]) -> tuple[str, str] | None:
    if not frames:
        return "RZ909", "the add lies outside the model's own code"
    if code.expression(frames[0].span) is None:
        return "RZ909", f"there is no source text for {frames[0].place.qualname}"
    if not code.is_add(frames[0].span):
        return "RZ912", "the sum is not written as an add of its operands"
    if frames[-1].owner is None:
        return "RZ912", f"the add is inside the function {frames[0].place.qualname}, which no module's method calls"
    return None


def unwanted(site: Site, options: Options) -> tuple[str, str] | None:
    """Whether the user's patterns, or a comment in the text, leave the block out."""
    if site.span is not None and site.place is not None:
        line = code.skip_comment(site.span, site.place)
        if line is not None:
            return "RZ900", f"left out by the comment at {site.span.file}:{line}"
    where = (site.path, f"{site.cls}.{site.place.name}" if site.place else site.cls, site.cls)
    if options.include and not any(fnmatch(name, pattern) for pattern in options.include for name in where):
        return "RZ900", "not among the included modules"
    hit = next((pattern for pattern in options.exclude if any(fnmatch(name, pattern) for name in where)), None)
    return ("RZ900", f"excluded by {hit!r}") if hit is not None else None


def _present(flow: Flow, site: Site, found: gates.Found | None) -> Site | None:
    """The site of a block that is left alone because it is gated already."""
    if found is None:
        return None
    if found.kind == "input":
        reason = f"its gate is computed from the input by {found.parameter}, which is zero: already the identity"
        return replace(site, verdict="gated", code="RZ908", reason=reason)
    if found.kind == "offset":
        reason = f"its gate, computed from {found.parameter}, is zero now: left alone"
        return replace(site, verdict="gated", code="RZ120", reason=reason)
    name = relative(found.parameter, site.path)
    ours = _is_ours(flow, found, site.path)
    state = {True: "zero now", False: "not zero: trained, left alone", None: "left alone"}[found.zero]
    if ours or found.kind == "scalar" or found.zero:
        gate = Gate(None, name, "", "", existing=True, init=None)
        reason = f"already gated by {name} ({state})"
        inside = _is_inside(found, site)
        return replace(site, verdict="gated", code="RZ120", reason=reason, gates=(gate,) if inside else ())
    return None


def _carried(flow: Flow, block: Block, site: Site) -> Site | None:
    layer = carries.layer(flow, block)
    if layer is None:
        return None
    return replace(site, verdict="gated", code="RZ120", reason=f"its gate is computed from the skip by {layer}")


def _gate(
    flow: Flow, branch: Branch, site: Site, at: Operand, found: gates.Found | None, moved: bool, options: Options
) -> tuple[Gate, list[Repair], str]:
    """The gate of a branch, the repairs that it needs, and the module of the branch's last weight."""
    last = _last_weight(flow, branch, site.path)
    child = relative(last, site.path).partition(".")[0] if last is not None else ""
    written = code.text(at)
    start = None if options.preserve else 0.0  # what it is, `methods.applied` says
    if found is not None and (not moved or METHODS[options.method].norm_gate):
        inside = _is_inside(found, site)
        if inside and not found.conditional:
            name = relative(found.parameter, site.path)
            if METHODS[options.method].norm_gate:
                gate = Gate(None, name, child, written, existing=True, of_norm=True, init=start)
                return gate, _norm_bias(flow, found), last or ""
            shape = flow.shape(found.root) or (1,)
            return Gate(None, name, child, written, existing=True, init=start, shape=shape), [], last or ""
        if inside:
            return Gate(at, "", child, written, conditional=True, init=start), [], last or ""
    repair = [Repair(found.parameter, "ones")] if found is not None and found.zero and moved else []
    shape, scale, size = _channels(flow, branch, site, options)
    gate = Gate(at, "", child, written, init=1.0 if start is None else start, shape=shape, scale=scale, size=size)
    return gate, repair, last or ""


def _norm_bias(flow: Flow, found: gates.Found) -> list[Repair]:
    """What a norm adds must start at 0 as its weight does."""
    path = f"{found.parameter.rpartition('.')[0]}.bias".lstrip(".")
    value = gates.parameter(flow, path)
    return [] if value is None or gates.is_zero(value) else [Repair(path, "zeros")]


def _skip_gate(flow: Flow, block: Block, operands: dict[Term, Operand], method: Method) -> SkipGate | str | None:
    """What a factor of the skip goes on, if the method has one; or why there is no one place for it."""
    if method.map == "carry":
        return carries.problem(flow, block, operands)
    if method.biases and len(block.branches) > 1:
        return "several branches are added to one skip, and the method is defined for one"
    if method.skip == "one":
        return None
    if len(block.branches) > 1:
        return "several branches are added to one skip, whose factor is defined for one"
    if flow.name(block.shortcut.add) == "lerp":
        return "lerp scales the skip by itself"
    if in_helper(flow, block.shortcut.add):
        at = operands[block.shortcut]
        found = helpers.argument(flow, flow.origin(block.shortcut.add).frames, at)
        return SkipGate(found) if isinstance(found, Operand) else f"the skip cannot be scaled: {found}"
    return SkipGate(operands[block.shortcut])


def _unformed(flow: Flow, branch: Branch, site: Site, found: gates.Found | None, options: Options) -> str | None:
    """Why a method's form cannot be written for a branch."""
    if METHODS[options.method].norm_gate:
        inside = found is not None and _is_inside(found, site)
        return None if inside else "the branch does not end in a norm of its module with a weight"
    if found is not None and not METHODS[options.method].plain:
        return f"the branch has a gate already, {found.parameter}, which method {options.method!r} has no place for"
    if options.granularity == "channel" and found is None:
        made = channels(flow, branch)
        if isinstance(made, str) and flow.trace.model is not None:
            return f"a gate for each channel: {made}"
        if METHODS[options.method].map == "carry" and not isinstance(made, str):
            return carries.unread(flow, branch, made.trailing)
    return None


def _channels(flow: Flow, branch: Branch, site: Site, options: Options) -> tuple[tuple[int, ...], Scale, str]:
    """Shape and view of a new gate, and what tells its size; the shape is (0,) where the text alone does not tell."""
    made = channels(flow, branch) if options.granularity == "channel" else ""
    if isinstance(made, str):
        return (0,) if options.granularity == "channel" else (1,), Scale(), ""
    parts = relative(made.layer, site.path).split(".")
    written = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts).lstrip(".")
    inside = made.layer.startswith(f"{site.path}." if site.path else "") and "*" not in made.layer
    size = f"{written}.{made.attribute}" if made.attribute and inside and made.layer else ""
    module = flow.module(made.layer) if size else None
    if module is not None and getattr(module, made.attribute, None) != made.count:
        size = ""
    return (made.count or 0,), Scale(trailing=made.trailing), size


def is_gated(flow: Flow, block: Block) -> bool:
    """Whether the block has our gates already, by an earlier run, or is closed by zero scalars."""
    path = site_of(flow, block.sum, "gated", "").path
    gate = [gates.existing(flow, branch) for branch in block.branches]
    return all(found and ((found.kind == "scalar" and found.zero) or _is_ours(flow, found, path)) for found in gate)


def _is_ours(flow: Flow, found: gates.Found, owner: str) -> bool:
    return relative(found.parameter, owner) in getattr(flow.module(owner), "rezero_gates", ())


def _is_inside(found: gates.Found, site: Site) -> bool:
    """Whether the module that adds holds the gate's parameter."""
    return found.parameter.startswith(f"{site.path}." if site.path else "")


def relative(path: str, owner: str) -> str:
    return path.removeprefix(f"{owner}.") if owner else path


def _last_weight(flow: Flow, branch: Branch, owner: str) -> str | None:
    """The path of the last weight of a branch below its owner."""
    prefix = f"{owner}." if owner else ""
    for node in reversed(branch.region[1:]):
        if not has_weight(flow, node):
            continue
        target = flow.nodes[node]
        if target.op == "call_module":
            path: str | None = str(target.target)
        else:
            path = next((path for source in flow.inputs[node] if (path := _turned(flow, source))), None)
        if path is not None and path.startswith(prefix):
            return _as_called(flow, node, path, owner) if "*" in path else path
    return None


def _as_called(flow: Flow, node: int, path: str, owner: str) -> str:
    """A path with elements of unknown number, up to the module that the owner calls: those in it share one alpha."""
    call = flow.origin(node).call
    while call.parent is not None and call.parent.path != owner:
        call = call.parent
    return call.path if call.parent is not None and "*" in path.removeprefix(f"{call.path}.") else path


def _turned(flow: Flow, node: int) -> str | None:
    """The path of the parameter that a node is, in whatever layout."""
    while flow.facts[node].kind == "layout" and len(flow.inputs[node]) == 1:
        node = flow.inputs[node][0]
    return flow.parameter(node)


def _activation(flow: Flow, block: Block, site: Site, options: Options) -> Activation | None:
    """The activation of the sum, if the module that adds applies one."""
    node = block.sum.node
    users = flow.users[node]
    active = [user for user in users if flow.facts[user].kind == "activation"]
    if not active:
        return None
    user = active[0]
    step = flow.steps.get(user)
    frames = step.frames if step is not None else flow.origin(user).frames
    parent = step.parent if step is not None else flow.origin(user).call
    if not frames or frames[-1].owner != site.path or parent is not owner_call(flow, node):
        return None
    at = Operand(frames[0].place, frames[0].span, 0, step is None and is_receiver(flow, user, frames[0].span))
    written_out = norms.in_graph(flow, user) if step is not None and frames[0].span in flow.trace.generated else None
    if written_out is not None:
        at = written_out
    elif code.operand(at) is None:
        at = replace(at, index="input")
    kind = flow.facts[user].type
    if options.activation == "keep":
        return Activation(kind, at, "keep", "kept by choice")
    if len(users) > 1 or flow.nodes[node] in owner_call(flow, node).outputs:
        return Activation(kind, at, "keep", "the sum before it is read elsewhere too")
    if kind in _KEPT_ACTIVATIONS:
        return Activation(kind, at, "keep", f"{kind} of a sum is not an activation of the branch")
    if frames[0].place != site.place or (code.operand(at) is None and written_out is None):
        return Activation(kind, at, "keep", "its call cannot be moved to the add")
    if works_in_place(flow, user) and any(_is_activated(flow, branch.term.value) for branch in block.branches):
        return Activation(kind, at, "keep", "it works in place, and the branch ends in an activation of its own")
    return Activation(kind, at, "move", "moved into the branch")


def works_in_place(flow: Flow, node: int) -> bool:
    path = norms.path_of(flow, node)
    module = flow.module(path) if path else None
    return flow.facts[node].inplace or bool(flow.nodes[node].kwargs.get("inplace") or getattr(module, "inplace", False))


def _is_activated(flow: Flow, node: int) -> bool:
    """Whether a value is the output of an activation, which the backward pass may need as it is."""
    while flow.facts[node].kind in ("layout", "dropout") and flow.inputs[node]:
        node = flow.inputs[node][0]
    return flow.facts[node].kind == "activation"
