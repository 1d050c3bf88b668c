"""The detector: a graph pass that changes nothing and says for every add what it is and what is to become of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from .. import known, sources
from ..capture.facts import is_leaf
from ..capture.guard import still, uncollected
from ..capture.static import adds, exclusive, traces
from ..capture.trace import Frame, Trace, origin
from ..errors import ConversionError
from ..listing import compact
from ..methods import METHODS, applied
from ..plan import Gate, Norm, Options, Place, Plan, Site, Span, tail
from . import arms, code, helpers, loops, names, norms, placements, unrolled
from .biases import headed
from .blocks import Block, Nested, Refusal, find, owner_call
from .drafts import Draft, class_name, in_helper, is_gated, of_block, placed, relative, request, site_of, unwanted
from .flow import Flow, Shared, around, flow, spans

__all__ = ["ZERO_INIT", "detect", "outside"]


def detect(trace: Trace, options: Options | None = None) -> Plan:
    """Every add of a trace with its verdict, reason and place, and all that the rewriters need to know.

    Args:
        trace: from any capture.
        options: what to drop, move, include; the defaults of `Options` if None.
    """
    with still(trace.model), uncollected():
        return _plan(trace, options or Options())


_OUTSIDE = "the text does not tell which module's alpha would scale it: pass --model and --inputs"


def outside(trace: Trace) -> tuple[Site, ...]:
    """The adds of a function that no method of a module is seen to call: none is rewritten from the text."""
    facts = flow(trace)
    blocks, refusals, nested = find(facts, lambda block: False)
    sites = [replace(site_of(facts, one.sum, "refused", "RZ915"), reason=_OUTSIDE) for one in blocks]
    sites += [_nested(facts, one) for one in nested]
    for refusal in refusals:
        site = _refused(facts, refusal)
        sites.append(replace(site, code="RZ915", reason=_OUTSIDE) if refusal.code == "RZ902" else site)
    return tuple(_group(sites))


def _plan(trace: Trace, options: Options) -> Plan:
    facts = flow(trace, options.norm_types)
    left: dict[int, Refusal] = {}
    while True:
        blocks, refusals, nested = find(facts, partial(is_gated, facts), left)
        gated_long = [one.block for one in nested if options.long_skips and one.verdict == "long-skip"]
        drafts = [of_block(facts, block, options) for block in (*blocks, *gated_long)]
        drafts = _post_norms(facts, drafts, options)
        placement = METHODS[options.method].placement
        if placement is not None:
            drafts = [placements.moved(facts, draft, placement) for draft in drafts]
        others = _unexecuted(facts, drafts, options)
        merged = _merge(facts, drafts, refusals, [one.block for one in nested if one.block not in gated_long])
        shared = _shared(facts, drafts, merged)
        if shared:
            facts = replace(facts, shared={**facts.shared, **shared})
            continue
        more = dict(_left(facts, nested, merged))
        if not more:
            break
        left |= more
    drafts = _settle_norms(facts, merged, others, options)
    sites = applied(_named(facts, drafts, others, options), options)
    sites = headed(facts, sites, options)
    sites += [_refused(facts, refusal) for refusal in refusals]
    sites += [_nested(facts, one) for one in nested if one.block not in gated_long]
    sites += [_hidden(facts, frames) for frames in trace.hidden]
    ordered = sorted(_group(sites), key=_order)
    notes = (*trace.notes, *_idle(facts))
    if placement is not None:
        notes += tuple(placements.notes(facts, drafts, placement))
    return Plan(tuple(ordered), options, trace.route, trace.scalars, notes, _kept_calls(facts, ordered))


def _shared(flow: Flow, drafts: list[Draft], merged: list[Draft]) -> dict[tuple[Span, ...], Shared]:
    """The adds in functions that several calls share: each of these is a block of its own (see `Flow.shared`)."""
    refused = {(one.site.path, one.site.span) for one in merged if one.site.code == "RZ911"}
    wanted: dict[tuple[Span, ...], list[Draft]] = {}
    for draft in drafts:
        frames = origin(flow.nodes[draft.block.sum.node]).frames
        decided = draft.site.verdict in ("converted", "gated")
        if decided and len(around(frames)) > 1 and spans(frames) not in flow.shared:
            wanted.setdefault(spans(frames), []).append(draft)
    every: dict[tuple[Span, ...], list[tuple[Frame, ...]]] = {}
    for frames in (origin(node).frames for node in flow.nodes) if wanted else ():
        every.setdefault(spans(frames), []).append(around(frames))
    found: dict[tuple[Span, ...], Shared] = {}
    for key, runs in wanted.items():
        undecided = any((draft.site.path, draft.site.span) in refused for draft in runs)
        levels, apart = _levels(every[key])
        if not (apart or undecided) or any(len(stack) <= levels for stack in every[key]):
            continue
        calls = Shared(levels, tuple(sorted({stack[levels].span.line for stack in every[key]})))
        further = replace(flow, shared={**flow.shared, key: calls})
        results = [placed(further, draft.block, draft.site)[0] for draft in runs]
        if all(isinstance(one, Site) or one == "RZ900" for one in results) or (apart and undecided):
            found[key] = calls
    return found


def _levels(stacks: list[tuple[Frame, ...]]) -> tuple[int, bool]:
    """How many calls further out an add is called from several places, if it is, in a run or by the text."""
    for level in range(1, min(map(len, stacks))):
        pairs = {stack[level - 1 : level + 1] for stack in stacks}
        if helpers.any_apart(outer.span for _, outer in pairs) or any(helpers.is_shared(*pair) for pair in pairs):
            return level, True
    first = stacks[0]
    own = next(number for number, frame in enumerate(first) if frame.owner is not None)
    return max(1, own + (first[0].place != first[own].place)), False


def _left(flow: Flow, nested: list[Nested], merged: list[Draft]) -> Iterator[tuple[int, Refusal]]:
    """The blocks around others that cannot be rewritten for what their text is."""
    reasons = {(one.site.path, one.site.span): one.site for one in merged if one.site.code in ("RZ911", "RZ912")}
    for block in (one.other for one in nested if one.verdict == "interior"):
        here = site_of(flow, block.sum, "refused", "")
        site = reasons.get((here.path, here.span))
        if site is not None:
            yield block.sum.node, Refusal(block.sum, site.code, site.reason)


def _order(site: Site) -> tuple[str, int, int, str]:
    span = site.span
    return (span.file, span.line, span.col, site.path) if span else ("", 0, 0, site.path)


def _idle(flow: Flow) -> Iterator[str]:
    """A note on the modules that did not run; what they add is in no report."""
    model = flow.trace.model
    if model is None:
        return
    ran = {call.path for call in flow.trace.calls}
    ran |= {str(node.target) for node in flow.nodes if node.op == "call_module"}
    ran |= {str(node.target).rpartition(".")[0] for node in flow.nodes if node.op == "get_attr"}
    leaves = tuple(f"{node.target}." for node in flow.nodes if node.op == "call_module")
    above = {path[:end] for path in ran for end, letter in enumerate(path) if letter == "."} | ran | {""}
    idle: list[str] = []
    for path, module in model.named_modules():
        told = path.startswith((*leaves, *(f"{one}." for one in idle[-1:])))  # a layer's own parts run with it
        if path not in above and not told and any(_may_add(part) for part in module.modules()):
            idle.append(path)
    if idle:
        yield f"did not run, and is not judged: {compact(idle)}; pass inputs, or set what they depend on, to run it"


def _may_add(module: nn.Module) -> bool:
    """Whether a module has a forward of the model's own, and weights."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    own = type(module).forward is not nn.Module.forward and not is_leaf(type(module))
    return (
        own and not isinstance(module, nn.Sequential) and any(parameter.dim() > 1 for parameter in module.parameters())
    )


