"""The detector: a graph pass that changes nothing and says for every add what it is and what is to become of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .. import sources
from ..capture.facts import is_leaf
from ..capture.guard import still, uncollected
from ..capture.static import traces
from ..capture.trace import Frame, Trace, origin
from ..listing import compact
from ..methods import METHODS, applied
from ..plan import Options, Place, Plan, Site, Span
from . import arms, code, merging, naming, placements, settling
from .biases import headed
from .blocks import Nested, Refusal, find
from .drafts import Draft, class_name, is_gated, of_block, of_refusal, site_of
from .flow import Flow, around, flow
from .naming import ZERO_INIT

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
        site = of_refusal(facts, refusal)
        sites.append(replace(site, code="RZ915", reason=_OUTSIDE) if refusal.code == "RZ902" else site)
    return tuple(_group(sites))


def _plan(trace: Trace, options: Options) -> Plan:
    facts = flow(trace, options.norm_types)
    left: dict[int, Refusal] = {}
    while True:
        blocks, refusals, nested = find(facts, partial(is_gated, facts), left)
        gated_long = [one.block for one in nested if options.long_skips and one.verdict == "long-skip"]
        drafts = [of_block(facts, block, options) for block in (*blocks, *gated_long)]
        drafts = settling.post_norms(facts, drafts, options)
        placement = METHODS[options.method].placement
        if placement is not None:
            drafts = [placements.moved(facts, draft, placement) for draft in drafts]
        others = _unexecuted(facts, drafts, options)
        merged = merging.merged(facts, drafts, refusals, [one.block for one in nested if one.block not in gated_long])
        shared = merging.shared_adds(facts, drafts, merged)
        if shared:
            facts = replace(facts, shared={**facts.shared, **shared})
            continue
        more = dict(_left(facts, nested, merged))
        if not more:
            break
        left |= more
    read = partial(_static, options)
    drafts = settling.settled(facts, merged, others, options, read)
    sites = applied(naming.named(facts, drafts, others, options, read), options)
    sites = headed(facts, sites, options)
    sites += [of_refusal(facts, refusal) for refusal in refusals]
    sites += [_nested(facts, one) for one in nested if one.block not in gated_long]
    sites += [_hidden(facts, frames) for frames in trace.hidden]
    ordered = sorted(_group(sites), key=_order)
    notes = (*trace.notes, *_idle(facts))
    if placement is not None:
        notes += tuple(placements.notes(facts, drafts, placement))
    return Plan(tuple(ordered), options, trace.route, trace.scalars, notes, settling.kept_calls(facts, ordered))


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
