"""The plan for a file: from its text alone, or from a run of a model that it defines, completed from its text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import sources
from .capture import capture, check_runs, static
from .detect import ZERO_INIT, detect, outside
from .errors import ConversionError
from .methods import METHODS, by_depth
from .plan import Norm, Options, Plan, Repair, Site, Span, tail
from .rewrite import source
from .rewrite.norms import NormStays


def written(text: str, file: str, options: Options) -> Plan:
    """What the text says by itself; nothing is executed.

    Raises:
        ConversionError: the text has a syntax error.
    """
    sources.register(file, text)
    traces = static.traces(file)
    plans = [detect(trace, options) for trace in traces]
    sites = _by_place((site for plan in plans for site in plan.sites), file)
    held = {call.cls for trace in traces for call in trace.calls if call.cls != trace.root.cls}
    whole = [plan for plan, trace in zip(plans, traces, strict=True) if trace.root.cls not in held]
    sites = _nested(sites, [site for plan in whole for site in plan.sites])
    notes = tuple(dict.fromkeys(note for plan in plans for note in plan.notes))
    done = {site.span: site for site in sites if site.verdict == "converted" and site.span is not None}
    kept = frozenset(call for plan in plans for call in _kept(plan, done))
    settled = [_norms_of_text(site, kept) for site in sites]
    kept |= _kept_in(settled)
    sites = tuple(_told_by_text(_norms_of_text(site, kept), options) for site in settled)
    loose = _by_place((site for trace in static.loose(file, traces) for site in outside(trace)), file)
    told = {site.span for site in sites}
    sites = tuple(sorted((*sites, *(site for site in loose if site.span not in told)), key=_by_span))
    return Plan(sites, options, "static", sum(plan.scalars for plan in plans), notes)


def recorded(text: str, file: str, model: nn.Module, example_inputs: Any, options: Options) -> Plan:
    """What a run of the model says; for classes of the file of which it has no instance, what their text says.

    Raises:
        ConversionError: the model cannot be captured, or instances that share a text were decided differently by a
            pattern.
    """
    check_runs(model, example_inputs)
    plan = detect(capture(model, example_inputs), options)
    own = os.path.realpath(file)
    here = [_in_file(site, file) for site in plan.sites if site.span and os.path.realpath(site.span.file) == own]
    agreed = list(_agreed(here))
    lost = frozenset(_norm_calls(here)) - frozenset(_norm_calls(agreed))
    kept = frozenset(plan.kept_calls) | {(span, tail(path)) for span, path in lost}
    here = [_norms_of_text(site, kept) for site in agreed]
    made = {base.__qualname__ for module in model.modules() for base in type(module).__mro__}
    ran = {site.span for site in here}
    found = written(text, file, options).sites
    by_span = {site.span: site for site in found if site.verdict == "converted"}
    here = [_completed(_told_by_text(site, options, recorded=True), by_span.get(site.span)) for site in here]
    here = [_norms_of_text(site, kept) for site in here]
    rest = [site for site in found if site.span not in ran]
    others = [_unreached(site) if site.place and site.place.cls in made else _by_text(site) for site in rest]
    sites = sorted([*here, *(site for site in others if site is not None)], key=_by_span)
    return dataclasses.replace(plan, sites=tuple(sites))


def _told_by_text(site: Site, options: Options, *, recorded: bool = False) -> Site:
    """The site, refused where its gates depend on more than the text of a class."""
    if site.verdict != "converted":
        return site
    if recorded:
        return site
    if by_depth(options):
        reason = f"method {options.method!r} depends on the number of blocks: pass --model and --inputs"
        reason += "" if METHODS[options.method].by_site else ", or alpha_init"
    elif any(gate.shape == (0,) and (gate.loops or not gate.size) for gate in site.gates):
        reason = "the text does not tell how many channels the branch has: pass --model and --inputs"
    else:
        return site
    return dataclasses.replace(site, **{**_REFUSED, "code": "RZ915"}, reason=reason)


def _kept(plan: Plan, done: Mapping[Span, Site]) -> Iterator[tuple[Span, str]]:
    """The norm calls that a class's trace keeps, but for those that were seen better from nearer by.

    Entered from afar, a function ends in opaque modules sooner, so that a block may not be recognised; and what class
    a norm has may have come through a function that text does not tell the result of.
    """
    dim = dict.fromkeys(site.place for site in plan.of("refused") if site.span in done and site.place is not None)
    bodies = [(place.file, sources.function(place)) for place in dim]
    ranges = [(file, node.lineno, node.end_lineno or 0) for file, node in bodies if node is not None]
    kinds = _kinds(done.values())
    doubtful = {span for span, kind in _kinds(plan.converted).items() if kinds.get(span, kind) != kind}
    for span, name in plan.kept_calls:
        if span in doubtful or any(file == span.file and first <= span.line <= last for file, first, last in ranges):
            continue
        yield span, name


def _norm_calls(sites: Iterable[Site]) -> Iterator[tuple[Span, str]]:
    """The calls of norms that are to go, with the norms' paths."""
    for site in sites:
        yield from ((norm.at.span, norm.path) for norm in site.norms if norm.at is not None and norm.action != "keep")