def _post_norms(flow: Flow, drafts: list[Draft], options: Options) -> list[Draft]:
    """Add the norm of the sum where it follows every occurrence of an add; else it is the norm before a head."""
    following: dict[Span | None, list[int | None]] = {}
    for draft in drafts:
        following.setdefault(_text(flow, draft), []).append(_next_norm(flow, draft.block))
    result = []
    for draft in drafts:
        node = _next_norm(flow, draft.block)
        everywhere = following[_text(flow, draft)]
        alone = len(everywhere) == 1 and any(member.position in ("pre", "end") for member in draft.members)
        alone = alone or (node is not None and (_after_loop(flow, draft.site, node) or _after_list(flow, draft, node)))
        if node is not None and None not in everywhere and not alone and draft.site.verdict == "converted":
            draft = replace(draft, members=(*draft.members, norms.after(flow, node, options)))
        result.append(draft)
    return result


def _text(flow: Flow, draft: Draft) -> Span | None:
    """The add's text, or what stands for it where each instance has code of its own."""
    span = draft.site.span
    return flow.trace.generated.get(span, span) if span is not None else None


def _after_loop(flow: Flow, site: Site, node: int) -> bool:
    """Whether a norm follows the loop over modules that the add runs in; a static trace has one pass of it."""
    loop, star, _ = site.path.rpartition("*")
    return bool(star) and not norms.path_of(flow, node).startswith(f"{loop}*.")


