"""The detector: a graph pass that changes nothing and says for every add what it is and what is to become of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from torch import nn

from .. import known
from ..capture.static import exclusive
from ..capture.trace import Frame, Trace, origin
from ..plan import Activation, Gate, Loop, Norm, Operand, Options, Place, Plan, Repair, Site, Span, Verdict
from . import arms, code, gates, helpers, loops, names, norms
from .blocks import Block, Branch, Nested, Refusal, describe, find, has_weight, owner_call
from .flow import Flow, flow
from .sums import Sum, Term

__all__ = ["detect"]

_KEPT_ACTIVATIONS = frozenset({"sigmoid", "softmax", "Sigmoid", "Softmax", "Softmax2d", "LogSoftmax", "log_softmax"})


@dataclass(frozen=True, slots=True)
class _Draft:
    """A block on its way to a site."""

    block: Block
    site: Site
    members: tuple[norms.Member, ...] = ()
    requests: tuple[names.Request | None, ...] = ()
    """Per branch; None for a gate that is reused."""
    weights: tuple[str, ...] = ()
    """The modules whose weights the branches end in; tells iterations of a loop apart."""


def detect(trace: Trace, options: Options | None = None) -> Plan:
    """Every add of a trace with its verdict, reason and place, and all that the rewriters need to know.

    Args:
        trace: from any capture.
        options: what to drop, move, include; the defaults of `Options` if None.
    """
    options = options or Options()
    facts = flow(trace)
    blocks, refusals, nested = find(facts)
    gated_long = [one.block for one in nested if options.long_skips and one.verdict == "long-skip"]
    drafts = [_draft(facts, block, options) for block in (*blocks, *gated_long)]
    drafts = _post_norms(facts, drafts, options)
    others = _unexecuted(facts, drafts, options)
    drafts = _settle_norms(facts, _merge(facts, drafts, refusals), others)
    sites = _named(facts, drafts, others, options)
    sites += [_refused(facts, refusal) for refusal in refusals]
    sites += [_nested(facts, one) for one in nested if one.block not in gated_long]
    sites += [_hidden(facts, frames) for frames in trace.hidden]
    ordered = sorted(_group(sites), key=_order)
    return Plan(tuple(ordered), options, trace.route, trace.scalars, trace.notes, _kept_calls(facts, ordered))


def _order(site: Site) -> tuple[str, int, int, str]:
    span = site.span
    return (span.file, span.line, span.col, site.path) if span else ("", 0, 0, site.path)


# One block


def _draft(flow: Flow, block: Block, options: Options) -> _Draft:
    """All that can be said of a block by itself."""
    site = _site(
        flow, block.sum, "converted", {"identity": "RZ101", "projection": "RZ102", "slice": "RZ103"}[block.kind]
    )
    placed = _unwanted(site, options) or _placed(flow, block, site)
    if not isinstance(placed[0], Site):
        number, reason = placed
        return _Draft(block, replace(site, verdict="refused", code=str(number), reason=str(reason)))
    site, operands = placed
    activation = _activation(flow, block, site, options)
    moved = activation is not None and activation.action == "move"
    members = [member for branch in block.branches for member in norms.of_branch(flow, branch, block, options)]
    made: list[Gate] = []
    requests: list[names.Request | None] = []
    weights: list[str] = []
    repairs: list[Repair] = []
    for branch in block.branches:
        found = gates.existing(flow, branch)
        settled = _present(flow, site, found)
        if settled is not None:
            return _Draft(block, settled)
        gate, repair, last = _gate(flow, branch, site, operands[branch.term], found, moved, options)
        made.append(gate)
        weights.append(last)
        requests.append(None if gate.existing else _request(flow, site, operands[branch.term], gate.child))
        repairs += repair
        if not options.preserve:
            repairs += gates.repairs(flow, branch)
    site = replace(
        site,
        reason=_reason(flow, block),
        skip=code.text(operands[block.shortcut]),
        skip_kind=block.kind,
        gates=tuple(made),
        activation=activation,
        repairs=tuple(dict.fromkeys(repairs)),
        confidence=1.0 if block.certain else 0.8,
    )
    return _Draft(block, site, tuple(members), tuple(requests), tuple(weights))


def _request(flow: Flow, site: Site, at: Operand, child: str) -> names.Request:
    module = _module(flow, site.path)
    bases = [base.__qualname__ for base in type(module).__mro__] if module is not None else [site.cls]
    rank = bases.index(at.place.cls) if at.place.cls in bases else int(at.place.cls != site.cls)
    return names.Request(site.cls, rank, at, child)


def _reason(flow: Flow, block: Block) -> str:
    skip = describe(flow, block.skip)
    if block.kind == "identity":
        return "every other operand is computed from the skip"
    return f"the skip is {describe(flow, block.shortcut.value)} of {skip}, the branch is computed from the same value"


def _site(flow: Flow, whole: Sum, verdict: Verdict, number: str) -> Site:
    frames = flow.origin(whole.node).frames
    frame = frames[0] if frames else None
    owner = frames[-1].owner if frames else None
    call = owner_call(flow, whole.node)
    path = owner if owner is not None else call.path
    return Site(
        verdict=verdict,
        code=number,
        reason="",
        path=path,
        cls=_class_name(flow, path) or call.cls,
        place=frame.place if frame else None,
        span=frame.span if frame else None,
        text=code.line(frame.span) if frame else "",
    )


def _class_name(flow: Flow, path: str) -> str:
    module = _module(flow, path)
    return type(module).__qualname__ if module is not None else ""


def _module(flow: Flow, path: str) -> nn.Module | None:
    if flow.trace.model is None:
        return None
    try:
        return flow.trace.model.get_submodule(path)
    except AttributeError:
        return None


def _frame(flow: Flow, node: int) -> Frame | None:
    frames = flow.origin(node).frames
    return frames[0] if frames else None


def _operand(flow: Flow, add: int, index: int | str) -> Operand:
    frame = _frame(flow, add)
    assert frame is not None
    return Operand(frame.place, frame.span, index, _is_receiver(flow, add, frame.span))


def _is_receiver(flow: Flow, node: int, span: Span) -> bool:
    return flow.nodes[node].op == "call_method" and code.is_receiver(span)


def _placed(flow: Flow, block: Block, site: Site) -> tuple[Site, dict[Term, Operand]] | tuple[str, str]:
    """The site at the text that is to be edited, and the operands there; or code and reason why there is none."""
    operands: dict[Term, Operand] = {}
    for term in block.sum.terms:
        frames = flow.origin(term.add).frames
        problem = _unreadable(frames)
        if problem is not None:
            return problem
        at = _operand(flow, term.add, term.operand)
        if code.operand(at) is None:
            return "RZ912", "the operands of the add are not found in its text"
        if _in_helper(frames) and term is not block.shortcut:
            argument = helpers.argument(frames, at)
            if not isinstance(argument, Operand):
                return "RZ912", argument
            at = argument
        operands[term] = at
    frames = flow.origin(block.sum.node).frames
    if _in_helper(frames):
        site = replace(site, place=frames[-1].place, span=frames[-1].span, text=code.line(frames[-1].span))
    return site, operands


def _in_helper(frames: tuple[Frame, ...]) -> bool:
    """Whether an add ran in a function other than the method (a comprehension is part of its method)."""
    return frames[0].owner is None and frames[0].place != frames[-1].place


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


def _unwanted(site: Site, options: Options) -> tuple[str, str] | None:
    """Whether the user's patterns leave the block out."""
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
    name = _relative(found.parameter, site.path)
    ours = name in getattr(_module(flow, site.path), "rezero_gates", ())
    state = {True: "zero now", False: "not zero: trained, left alone", None: "left alone"}[found.zero]
    if ours or found.kind == "scalar" or found.zero:
        gate = Gate(None, name, "", "", existing=True, init=None)
        reason = f"already gated by {gate.alpha} ({state})"
        return replace(site, verdict="gated", code="RZ120", reason=reason, gates=(gate,))
    return None


