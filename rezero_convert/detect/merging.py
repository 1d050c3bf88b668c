"""The runs of one add as one finding: in loops over modules, in functions that several calls share."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from ..capture.trace import Frame, origin
from ..plan import Gate, Site, Span
from . import helpers, loops
from .blocks import Block, Refusal, owner_call
from .drafts import Draft, in_helper, of_refusal, placed, relative, site_of
from .flow import Flow, Shared, around, spans


def shared_adds(flow: Flow, drafts: list[Draft], merged: list[Draft]) -> dict[tuple[Span, ...], Shared]:
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


def merged(flow: Flow, drafts: list[Draft], refusals: list[Refusal], ungated: list[Block]) -> list[Draft]:
    """One draft per add in the code of an instance: a module that runs twice is decided once."""
    refused = {_place_of(flow, refusal) for refusal in refusals}
    passes = {(site_of(flow, block.sum, "interior", "").span, owner_call(flow, block.sum.node)) for block in ungated}
    groups: dict[tuple[str, Span | None], list[Draft]] = {}
    for draft in drafts:
        groups.setdefault((draft.site.path, draft.site.span), []).append(draft)
    for key, group in groups.items():
        if any((key[1], owner_call(flow, draft.block.sum.node)) in passes for draft in group):
            refused.add(key)  # other passes of the same loop add for what gets no gate
    return [_as_one(flow, group, key in refused) for key, group in groups.items()]


def _place_of(flow: Flow, refusal: Refusal) -> tuple[str, Span | None]:
    """Path and text of what is refused, as those of a block there."""
    site, node = of_refusal(flow, refusal), refusal.sum.node
    return site.path, flow.origin(node).frames[-1].span if site.span and in_helper(flow, node) else site.span


def _as_one(flow: Flow, group: list[Draft], refused: bool) -> Draft:
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