def _after_list(flow: Flow, draft: Draft, node: int) -> bool:
    """Whether a norm lies outside of the list whose element holds the add, and the block has norms of its own: behind
    an encoder's and a decoder's only layer every occurrence of the add is followed by one."""
    names = draft.site.path.split(".")
    last = max((number for number, name in enumerate(names) if name.isdigit()), default=None)
    if last is None or not any(member.position in ("pre", "end") for member in draft.members):
        return False
    held, element = ".".join(names[:last]), ".".join(names[: last + 1])
    path = norms.path_of(flow, node)
    return path.rpartition(".")[0] != held and not path.startswith(f"{element}.")


def _next_norm(flow: Flow, block: Block) -> int | None:
    users = flow.users[block.sum.node]
    return users[0] if len(users) == 1 and flow.facts[users[0]].kind == "norm" else None


def _unexecuted(flow: Flow, drafts: list[Draft], options: Options) -> list[arms.Arm]:
    """Residual adds on paths that the recorded run did not take."""
    if flow.trace.model is None:
        return []
    executed = frozenset(frame.span for node in flow.nodes for frame in around(origin(node).frames))
    ran: dict[tuple[str, str], set[Place]] = {}
    for node in flow.nodes:
        frames = origin(node).frames
        if frames and frames[-1].owner is not None and frames[-1].span not in flow.trace.generated:
            path = frames[-1].owner
            ran.setdefault((path, class_name(flow, path)), set()).add(frames[-1].place)
    judged = executed - {key[0] for key in flow.shared}  # of those that calls share, some may not have run
    read = arms.reader(partial(_static, options), judged)
    return list(arms.unexecuted(ran, (draft.site for draft in drafts), executed, read))


@sources.cached
def _static(options: Options, file: str, cls: str) -> tuple[Site, ...]:
    """The findings of a class by itself, from its text."""
    found = traces(file, only=frozenset({cls}))
    return tuple(site for trace in found for site in detect(trace, options).sites if site.path == "")


def _settle_norms(flow: Flow, drafts: list[Draft], others: list[arms.Arm], options: Options) -> list[Draft]:
    """Keep the norms that something else needs."""
    if flow.trace.model is None:
        drafts = [_with_arms(flow, draft, options) for draft in drafts]
    bypassed = {norm.at.span for arm in others for norm in arms.norms(arm) if norm.action == "bypass" and norm.at}
    held = [
        norms.Held(member.norm, *_definitions(flow, draft.site, member.norm), member.in_arm)
        for draft in drafts
        for member in draft.members
    ]
    inside = {member.node for draft in drafts for member in draft.members}
    outside = {norms.path_of(flow, node): _where(flow, node) for node in norms.calls(flow) if node not in inside}
    done = {draft.site.span for draft in drafts if draft.site.verdict == "converted"}
    done |= {arm.found.span for arm in others if arm.twin is not None}
    final = norms.settle(held, outside, frozenset(bypassed), partial(_norm_calls, flow, options, done))
    busy = {
        (frame.span, frames[-1].owner): _where(flow, node)
        for node in norms.functional(flow)
        if node not in inside
        for frames in (flow.origin(node).frames,)
        for frame in frames
    }
    kept = {
        norm.at.span: norm.reason for arm in others for norm in arms.norms(arm) if norm.action == "keep" and norm.at
    }
    for member in (member for draft in drafts for member in draft.members):
        norm, frames = final[member.norm], flow.origin(member.node).frames
        where = busy.get((norm.at.span, frames[-1].owner)) if norm.at is not None and frames else None
        if where is not None and not norm.path and norm.action == "bypass":
            final[member.norm] = replace(norm, action="keep", reason=f"its text also runs outside a branch, at {where}")
        elif norm.at is not None and norm.action in ("bypass", "slot") and norm.at.span in kept:
            final[member.norm] = replace(norm, action="keep", reason=kept[norm.at.span])
    return [replace(draft, site=_with_norms(draft, final)) if draft.members else draft for draft in drafts]