def _gate(
    flow: Flow, branch: Branch, site: Site, at: Operand, found: gates.Found | None, moved: bool, options: Options
) -> tuple[Gate, list[Repair], str]:
    """The gate of a branch, the repairs that it needs, and the module of the branch's last weight."""
    last = _last_weight(flow, branch, site.path)
    child = _relative(last, site.path).partition(".")[0] if last is not None else ""
    written = code.text(at)
    start = None if options.preserve else float(options.alpha_init)
    if found is not None and not moved:
        inside = found.parameter == site.path or found.parameter.startswith(f"{site.path}." if site.path else "")
        if inside and not found.conditional:
            name = _relative(found.parameter, site.path)
            shape = flow.shape(found.root) or (1,)
            return Gate(None, name, child, written, True, False, start, shape), [], last or ""
        if inside:
            return Gate(at, "", child, written, False, True, start), [], last or ""
    repair = [Repair(found.parameter, "ones")] if found is not None and found.zero and moved else []
    return Gate(at, "", child, written, init=1.0 if start is None else start), repair, last or ""


def _relative(path: str, owner: str) -> str:
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
            path = next((flow.parameter(source) for source in flow.inputs[node] if flow.parameter(source)), None)
        if path is not None and path.startswith(prefix):
            return path
    return None


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
    at = Operand(frames[0].place, frames[0].span, 0, step is None and _is_receiver(flow, user, frames[0].span))
    if code.operand(at) is None:
        at = replace(at, index="input")
    kind = flow.facts[user].type
    if options.activation == "keep":
        return Activation(kind, at, "keep", "kept by choice")
    if len(users) > 1 or flow.nodes[node] in owner_call(flow, node).outputs:
        return Activation(kind, at, "keep", "the sum before it is read elsewhere too")
    if kind in _KEPT_ACTIVATIONS:
        return Activation(kind, at, "keep", f"{kind} of a sum is not an activation of the branch")
    if frames[0].place != site.place or code.operand(at) is None:
        return Activation(kind, at, "keep", "its call cannot be moved to the add")
    return Activation(kind, at, "move", "moved into the branch")


