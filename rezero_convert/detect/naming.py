"""The names of alphas, as the text of the classes gives them on every route, and the words for a block's form."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from .. import sources
from ..capture.static import adds, exclusive
from ..errors import ConversionError
from ..methods import METHODS
from ..plan import Gate, Options, Place, Site, Span
from . import arms, code, names, norms, unrolled
from .drafts import Draft, request, unwanted
from .flow import Flow


def named(flow: Flow, drafts: list[Draft], others: list[arms.Arm], options: Options, read: arms.Read) -> list[Site]:
    """Give the alphas their names, the sites their form; arms that did not run count as adds of their class."""
    requests = [request for draft in drafts for request in draft.requests if request is not None]
    requests += [asked for arm in others for gate in arm.found.gates if (asked := _of_arm(flow, arm, gate))]
    layers = METHODS[options.method].map == "carry"  # a gate is a module then, and no lists are made of those
    passes = {} if layers else unrolled.passes(flow, drafts, partial(_may_walk, flow, read))
    lines = {asked: draft.site.written for draft in drafts for asked in draft.requests if asked is not None}
    by_text = {asked: _as_in_text(flow, passes.get(asked, (asked,))[0], lines.get(asked), read) for asked in requests}
    chosen = names.alphas(
        by_text.values(),
        shared=options.share == "layer",
        exclusive=lambda one, other: exclusive(one.span, other.span),
        taken=_taken(flow, drafts),
        several=cache(partial(_holds_several, flow, drafts, read)),
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


def _holds_several(flow: Flow, drafts: list[Draft], read: arms.Read, asked: names.Request) -> bool:
    """Whether the text of a class holds several branches that need a gate, though its instances ask for one.

    Instances may have run different arms: where the tracer did not note the lines, that shows in the kinds of their
    skips. Others may not have run at all, or have a gate already.
    """
    text, place = _text_of(flow, asked.cls), asked.at.place
    if text is None:
        return flow.trace.model is not None and _gated_in_text(read, place.file, place.cls) > 1
    file, definition, qualname = text
    own = [draft.site for draft in drafts if draft.site.cls == asked.cls and draft.site.gates]
    if all(site.written is not None for site in own):
        lines = {site.span.line for site in read(file, qualname) if site.span and _new(site)}
        lines |= {site.written.line for site in own if site.written is not None and _new(site)}
        return len(lines) > 1
    kinds = {site.skip_kind for site in own}
    if len(kinds) > 1 and sum(not code.adds_number(span) for span in adds(file, definition)) > 1:
        return True
    return _gated_in_text(read, file, qualname) > 1


def _new(site: Site) -> bool:
    return any(not gate.existing for gate in site.gates)


def _gated_in_text(read: arms.Read, file: str, cls: str) -> int:
    """How many branches of a class get a gate by its text."""
    try:
        found = read(file, cls) if cls else ()
    except ConversionError:  # a file without a text
        return 0
    return len({gate.at for site in found for gate in site.gates if not gate.existing})


def _may_walk(flow: Flow, read: arms.Read, name: str, child: str) -> bool:
    """Whether the text of a class gates what it adds in a loop over a child; true where its text is not known."""
    text = _text_of(flow, name)
    if text is None:
        return True
    file, _, qualname = text
    return any(gate.loops and gate.child == child for site in read(file, qualname) for gate in site.gates)


def _text_of(flow: Flow, name: str) -> tuple[str, ast.ClassDef, str] | None:
    """File, definition and qualified name of a class that generated code came from."""
    cls: Any = flow.trace.classes.get(name)
    try:
        file = inspect.getsourcefile(cls) if cls is not None else None
        definition = sources.class_of(file, cls.__qualname__) if file is not None else None
    except (TypeError, ConversionError):  # a class without a file, or a file without a text
        return None
    return None if file is None or definition is None else (file, definition, cls.__qualname__)


def _as_in_text(flow: Flow, asked: names.Request, line: Span | None, read: arms.Read) -> names.Request:
    """The request as the text by itself makes it: a run has seen one arm of `a(x) if c else b(x)`, a graph none."""
    place = asked.at.place
    if asked.at.span in flow.trace.generated:
        return _on_line(flow, asked, line, read) if line is not None else asked
    if flow.trace.model is None or not place.cls:
        return asked
    try:
        found = read(place.file, place.cls)
    except ConversionError:  # a file without a text
        return asked
    children = (gate.child for site in found for gate in site.gates if gate.at and gate.at.same_text(asked.at))
    return replace(asked, child=next(children, "") or asked.child)


def _on_line(flow: Flow, asked: names.Request, line: Span, read: arms.Read) -> names.Request:
    """The request for the only branch that the text of the class adds on a line, or at least for its only add there."""
    text = _text_of(flow, asked.cls)
    if text is None:
        return asked
    file, definition, qualname = text
    found = read(file, qualname)
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