def _with_arms(flow: Flow, draft: Draft, options: Options) -> Draft:
    """The draft with the norms that it has in one arm of a condition only."""
    if draft.site.verdict != "converted":
        return draft
    return replace(draft, members=(*draft.members, *norms.of_one_arm(flow, draft.block, options)))


def _norm_calls(flow: Flow, options: Options, done: Collection[Span | None], norm: Norm) -> frozenset[Span]:
    """The calls of a norm that goes with those blocks, by the text of the class whose method calls it."""
    if flow.trace.model is None or norm.at is None or not norm.attribute:
        return frozenset()
    try:
        found = _static(options, norm.at.place.file, norm.at.place.cls)
    except ConversionError:  # a file without a text
        return frozenset()
    sites = (site for site in found if site.verdict == "converted" and site.span in done)
    own = (one for site in sites for one in site.norms if one.path == norm.attribute)
    return frozenset(one.at.span for one in own if one.action != "keep" and one.at is not None)


def _where(flow: Flow, node: int) -> str:
    frame = norms.frame_of(flow, node)
    if (written := flow.origin(node).written) is not None:
        return str(written)
    return str(frame.span) if frame is not None else "a place without source text"


def _kept_calls(flow: Flow, sites: Iterable[Site]) -> tuple[tuple[Span, str], ...]:
    """The calls of norms that stay, with the `tail` of the norm's path.

    A static trace of a class by itself does not tell how others use the class, so its own norms are left out there.
    """
    gone = {norm.path for site in sites for norm in site.norms if norm.action != "keep"}
    found: dict[tuple[Span, str], None] = {}
    for node in norms.calls(flow):
        path, frame = norms.path_of(flow, node), norms.frame_of(flow, node)
        alone = flow.trace.model is None and frame is not None and frame.owner == ""
        if path and path not in gone and frame is not None and not alone:
            found[frame.span, tail(path)] = None
    spans = {norm.at.span for site in sites for norm in site.norms if norm.action != "keep" and norm.at is not None}
    for node in norms.functional(flow):
        frames = flow.origin(node).frames
        alone = flow.trace.model is None and frames[-1].owner == ""
        if not alone and not any(frame.span in spans for frame in frames):
            found |= dict.fromkeys((frame.span, "") for frame in frames)
    return tuple(found)


def _definitions(flow: Flow, site: Site, norm: Norm) -> tuple[tuple[code.Definition, ...], bool]:
    """The classes whose code may use a norm, and whether what they read of it is never reached."""
    holder = norm.path.removesuffix(norm.attribute).rstrip(".")
    module = flow.module(holder) if norm.attribute else None
    if module is not None:
        cls: Any = type(module)
        return code.definitions(cls), known.reads_are_dead(cls)
    place = norm.at.place if norm.at is not None else site.place
    if place is None:
        return (), False
    return (code.Definition(place.file, place.cls),), known.text_is_of_torch(place.file, place.cls)


def _with_norms(draft: Draft, final: dict[Norm, Norm]) -> Site:
    own = tuple(dict.fromkeys(final[member.norm] for member in draft.members))
    gone = {norm.path for norm in own if norm.action != "keep"}
    repairs = tuple(repair for repair in draft.site.repairs if repair.parameter.rpartition(".")[0] not in gone)
    return replace(draft.site, norms=own, repairs=repairs)


def _merge(flow: Flow, drafts: list[Draft], refusals: list[Refusal], ungated: list[Block]) -> list[Draft]:
    """One draft per add in the code of an instance: a module that runs twice is decided once."""
    refused = {_place_of(flow, refusal) for refusal in refusals}
    passes = {(site_of(flow, block.sum, "interior", "").span, owner_call(flow, block.sum.node)) for block in ungated}
    groups: dict[tuple[str, Span | None], list[Draft]] = {}
    for draft in drafts:
        groups.setdefault((draft.site.path, draft.site.span), []).append(draft)
    for key, group in groups.items():
        if any((key[1], owner_call(flow, draft.block.sum.node)) in passes for draft in group):
            refused.add(key)  # other passes of the same loop add for what gets no gate
    return [_merged(flow, group, key in refused) for key, group in groups.items()]


def _place_of(flow: Flow, refusal: Refusal) -> tuple[str, Span | None]:
    """Path and text of what is refused, as those of a block there."""
    site, node = _refused(flow, refusal), refusal.sum.node
    return site.path, flow.origin(node).frames[-1].span if site.span and in_helper(flow, node) else site.span