def _kept_in(sites: Iterable[Site]) -> frozenset[tuple[Span, str]]:
    """The calls of norms that some block keeps: other blocks with the same call keep them, too."""
    norms = [norm for site in sites if site.verdict == "converted" for norm in site.norms if norm.action == "keep"]
    return frozenset((norm.at.span, tail(norm.path)) for norm in norms if norm.at is not None)


def _kinds(sites: Iterable[Site]) -> dict[Span, str]:
    return {norm.at.span: norm.kind for site in sites for norm in site.norms if norm.at is not None}


def _norms_of_text(site: Site, kept: frozenset[tuple[Span, str]]) -> Site:
    """The site less the norm drops that a shared text cannot carry: the class serves a use that keeps its norm, too."""

    def settled(norm: Norm) -> Norm:
        if norm.action == "keep" or norm.at is None:
            return norm
        if (norm.at.span, tail(norm.path)) in kept:
            return dataclasses.replace(norm, action="keep", reason="the same call serves a use that keeps the norm")
        inside = norm.path.startswith(f"{site.path}." if site.path else "")
        several = inside and "*" in norm.path.removeprefix(site.path) and not any(gate.loops for gate in site.gates)
        if norm.action == "bypass" and several:
            return dataclasses.replace(norm, action="keep", reason="its call serves instances that are not gated here")
        below = norm.path.removeprefix(site.path).lstrip(".")
        if norm.action == "slot" and (not inside or "*" in below.removesuffix(".*")):
            return dataclasses.replace(norm, action="keep", reason="it is held in a list that is not written out")
        return norm

    return dataclasses.replace(site, norms=tuple(settled(norm) for norm in site.norms))


def _by_span(site: Site) -> tuple[Span, str]:
    assert site.span is not None
    return site.span, site.path


def _in_file(site: Site, file: str) -> Site:
    """Checks that a finding can be carried out under the name that the file was given."""
    if site.span is not None and site.span.file != file:
        raise ConversionError(f"{file}: the model's classes were imported from {site.span.file}: give that name")
    return site


def _completed(site: Site, same: Site | None) -> Site:
    """The finding, with what the text does for models made with other options: LayerScale, zero initialization."""
    prefix = f"{site.path}." if site.path else ""
    if same is not None and site.calls == 0 and site.gates:
        return _of_arm(site, same, prefix)
    if same is None or same.path or site.verdict != "converted":
        return site
    known = {repair.parameter for repair in site.repairs}
    gone = {f"{norm.path}.weight" for norm in site.norms if norm.action != "keep"}
    more = [_below(repair, prefix) for repair in same.repairs]
    told = {repair.parameter: repair for repair in more}
    conditional = [gate.at for gate in same.gates if gate.conditional and gate.at is not None]
    gates = tuple(
        dataclasses.replace(gate, conditional=gate.conditional or any(at.same_text(gate.at) for at in conditional))
        if gate.at is not None
        else gate
        for gate in site.gates
    )
    own = (_told(one, told.get(one.parameter)) for one in site.repairs)
    repairs = (*own, *(repair for repair in more if repair.parameter not in known | gone))
    norms = tuple(_held_in_text(norm, prefix, same.norms) for norm in site.norms)
    whole = {norm.path for norm in norms if norm.action == "slot"}
    other_arms = (dataclasses.replace(norm, path=prefix + norm.path) for norm in same.norms if norm.action == "slot")
    calls = {norm.at.span for norm in norms if norm.at is not None}
    norms += tuple(norm for norm in other_arms if norm.path in whole and norm.at and norm.at.span not in calls)
    return dataclasses.replace(site, gates=gates, repairs=repairs, norms=norms)


def _of_arm(site: Site, same: Site, prefix: str) -> Site:
    """The other arm of a condition: what it needs there, its text tells better than the one that ran."""
    norms = tuple(
        dataclasses.replace(norm, path=norm.path and prefix + norm.path, bias=norm.bias and prefix + norm.bias)
        for norm in same.norms
    )
    repairs = tuple(_below(repair, prefix) for repair in same.repairs)
    return dataclasses.replace(
        same, verdict=site.verdict, code=site.code, reason=site.reason, path=site.path, cls=site.cls, calls=0,
        norms=norms, repairs=repairs,
    )  # fmt: skip