# All blocks together


def _post_norms(flow: Flow, drafts: list[_Draft], options: Options) -> list[_Draft]:
    """Add the norm of the sum where it follows every occurrence of an add; else it is the norm before a head."""
    following: dict[Span | None, list[int | None]] = {}
    for draft in drafts:
        following.setdefault(draft.site.span, []).append(_next_norm(flow, draft.block))
    result = []
    for draft in drafts:
        node = _next_norm(flow, draft.block)
        everywhere = following[draft.site.span]
        alone = len(everywhere) == 1 and any(member.position == "pre" for member in draft.members)
        alone = alone or (node is not None and _after_loop(flow, draft.site, node))
        if node is not None and None not in everywhere and not alone and draft.site.verdict == "converted":
            draft = replace(draft, members=(*draft.members, norms.after(flow, node, options)))
        result.append(draft)
    return result


def _after_loop(flow: Flow, site: Site, node: int) -> bool:
    """Whether a norm follows the loop over modules that the add runs in; a static trace has one pass of it."""
    loop, star, _ = site.path.rpartition("*")
    return bool(star) and not norms.path_of(flow, node).startswith(f"{loop}*.")


def _next_norm(flow: Flow, block: Block) -> int | None:
    users = flow.users[block.sum.node]
    return users[0] if len(users) == 1 and flow.facts[users[0]].kind == "norm" else None


def _unexecuted(flow: Flow, drafts: list[_Draft], options: Options) -> list[arms.Arm]:
    """Residual adds on paths that the recorded run did not take."""
    if flow.trace.model is None:
        return []
    executed = frozenset(frame.span for node in flow.nodes for frame in origin(node).frames)
    ran: dict[tuple[str, str], set[Place]] = {}
    for node in flow.nodes:
        frames = origin(node).frames
        if frames and frames[-1].owner is not None:
            path = frames[-1].owner
            ran.setdefault((path, _class_name(flow, path)), set()).add(frames[-1].place)
    read = arms.reader(lambda trace: detect(trace, options), executed)
    return list(arms.unexecuted(ran, (draft.site for draft in drafts), executed, read))


def _settle_norms(flow: Flow, drafts: list[_Draft], others: list[arms.Arm]) -> list[_Draft]:
    """Keep the norms that something else needs."""
    bypassed = {norm.at.span for arm in others for norm in arms.norms(arm) if norm.action == "bypass" and norm.at}
    held = [
        norms.Held(member.norm, *_definitions(flow, draft.site, member.norm))
        for draft in drafts
        for member in draft.members
    ]
    inside = {member.node for draft in drafts for member in draft.members}
    outside = {norms.path_of(flow, node): _where(flow, node) for node in norms.calls(flow) if node not in inside}
    final = norms.settle(held, outside, frozenset(bypassed))
    return [replace(draft, site=_with_norms(draft, final)) if draft.members else draft for draft in drafts]


def _where(flow: Flow, node: int) -> str:
    frame = norms.frame_of(flow, node)
    return str(frame.span) if frame is not None else "a place without source text"