def _merged(flow: Flow, group: list[Draft], refused: bool) -> Draft:
    """The runs of one add as one draft; with a list of alphas where it adds the branches of several modules."""
    first = _distinct(group[0])
    site = replace(first.site, calls=len(group))
    verdicts = {draft.site.verdict for draft in group}
    if "converted" not in verdicts:
        gates = {gate.alpha: gate for draft in group for gate in draft.site.gates}
        return replace(first, site=replace(site, gates=tuple(gates.values())))
    if len(verdicts) > 1 or refused or len({draft.site.move for draft in group}) > 1:
        return _undecided(first, site, "the add is a residual add in some of its runs only")
    call = owner_call(flow, first.block.sum.node)
    passes = [draft for draft in group if owner_call(flow, draft.block.sum.node) is call]
    made = list(site.gates)
    requests = list(first.requests)
    for number, gate in enumerate(site.gates):
        weights = [relative(weight, site.path) for draft in passes for weight in _weights(draft, number, gate)]
        recorded = flow.trace.model is not None
        single = len(weights) == 1 and "*" not in weights[0]
        if (single and (not weights[0] or gate.at is None)) or _is_generated(flow, gate, weights):
            continue
        if "" in weights:
            return _undecided(first, site, "the add runs several times, for branches that lie outside its module")
        if len(weights) > 1 == len(set(weights)) and "*" not in weights[0] and recorded:
            continue  # a weight-tied iteration
        if gate.at is None and "*" not in weights[0]:
            others = _further(gate, [draft.site.gates[number] for draft in passes])
            if others is None:
                return _undecided(first, site, "the branch has a gate already in some of its runs only")
            made += others
            requests += [None] * len(others)
            continue
        if gate.at is None:
            continue  # a class by itself: its text makes the gates of all passes
        elements = partial(_elements, flow, site.path)
        walk = loops.loop_of(gate.at.place, gate.at.span, weights, elements, run=recorded)
        if single and recorded and not isinstance(walk, loops.Walk):
            continue  # one pass of a loop whose others do not add
        if not isinstance(walk, loops.Walk):
            return _undecided(first, site, walk)
        made[number] = replace(gate, loops=walk.loops, members=walk.members)
    members = tuple(member for draft in group for member in draft.members)
    repairs = tuple(dict.fromkeys(repair for draft in group for repair in draft.site.repairs))
    merged = replace(site, gates=tuple(made), repairs=repairs)
    return replace(first, site=merged, members=members, requests=tuple(requests))


def _is_generated(flow: Flow, gate: Gate, weights: list[str]) -> bool:
    """Whether a gate for one branch is in generated code, which has no loops."""
    return gate.at is not None and gate.at.span in flow.trace.generated and len(set(weights)) == 1


def _distinct(draft: Draft) -> Draft:
    """A draft with one gate for each operand: the passes of a loop may all add to one sum."""
    made = draft.site.gates
    own = [n for n, gate in enumerate(made) if gate.at is None or gate.at not in [other.at for other in made[:n]]]
    site = replace(draft.site, gates=tuple(made[n] for n in own))
    return replace(draft, site=site, requests=tuple(draft.requests[n] for n in own)) if draft.requests else draft


def _weights(draft: Draft, number: int, gate: Gate) -> list[str]:
    """The last weights of the branches that a gate scales in one run of its add."""
    if gate.at is None:
        return [draft.weights[number]]
    return [weight for weight, one in zip(draft.weights, draft.site.gates, strict=True) if one.at == gate.at]


def _elements(flow: Flow, owner: str, path: str) -> tuple[str, ...] | None:
    """The names of what a list or dictionary of modules, or of parameters, below an owner holds."""
    module = flow.module(f"{owner}.{path}" if owner else path)
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return tuple(module._parameters)
    return None if module is None else tuple(module._modules)


def _further(gate: Gate, passes: list[Gate]) -> list[Gate] | None:
    """The gates that a loop's other passes end in, each once; None if some pass has none of its own yet."""
    if any(one.at is not None for one in passes):
        return None
    return [one for one in {one.alpha: one for one in passes}.values() if one.alpha != gate.alpha]


def _undecided(draft: Draft, site: Site, reason: str) -> Draft:
    return Draft(draft.block, replace(_bare(site), verdict="refused", code="RZ911", reason=reason))