def _told(repair: Repair, by_text: Repair | None) -> Repair:
    """A finding of a run, with where and how the text does it."""
    if by_text is None:
        return repair
    return dataclasses.replace(repair, how=by_text.how, owner=repair.owner or by_text.owner)


def _below(repair: Repair, prefix: str) -> Repair:
    """A finding of a class by itself as one of an instance: `prefix` is its path with a dot."""
    owner = None if repair.owner is None else (prefix + repair.owner[0], repair.owner[1])
    return dataclasses.replace(repair, parameter=prefix + repair.parameter, owner=owner)


def _held_in_text(norm: Norm, prefix: str, by_text: Iterable[Norm]) -> Norm:
    """A norm that is one element of a list, kept where the text keeps all that one expression makes."""
    for other in by_text:
        same = fnmatchcase(norm.path, prefix + other.path)
        if norm.action == "slot" and "*" in other.path and other.action == "keep" and same:
            return dataclasses.replace(norm, action="keep", reason=other.reason)
    return norm


def _unreached(site: Site) -> Site | None:
    """A block in the text of a class that has instances, but that the run did not come to."""
    if site.verdict != "converted":
        return None
    reason = (
        "a residual add that the run did not come to: pass inputs that run it, unless its condition is a setting of "
        "the module"
    )
    bare = dataclasses.replace(site, gates=(), norms=(), activation=None, repairs=())
    return dataclasses.replace(bare, verdict="not-executed", code="RZ140", reason=reason, calls=0)


def _by_text(site: Site) -> Site:
    if not site.place or not site.place.cls:
        return site
    return dataclasses.replace(site, reason=f"{site.reason} (by its text: the model has no {site.cls})")


def _agreed(sites: list[Site]) -> Iterator[Site]:
    """One text serves all instances: a block that is refused for one of them is refused for all.

    Raises:
        ConversionError: the one was excluded by the user's patterns.
    """
    refused: dict[Span, Site] = {}
    done: dict[Span, Site] = {}
    for site in sites:
        if site.span is not None and site.verdict in ("refused", "long-skip", "interior"):
            refused.setdefault(site.span, site)
        elif site.span is not None and site.verdict == "converted":
            done.setdefault(site.span, site)
    for site in sites:
        other = refused.get(site.span) if site.span is not None and site.verdict == "converted" else None
        if other is None:
            yield site
            continue
        if other.code == "RZ900":
            raise ConversionError(
                f"{site.span}: {other.path or 'the root'} is {other.reason}, {site.path or 'the root'} is not, "
                "but they share this text"
            )
        reason = f"{other.path or 'the root'} shares this text with {site.path or 'the root'}, but cannot be gated: "
        bare = dataclasses.replace(site, gates=(), norms=(), activation=None, repairs=(), form="")
        yield dataclasses.replace(bare, verdict="refused", code="RZ917", reason=reason + other.reason)


def _by_place(sites: Iterable[Site], file: str) -> tuple[Site, ...]:
    """One site per add of the file: seen from its own class first, else from a class that holds it.

    But for an add that lies inside a branch wherever its class is held.
    """
    seen: dict[Span, list[Site]] = {}
    for site in sites:
        if site.span is not None and site.span.file == file:
            seen.setdefault(site.span, []).append(site)
    return tuple(min(_inside(views) or views, key=_distance) for _, views in sorted(seen.items()))


def _inside(views: list[Site]) -> list[Site]:
    """Of the views of an add, those that see it inside a branch; none if a class that holds its own sees a block."""
    held = [site for site in views if site.path]
    inside = [site for site in held if site.verdict == "interior"]
    return inside if not any(site.verdict == "converted" for site in held) else []


def _nested(sites: Iterable[Site], seen: Iterable[Site]) -> tuple[Site, ...]:
    """The findings, less the blocks of classes that serve in other blocks' branches only.

    Args:
        sites: per add, from as near by as possible.
        seen: from the classes that no other class of the file holds.
    """
    seen = tuple(seen)
    done = {site.span for site in seen if site.verdict == "converted"}
    inside = {site.span: site for site in seen if site.verdict == "interior" and site.span not in done}
    return tuple(inside.get(site.span, site) for site in sites)


