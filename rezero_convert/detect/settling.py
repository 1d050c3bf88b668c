"""Which norms go, given all blocks of a model: those of sums, those in arms of conditions, those that others need."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from .. import known
from ..errors import ConversionError
from ..plan import Norm, Options, Site, Span, tail
from . import arms, code, norms
from .blocks import Block
from .drafts import Draft
from .flow import Flow


def post_norms(flow: Flow, drafts: list[Draft], options: Options) -> list[Draft]:
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


def settled(flow: Flow, drafts: list[Draft], others: list[arms.Arm], options: Options, read: arms.Read) -> list[Draft]:
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
    final = norms.settle(held, outside, frozenset(bypassed), partial(_norm_calls, flow, read, done))
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


def _norm_calls(flow: Flow, read: arms.Read, done: Collection[Span | None], norm: Norm) -> frozenset[Span]:
    """The calls of a norm that goes with those blocks, by the text of the class whose method calls it."""
    if flow.trace.model is None or norm.at is None or not norm.attribute:
        return frozenset()
    try:
        found = read(norm.at.place.file, norm.at.place.cls)
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


def kept_calls(flow: Flow, sites: Iterable[Site]) -> tuple[tuple[Span, str], ...]:
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