def _bare(site: Site) -> Site:
    return replace(
        site, gates=(), norms=(), activation=None, repairs=(), skip="", skip_kind="", skip_gate=None, shifts=(),
        move=None,
    )  # fmt: skip


def _named(flow: Flow, drafts: list[Draft], others: list[arms.Arm], options: Options) -> list[Site]:
    """Give the alphas their names, the sites their form; arms that did not run count as adds of their class."""
    requests = [request for draft in drafts for request in draft.requests if request is not None]
    requests += [asked for arm in others for gate in arm.found.gates if (asked := _of_arm(flow, arm, gate))]
    layers = METHODS[options.method].map == "carry"  # a gate is a module then, and no lists are made of those
    passes = {} if layers else unrolled.passes(flow, drafts, partial(_may_walk, flow, options))
    lines = {asked: draft.site.written for draft in drafts for asked in draft.requests if asked is not None}
    by_text = {
        asked: _as_in_text(flow, passes.get(asked, (asked,))[0], lines.get(asked), options) for asked in requests
    }
    chosen = names.alphas(
        by_text.values(),
        shared=options.share == "layer",
        exclusive=lambda one, other: exclusive(one.span, other.span),
        taken=_taken(flow, drafts),
        several=cache(partial(_holds_several, flow, drafts, options)),
    )
    given = {asked: ".".join((chosen[named], *passes.get(asked, ())[1:])) for asked, named in by_text.items()}
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
        alone = arm.twin is None and unwanted(_site_of_arm(arm), options) is None
        own = tuple(given[asked] for gate in arm.found.gates if (asked := _of_arm(flow, arm, gate)))
        sites.append(arms.as_site(replace(arm, twin=twin if alive else None), gone, own if alone else ()))
    return sites


def _holds_several(flow: Flow, drafts: list[Draft], options: Options, asked: names.Request) -> bool:
    """Whether the text of a class holds several branches that need a gate, though its instances ask for one.

    Instances may have run different arms: where the tracer did not note the lines, that shows in the kinds of their
    skips. Others may not have run at all, or have a gate already.
    """
    text, place = _text_of(flow, asked.cls), asked.at.place
    if text is None:
        return flow.trace.model is not None and _gated_in_text(options, place.file, place.cls) > 1
    file, definition, qualname = text
    own = [draft.site for draft in drafts if draft.site.cls == asked.cls and draft.site.gates]
    if all(site.written is not None for site in own):
        lines = {site.span.line for site in _static(options, file, qualname) if site.span and _new(site)}
        lines |= {site.written.line for site in own if site.written is not None and _new(site)}
        return len(lines) > 1
    kinds = {site.skip_kind for site in own}
    if len(kinds) > 1 and sum(not code.adds_number(span) for span in adds(file, definition)) > 1:
        return True
    return _gated_in_text(options, file, qualname) > 1


def _new(site: Site) -> bool:
    return any(not gate.existing for gate in site.gates)


def _gated_in_text(options: Options, file: str, cls: str) -> int:
    """How many branches of a class get a gate by its text."""
    try:
        found = _static(options, file, cls) if cls else ()
    except ConversionError:  # a file without a text
        return 0
    return len({gate.at for site in found for gate in site.gates if not gate.existing})


def _may_walk(flow: Flow, options: Options, name: str, child: str) -> bool:
    """Whether the text of a class gates what it adds in a loop over a child; true where its text is not known."""
    text = _text_of(flow, name)
    if text is None:
        return True
    file, _, qualname = text
    return any(gate.loops and gate.child == child for site in _static(options, file, qualname) for gate in site.gates)


def _text_of(flow: Flow, name: str) -> tuple[str, ast.ClassDef, str] | None:
    """File, definition and qualified name of a class that generated code came from."""
    cls: Any = flow.trace.classes.get(name)
    try:
        file = inspect.getsourcefile(cls) if cls is not None else None
        definition = sources.class_of(file, cls.__qualname__) if file is not None else None
    except (TypeError, ConversionError):  # a class without a file, or a file without a text
        return None
    return None if file is None or definition is None else (file, definition, cls.__qualname__)