def _kept_calls(flow: Flow, sites: Iterable[Site]) -> tuple[tuple[Span, str], ...]:
    """The calls of norms that stay, with the last name of the norm's path.

    A static trace of a class by itself does not tell how others use the class, so its own norms are left out there.
    """
    gone = {norm.path for site in sites for norm in site.norms if norm.action != "keep"}
    found: dict[tuple[Span, str], None] = {}
    for node in norms.calls(flow):
        path, frame = norms.path_of(flow, node), norms.frame_of(flow, node)
        alone = flow.trace.model is None and frame is not None and frame.owner == ""
        if path and path not in gone and frame is not None and not alone:
            found[frame.span, path.rpartition(".")[2]] = None
    return tuple(found)


def _definitions(flow: Flow, site: Site, norm: Norm) -> tuple[tuple[code.Definition, ...], bool]:
    """The classes whose code may use a norm, and whether what they read of it is never reached."""
    holder = norm.path.removesuffix(norm.attribute).rstrip(".")
    module = _module(flow, holder) if norm.attribute else None
    if module is not None:
        cls: Any = type(module)
        return code.definitions(cls), known.reads_are_dead(cls)
    place = norm.at.place if norm.at is not None else site.place
    if place is None:
        return (), False
    return (code.Definition(place.file, place.cls),), known.text_is_of_torch(place.file, place.cls)


def _with_norms(draft: _Draft, final: dict[Norm, Norm]) -> Site:
    own = tuple(dict.fromkeys(final[member.norm] for member in draft.members))
    gone = {norm.path for norm in own if norm.action != "keep"}
    repairs = tuple(repair for repair in draft.site.repairs if repair.parameter.rpartition(".")[0] not in gone)
    return replace(draft.site, norms=own, repairs=repairs)


def _merge(flow: Flow, drafts: list[_Draft], refusals: list[Refusal]) -> list[_Draft]:
    """One draft per add in the code of an instance: a module that runs twice is decided once."""
    refused = {(site.path, site.span) for refusal in refusals for site in (_refused(flow, refusal),)}
    groups: dict[tuple[str, Span | None], list[_Draft]] = {}
    for draft in drafts:
        groups.setdefault((draft.site.path, draft.site.span), []).append(draft)
    return [_merged(flow, group, key in refused) for key, group in groups.items()]


def _merged(flow: Flow, group: list[_Draft], refused: bool) -> _Draft:
    """The runs of one add as one draft; with a list of alphas where it adds the branches of several modules."""
    first = group[0]
    site = replace(first.site, calls=len(group))
    verdicts = {draft.site.verdict for draft in group}
    if "converted" not in verdicts:
        return replace(first, site=site)
    if len(verdicts) > 1 or refused:
        return _undecided(first, site, "the add is a residual add in some of its runs only")
    call = owner_call(flow, first.block.sum.node)
    passes = [draft for draft in group if owner_call(flow, draft.block.sum.node) is call]
    made = list(site.gates)
    for number, gate in enumerate(made):
        weights = [_relative(draft.weights[number], site.path) for draft in passes]
        if len(weights) == 1 and "*" not in weights[0]:
            continue
        if "" in weights:
            return _undecided(first, site, "the add runs several times, for branches that lie outside its module")
        if len(set(weights)) == 1 and "*" not in weights[0]:
            continue  # a weight-tied iteration
        loop = loops.loop_of(gate.at.place, gate.at.span, weights) if gate.at is not None and site.place else ""
        if not isinstance(loop, Loop):
            return _undecided(first, site, loop or "an existing gate in a loop")
        made[number] = replace(gate, loop=loop)
    members = tuple(member for draft in group for member in draft.members)
    repairs = tuple(dict.fromkeys(repair for draft in group for repair in draft.site.repairs))
    return replace(first, site=replace(site, gates=tuple(made), repairs=repairs), members=members)


def _undecided(draft: _Draft, site: Site, reason: str) -> _Draft:
    return _Draft(draft.block, replace(_bare(site), verdict="refused", code="RZ911", reason=reason))


def _bare(site: Site) -> Site:
    return replace(site, gates=(), norms=(), activation=None, repairs=(), skip="", skip_kind="")


