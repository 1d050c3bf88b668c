"""Methods without gates: whether each norm that was moved stands where the plan has it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..detect import blocks as detected
from ..detect import norms
from ..detect.drafts import is_gated
from ..listing import number
from ..methods import METHODS
from ..plan import Options, Position
from .looks import Look, Subject, joined, module_at, several
from .results import Check

_Spot = tuple[str, str]
"""A block and its norm, by their paths; a functional norm has none."""


def asked(subject: Subject) -> tuple[Position, ...]:
    """The placements that a model was converted to, or is to be checked for."""
    if not subject.plans:
        given = METHODS[subject.options.method].placement
        return () if given is None else (given,)
    moves = [site.move for _, plan in subject.plans for site in plan.converted]
    return tuple(dict.fromkeys(move.position for move in moves if move is not None))


def placed(subject: Subject, look: Look) -> Iterator[Check]:
    """Whether the norms are where they were to go; in a model without a record, those of all blocks."""
    positions = asked(subject)
    seen = list(_norms(look)) if positions else []
    for position in positions:
        there = {spot for spot, at in seen if at == position}
        blocks = {path for path, _ in there}
        wanted = there | {spot for spot, _ in seen if spot[0] not in blocks}
        if subject.plans:
            wanted = _moved(subject, position)
        missing = sorted(f"the norm {norm} of {path or 'the model'}" for path, norm in wanted - there)
        found = bool(wanted or subject.plans)
        detail = several("is not where the method has it", missing) or number(len(wanted), "norm")
        yield Check("placed", look.mode, found and not missing, detail)


def _norms(look: Look) -> Iterator[tuple[_Spot, str]]:
    """The norms of the residual blocks, with their places."""
    flow, none = look.flow, Options(drop_norm=())
    for block in detected.find(flow, partial(is_gated, flow))[0]:
        frames = flow.origin(block.sum.node).frames
        path = frames[-1].owner or "" if frames else ""
        members = [member for branch in block.branches for member in norms.of_branch(flow, branch, block, none)]
        yield from (((path, member.norm.path), member.position) for member in members)
        users = flow.users[block.sum.node]
        if len(users) == 1 and flow.facts[users[0]].kind == "norm":
            yield (path, norms.path_of(flow, users[0])), "post"


def _moved(subject: Subject, position: Position) -> set[_Spot]:
    """The norms that were moved there, with their blocks; of several conversions the last one counts."""
    last: dict[_Spot, Position] = {}
    for prefix, plan in subject.plans:
        for site in plan.converted:
            for norm in site.norms if site.move is not None else ():
                spot = joined(prefix, site.path), joined(prefix, norm.path) if norm.path else ""
                if site.move is not None and (not norm.path or module_at(subject.model, spot[1]) is not None):
                    last[spot] = site.move.position
    return {spot for spot, at in last.items() if at == position}