def _as_in_text(flow: Flow, asked: names.Request, line: Span | None, options: Options) -> names.Request:
    """The request as the text by itself makes it: a run has seen one arm of `a(x) if c else b(x)`, a graph none."""
    place = asked.at.place
    if asked.at.span in flow.trace.generated:
        return _on_line(flow, asked, line, options) if line is not None else asked
    if flow.trace.model is None or not place.cls:
        return asked
    try:
        found = _static(options, place.file, place.cls)
    except ConversionError:  # a file without a text
        return asked
    children = (gate.child for site in found for gate in site.gates if gate.at and gate.at.same_text(asked.at))
    return replace(asked, child=next(children, "") or asked.child)


def _on_line(flow: Flow, asked: names.Request, line: Span, options: Options) -> names.Request:
    """The request for the only branch that the text of the class adds on a line, or at least for its only add there."""
    text = _text_of(flow, asked.cls)
    if text is None:
        return asked
    file, definition, qualname = text
    found = _static(options, file, qualname)
    here = {gate.at: gate.child for site in found if _same_line(site.span, line) for gate in site.gates if gate.at}
    if len(here) == 1:
        ((at, child),) = here.items()
        bases = [base.__qualname__ for base in flow.trace.classes[asked.cls].__mro__]
        return names.Request(asked.cls, bases.index(at.place.cls) if at.place.cls in bases else 0, at, child)
    spans = [span for span in adds(file, definition) if _same_line(span, line)]
    if len(spans) != 1:
        return asked
    place = Place(asked.at.place.module, f"{qualname}.forward", file, definition.lineno)
    return replace(asked, at=replace(asked.at, place=place, span=spans[0]))


def _same_line(span: Span | None, line: Span) -> bool:
    return span is not None and (span.file, span.line) == (line.file, line.line)


def _of_arm(flow: Flow, arm: arms.Arm, gate: Gate) -> names.Request | None:
    return request(flow, _site_of_arm(arm), gate.at, gate.child) if gate.at is not None else None


def _site_of_arm(arm: arms.Arm) -> Site:
    return replace(arm.found, path=arm.path, cls=arm.cls)


def _taken(flow: Flow, drafts: list[Draft]) -> Callable[[str, str], bool]:
    """Whether a class already has an attribute of a name, by its instances and by its text."""
    owners: dict[str, list[Draft]] = {}
    for draft in drafts:
        owners.setdefault(draft.site.cls, []).append(draft)

    def taken(cls: str, name: str) -> bool:
        for draft in owners.get(cls, ()):
            module = flow.module(draft.site.path)
            if module is not None:
                before = draft.site.verdict != "converted" and name in module.__dict__.get("rezero_gates", ())
                if hasattr(module, name) and not before:
                    return True
                text = _text_of(flow, cls) if type(module) is not flow.trace.classes.get(cls) else None
                if text is not None and name in code.assigned(text[0], text[2]):
                    return True
            elif draft.site.place is not None and name in code.assigned(draft.site.place.file, draft.site.place.cls):
                return True
        return False

    return taken


ZERO_INIT = "zero-initialised last layer"
"""In the form of a block."""


def _form(site: Site) -> str:
    positions = {norm.position for norm in site.norms if norm.reason != norms.ONE_ARM}
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
    branches = {gate.branch for gate in site.gates}
    if len(branches) > 1:
        words.append(f"{len(branches)} parallel branches")
    if any(gate.existing for gate in site.gates):
        words.append("existing gate")
    if any(repair.how in ("ones", "reset", "unwrap") for repair in site.repairs):
        words.append(ZERO_INIT)
    return ", ".join(words)


# The rest


def _refused(flow: Flow, refusal: Refusal) -> Site:
    return replace(site_of(flow, refusal.sum, "refused", refusal.code), reason=refusal.reason)


def _hidden(flow: Flow, frames: tuple[Frame, ...]) -> Site:
    frame = frames[0] if frames else None
    path = next((one.owner for one in frames if one.owner is not None), "")
    return Site(
        verdict="hidden",
        code="RZ141",
        reason="runs in compiled code (TorchScript or C++) that is called here; what it adds cannot be seen",
        path=path,
        cls=class_name(flow, path),
        place=frame.place if frame else None,
        span=frame.span if frame else None,
        text=code.line(frame.span) if frame else "",
    )


def _nested(flow: Flow, nested: Nested) -> Site:
    site = site_of(flow, nested.block.sum, nested.verdict, {"long-skip": "RZ130", "interior": "RZ131"}[nested.verdict])
    other = site_of(flow, nested.other.sum, nested.verdict, "").shown
    where = str(other) if other is not None else "another add"
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