def _distance(site: Site) -> tuple[bool, bool, bool]:
    """How far the context of a static finding is from its class; a block found from afar beats a refusal at home."""
    own = site.place is not None and site.place.cls == site.cls
    return site.verdict == "refused", site.path != "", not own


def carried_out(text: str, plan: Plan, file: str) -> tuple[Plan, source.Rewritten]:
    """The plan as carried out, and the text: classes that cannot be rewritten keep their norms or are refused.

    Raises:
        ConversionError: the classes can be rewritten one by one, but not together.
    """
    try:
        made = source.rewrite(text, plan, file)
        return _as_made(plan, made), made
    except NormStays as error:
        kept = _keeping(plan, error)
        if kept == plan:
            raise
        return carried_out(text, kept, file)
    except ConversionError:
        left = {cls: why for cls in _edited(plan) if (why := _error(text, _of(plan, cls), file))}
        if not left:
            raise
    for cls, why in left.items():
        kept = dataclasses.replace(plan, sites=tuple(_with_norms(site, cls, why) for site in plan.sites))
        refused = dataclasses.replace(plan, sites=tuple(_without_gates(site, cls, why) for site in plan.sites))
        plan = refused if _error(text, _of(kept, cls), file) else kept
    made = source.rewrite(text, plan, file)
    return _as_made(plan, made), made


def _as_made(plan: Plan, made: source.Rewritten) -> Plan:
    """The plan less the repairs for which the text has no statement, with what only a run would tell."""

    def named(site: Site, before: Site) -> Site:
        words = [word for word in site.form.split(", ") if site.repairs or word != ZERO_INIT]
        return site if site.repairs == before.repairs else dataclasses.replace(site, form=", ".join(words))

    sites = tuple(map(named, source.without(plan, made.idle).sites, plan.sites))
    notes = made.doubts if plan.route == "static" else ()
    return dataclasses.replace(plan, sites=sites, notes=(*plan.notes, *notes))


def _keeping(plan: Plan, error: NormStays) -> Plan:
    """The plan with the norms of some calls kept."""

    def settled(norm: Norm) -> Norm:
        stays = norm.action != "keep" and norm.at is not None and norm.at.span in error.calls
        return dataclasses.replace(norm, action="keep", reason=str(error)) if stays else norm

    sites = (dataclasses.replace(site, norms=tuple(settled(norm) for norm in site.norms)) for site in plan.sites)
    return dataclasses.replace(plan, sites=tuple(sites))


def recheck(before: str, after: str, file: str, options: Options, *, again: bool) -> None:
    """Check a rewritten text before anybody uses it.

    Args:
        again: whether a second run must change nothing (the text alone had decided).

    Raises:
        ConversionError: it does not compile, or a second run would change it.
    """
    try:
        compile(after, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConversionError(f"{file}: the rewritten text does not compile: line {line}: {error}") from error
    if not again:
        return
    try:
        _, second = carried_out(after, written(after, file, options), file)
    finally:
        sources.register(file, before)
    if second.text != after:
        rows = zip(after.split("\n"), second.text.split("\n"), strict=False)
        line = next((number for number, (one, other) in enumerate(rows, 1) if one != other), after.count("\n") + 1)
        raise ConversionError(f"{file}: a second run would change the rewritten text again, at its line {line}")


_REFUSED: dict[str, Any] = {
    "verdict": "refused", "code": "RZ912", "gates": (), "norms": (), "activation": None, "repairs": (), "form": "",
    "skip_gate": None, "shifts": (), "move": None,
}  # fmt: skip


def _edited(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_class_of(site) for site in plan.edited))


def _of(plan: Plan, cls: str) -> Plan:
    return dataclasses.replace(plan, sites=tuple(site for site in plan.sites if _class_of(site) == cls))


def _error(text: str, plan: Plan, file: str) -> str:
    """Why a plan cannot be carried out; "" if it can."""
    try:
        source.rewrite(text, plan, file)
    except ConversionError as error:
        return str(error)
    return ""


def _with_norms(site: Site, cls: str, reason: str) -> Site:
    """The site, if it is one of the class, with the norms that were to go."""
    if _class_of(site) != cls:
        return site
    norms = tuple(
        norm if norm.action == "keep" else dataclasses.replace(norm, action="keep", reason=reason, bias="")
        for norm in site.norms
    )
    return dataclasses.replace(site, norms=norms)


def _without_gates(site: Site, cls: str, reason: str) -> Site:
    if _class_of(site) != cls or not site.edited:
        return site
    return dataclasses.replace(site, **_REFUSED, reason=reason)


def _class_of(site: Site) -> str:
    return site.place.cls if site.place is not None else ""
