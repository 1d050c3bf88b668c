"""Adds that a recorded run did not come to: in the methods that ran, on paths that did not.

They are read from the text by the static capture and matched with what ran. An arm that no call runs together with an
executed one, and that adds a branch ending in the same child, is its twin and gets the same edit (the two norm orders
of `nn.TransformerEncoderLayer`). Any other is reported as not executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from .. import sources
from ..capture.static import adds, exclusive
from ..errors import ConversionError
from ..plan import Gate, Norm, Operand, Place, Site, Span
from . import code

Read = Callable[[str, str], tuple[Site, ...]]
"""The static findings of a class, by file and qualified name."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A residual add of one instance in code that did not run."""

    path: str
    cls: str
    place: Place
    found: Site
    """The static finding."""
    twin: Site | None
    """The executed site whose edit it shares."""


def unexecuted(
    ran: Mapping[tuple[str, str], Collection[Place]], sites: Iterable[Site], executed: frozenset[Span], read: Read
) -> Iterator[Arm]:
    """The residual adds that did not run in methods that did, and the twins in methods of which one or the other runs.

    Args:
        ran: the methods that ran, by path and class of their instance.
        sites: what was found in the run.
        executed: the spans of all adds that ran.
        read: gives the static findings of a class.
    """
    own: dict[str, list[Site]] = {}
    for site in sites:
        if site.verdict == "converted":
            own.setdefault(site.path, []).append(site)
    for (path, cls), places in ran.items():
        at = {(place.file, place.line): place for place in places}
        for file, qualname in dict.fromkeys((place.file, place.cls) for place in places):
            for found in read(file, qualname):
                if found.place is None or found.span in executed or found.verdict != "converted":
                    continue
                twin = next((site for site in own.get(path, ()) if _is_twin(site, found)), None)
                place = at.get((found.place.file, found.place.line))
                if place is None and twin is not None and twin.place is not None:
                    place = replace(found.place, module=twin.place.module)
                if place is not None:
                    yield Arm(path, cls, place, found, twin)


def _is_twin(site: Site, found: Site) -> bool:
    if site.span is None or found.span is None or not exclusive(site.span, found.span):
        return False
    return [gate.child for gate in site.gates] == [gate.child for gate in found.gates]


_NOT_RUN = (
    "a residual add on a path that did not run: pass inputs that run it, unless its condition is a setting of the "
    "module"
)


def as_site(arm: Arm, gone: frozenset[str], alphas: tuple[str, ...]) -> Site:
    """The finding as a site of the instance: twins with the edits of their own text and the alphas of the other.

    What runs in training only, when no audit runs, gets gates of its own; running it proves them.

    Args:
        arm: the finding.
        gone: the paths of the norms that are dropped in the model.
        alphas: the names of the gates that it may get if it has no twin.
    """
    found = replace(
        arm.found, verdict="not-executed", code="RZ140", path=arm.path, cls=arm.cls, place=arm.place, calls=0
    )
    if found.move is not None:
        return _replaced(found, arm)
    if arm.twin is None and len(alphas) == len(found.gates) and _is_for_training(arm):
        reason = "runs in training only: read from the text, its norms kept"
        gates = tuple(
            replace(_moved(gate, gate, arm), alpha=alpha)
            for gate, alpha in zip(found.gates, alphas, strict=True)
            if gate.at is not None
        )
        return replace(found, reason=reason, gates=gates, norms=(), activation=None, repairs=())
    if arm.twin is None:
        reason = _NOT_RUN
        return replace(found, reason=reason, gates=(), norms=(), activation=None, repairs=())
    gates = tuple(_moved(gate, other, arm) for gate, other in zip(found.gates, arm.twin.gates, strict=True))
    activation = found.activation
    if activation is not None:
        activation = replace(activation, at=_at(activation.at, arm.place))
    reason = f"adds the same branch as {arm.twin.span}, and gets the same gate"
    own = tuple(norm for norm in norms(arm) if norm.path in gone)
    skip = found.skip_gate and replace(found.skip_gate, at=_at(found.skip_gate.at, arm.place))
    if arm.twin.shifts:  # the layers before the arms have them already
        found = replace(found, shifts=())
    return replace(found, gates=gates, skip_gate=skip, norms=own, activation=activation, reason=reason, repairs=())


def _replaced(found: Site, arm: Arm) -> Site:
    """The finding of a method that moves norms: in the text of a twin, as the text says."""
    move = found.move if arm.twin is not None else None
    if move is None:
        reason = _NOT_RUN
    else:
        reason = "on a path that did not run, beside one that did: its norm moves, too"
        move = replace(move, at=_at(move.at, arm.place), to=tuple(_at(at, arm.place) for at in move.to))
    return replace(found, reason=reason, move=move, norms=(), activation=None)


def _is_for_training(arm: Arm) -> bool:
    """Whether the add stands under a test of `self.training`, and gates are all that it needs."""
    span = arm.found.span
    plain = all(gate.at is not None and not gate.existing and not gate.loops for gate in arm.found.gates)
    if span is None or not plain or arm.found.activation is not None:
        return False
    definition, me = sources.function(arm.place), code.self_name(arm.place)
    tests = [
        node.test
        for node in (ast.walk(definition) if definition is not None else ())
        if isinstance(node, (ast.If, ast.IfExp)) and sources.span_of(span.file, node).contains(span)
    ]
    return any(code.is_path(node, me, "training") for test in tests for node in ast.walk(test))


def norms(arm: Arm) -> tuple[Norm, ...]:
    """The norms of a twin, as modules of the instance."""
    return tuple(_placed(norm, arm) for norm in arm.found.norms) if arm.twin is not None else ()


def _moved(gate: Gate, other: Gate, arm: Arm) -> Gate:
    at, carries = (_at(one, arm.place) if one is not None else None for one in (gate.at, gate.carries))
    return replace(other, at=at, branch=gate.branch, carries=carries)


def _placed(norm: Norm, arm: Arm) -> Norm:
    path = f"{arm.path}.{norm.path}" if arm.path and norm.path else norm.path
    return replace(norm, path=path, at=_at(norm.at, arm.place) if norm.at is not None else None)


def _at(at: Operand, place: Place) -> Operand:
    same = at.place.file == place.file and at.place.line == place.line
    return replace(at, place=place if same else replace(at.place, module=place.module))


def reader(static: Read, executed: frozenset[Span]) -> Read:
    """Static findings by class, made only where the text holds adds that did not run."""

    @cache
    def read(file: str, cls: str) -> tuple[Site, ...]:
        return static(file, cls) if _unexplained(file, cls, executed) else ()

    return read


def _unexplained(file: str, cls: str, executed: frozenset[Span]) -> bool:
    """Whether the text of the class holds an add that did not run and is not plainly of numbers."""
    try:
        definition = sources.class_of(file, cls) if cls else None
    except ConversionError:
        return False
    if definition is None:
        return False
    return any(span not in executed and not code.adds_number(span) for span in adds(file, definition))