def _named(flow: Flow, drafts: list[_Draft], others: list[arms.Arm], options: Options) -> list[Site]:
    """Give the alphas their names, the sites their form; arms that did not run count as adds of their class."""
    requests = [request for draft in drafts for request in draft.requests if request is not None]
    requests += [
        _request(flow, replace(arm.found, path=arm.path, cls=arm.cls), gate.at, gate.child)
        for arm in others
        for gate in arm.found.gates
        if gate.at
    ]
    given = names.alphas(
        requests,
        shared=options.share == "layer",
        exclusive=lambda one, other: exclusive(one.span, other.span),
        taken=_taken(flow, drafts),
    )
    sites = []
    for draft in drafts:
        made = (
            tuple(
                gate if request is None else replace(gate, alpha=given[request])
                for gate, request in zip(draft.site.gates, draft.requests, strict=True)
            )
            if draft.requests
            else draft.site.gates
        )
        site = replace(draft.site, gates=made)
        sites.append(replace(site, form=_form(site)) if site.verdict == "converted" else site)
    settled = {(site.path, site.span): site for site in sites}
    gone = frozenset(norm.path for site in sites for norm in site.norms if norm.action != "keep")
    for arm in others:
        twin = settled.get((arm.path, arm.twin.span)) if arm.twin is not None else None
        alive = twin is not None and twin.verdict == "converted"
        sites.append(arms.as_site(replace(arm, twin=twin if alive else None), gone))
    return sites


def _taken(flow: Flow, drafts: list[_Draft]) -> Callable[[str, str], bool]:
    """Whether a class already has an attribute of a name, by its instances and by its text."""
    owners: dict[str, list[_Draft]] = {}
    for draft in drafts:
        owners.setdefault(draft.site.cls, []).append(draft)

    def taken(cls: str, name: str) -> bool:
        for draft in owners.get(cls, ()):
            module = _module(flow, draft.site.path)
            if module is not None:
                before = draft.site.verdict != "converted" and name in module.__dict__.get("rezero_gates", ())
                if hasattr(module, name) and not before:
                    return True
            elif draft.site.place is not None and name in code.assigned(draft.site.place.file, draft.site.place.cls):
                return True
        return False

    return taken


def _form(site: Site) -> str:
    positions = {norm.position for norm in site.norms}
    words = [
        {"identity": "identity skip", "projection": "projection shortcut", "slice": "skip through a slice"}.get(
            site.skip_kind, ""
        )
    ]
    words += [
        name
        for key, name in (("pre", "pre-norm"), ("end", "branch-end norm"), ("post", "post-norm"))
        if key in positions
    ]
    if site.activation is not None:
        words.append("activation after the add")
    if len(site.gates) > 1:
        words.append(f"{len(site.gates)} parallel branches")
    if any(gate.existing for gate in site.gates):
        words.append("existing gate")
    if site.repairs:
        words.append("zero-initialised last layer")
    return ", ".join(words)


# The rest


def _refused(flow: Flow, refusal: Refusal) -> Site:
    return replace(_site(flow, refusal.sum, "refused", refusal.code), reason=refusal.reason)


def _hidden(flow: Flow, frames: tuple[Frame, ...]) -> Site:
    frame = frames[0] if frames else None
    path = next((one.owner for one in frames if one.owner is not None), "")
    return Site(
        verdict="hidden",
        code="RZ141",
        reason="runs in compiled code (TorchScript or C++) that is called here; what it adds cannot be seen",
        path=path,
        cls=_class_name(flow, path),
        place=frame.place if frame else None,
        span=frame.span if frame else None,
        text=code.line(frame.span) if frame else "",
    )


def _nested(flow: Flow, nested: Nested) -> Site:
    site = _site(flow, nested.block.sum, nested.verdict, {"long-skip": "RZ130", "interior": "RZ131"}[nested.verdict])
    other = _frame(flow, nested.other.sum.node)
    where = str(other.span) if other is not None else "another add"
    reason = (
        f"spans the block at {where}" if nested.verdict == "long-skip" else f"inside the branch of the block at {where}"
    )
    return replace(site, reason=reason)


def _group(sites: list[Site]) -> Iterator[Site]:
    """Equal findings of one instance as one site, with the number of calls."""
    seen: dict[tuple[str, Span | None, str, str], Site] = {}
    for site in sites:
        key = (site.path, site.span, site.verdict, site.reason)
        if key in seen and site.verdict not in ("converted", "gated"):
            seen[key] = replace(seen[key], calls=seen[key].calls + site.calls)
        else:
            seen[key] = site
    yield from seen.values()
