"""What to draw of traces and a report: the streams that `lines` finds, told in the words of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx

from ..capture.facts import Facts
from ..capture.trace import Trace
from ..detect.blocks import has_weight
from ..detect.drafts import site_of
from ..detect.flow import Flow, flow
from ..detect.norms import frame_of, path_of
from ..listing import compact, number, where_of
from ..plan import Plan, Site, Span
from ..report import Report, grouped, totals
from .fold import folded
from .lines import Found, Knot, Line, found, lines
from .records import Box, Branch, Note, Picture, Step, Stream

_SHOWN = frozenset({"linear", "norm", "activation", "attention", "recurrent", "upsample", "pool", "embedding"})
_SHOWN_NAMES = frozenset("cat concat matmul bmm baddbmm einsum".split())
_HIDDEN_MODULES = frozenset({"dropout", "layout"})


@dataclass(frozen=True, slots=True)
class _Book:
    """A plan and today's alphas, to be looked things up in."""

    report: Report
    static: bool
    at: Mapping[tuple[str | None, Span | None], tuple[int, ...]]
    """Positions of sites in the plan, by the instance and the text of the add; on the static route by the text."""
    gone: frozenset[tuple[str | None, Span | None]]
    """Norms that are dropped: by path and no text, or by their call."""
    moved: frozenset[tuple[str | None, Span | None]]
    """Activations that are moved into a branch, by their owner and call."""

    @property
    def plan(self) -> Plan:
        return self.report.plan

    def key(self, path: str | None, span: Span | None) -> tuple[str | None, Span | None]:
        return (None if self.static else path, span)


def picture(traces: Sequence[Trace], report: Report) -> Picture:
    """The drawing of a model's residual streams.

    Args:
        traces: the capture that the report's plan was made from; several, one per class, on the static route.
        report: tells what becomes of each add.

    Returns:
        A record in which every add of the plan occurs: in a box on a stream, in a note there, or beside the streams.
    """
    book = _book(report, static=all(trace.model is None for trace in traces))
    streams: list[Stream] = []
    drawn: set[int] = set()
    for adds in _needed(traces, book):
        for stream, sites in _streams(adds, book, len(streams)):
            streams.append(stream)
            drawn |= sites
    return Picture(report.title or "model", totals(report), tuple(streams), tuple(_beside(report.plan, drawn)))


def _book(report: Report, static: bool) -> _Book:
    at: dict[tuple[str | None, Span | None], tuple[int, ...]] = {}
    gone: set[tuple[str | None, Span | None]] = set()
    moved: set[tuple[str | None, Span | None]] = set()
    for index, site in enumerate(report.plan.sites):
        path = None if static else site.path
        at[path, site.span] = (*at.get((path, site.span), ()), index)
        for norm in site.norms:
            if norm.action != "keep":
                by_text = static or not norm.path
                gone.add((None, norm.at.span) if by_text and norm.at else (norm.path, None))
        if site.activation is not None and site.activation.action == "move":
            moved.add((path, site.activation.at.span))
    return _Book(report, static, at, frozenset(gone), frozenset(moved))


def _needed(traces: Sequence[Trace], book: _Book) -> Iterator[Found]:
    """The traces that show adds of the plan which those before do not, the richest first."""
    options = book.plan.options
    seen = [found(flow(trace, options.norm_types)) for trace in traces]
    if len(seen) == 1:
        yield seen[0]
        return
    shown = [{index for node in _adds(adds) for index in _candidates(adds.flow, node, book)} for adds in seen]
    while any(shown):
        best = max(range(len(seen)), key=lambda index: len(shown[index]))
        yield seen[best]
        shown = [sites - shown[best] for sites in shown]


def _adds(adds: Found) -> Iterable[int]:
    return (*adds.blocks, *adds.refusals, *adds.nested)


def _candidates(flow: Flow, node: int, book: _Book) -> tuple[int, ...]:
    """The sites at the text of an add: of an add in a helper function, at the call."""
    frames = flow.origin(node).frames
    path = next((frame.owner for frame in reversed(frames) if frame.owner is not None), flow.origin(node).call.path)
    spans = dict.fromkeys((frames[0].span, frames[-1].span)) if frames else {None: None}
    return tuple(dict.fromkeys(index for span in spans for index in book.at.get(book.key(path, span), ())))


def _site(adds: Found, node: int, book: _Book) -> int | None:
    """The site of an add, by position in the plan; None if the plan is of one file, and the add of another."""
    found = _candidates(adds.flow, node, book)
    sites = book.plan.sites
    if node in adds.refusals:
        matching = [index for index in found if sites[index].reason == adds.refusals[node].reason]
    elif node in adds.nested:
        matching = [index for index in found if sites[index].verdict == adds.nested[node].verdict]
    else:
        matching = [index for index in found if sites[index].verdict in ("converted", "gated")]
    return next(iter((*matching, *found)), None)


# Streams


def _streams(adds: Found, book: _Book, first: int) -> Iterator[tuple[Stream, set[int]]]:
    """The streams of one trace, each with the sites that it shows; numbered from `first`."""
    flow = adds.flow
    all_of = [line for line in lines(adds) if line.knots or line.after]
    home = {node: first + index for index, line in enumerate(all_of) for node in _nodes(line)}
    names = _names([_prefix(flow, line) for line in all_of], flow.trace.root.cls if book.static else "")
    for index, line in enumerate(all_of):
        boxes = _boxes(adds, line, book, home, first + index)
        sites = {site for box in boxes for site in box.sites}
        sites |= {site for box in boxes for note in box.notes for site in note.sites}
        begin = f"from {names[home[line.source] - first]}" if line.source is not None else _inputs(flow, line)
        ends = any(user.op == "output" for node in _tail(line) for user in flow.nodes[node].users)
        yield Stream(names[index], begin, folded(boxes), ends), sites


def _nodes(line: Line) -> Iterator[int]:
    for knot in line.knots:
        yield from (knot.node, *knot.before)
    yield from line.after


def _tail(line: Line) -> tuple[int, ...]:
    return (*line.after, *(knot.node for knot in line.knots[-1:]))


def _prefix(flow: Flow, line: Line) -> str:
    """What the paths of a stream's blocks begin with."""
    paths = [site_of(flow, knot.block.sum, "converted", "").path.split(".") for knot in line.knots if knot.block]
    return ".".join(_common(paths)) if paths else ""


def _common(paths: list[list[str]]) -> list[str]:
    """The parts that all paths begin with."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in same]


def _names(prefixes: list[str], root: str) -> list[str]:
    """Distinct names of streams."""
    given = [" ".join(part for part in (root, prefix) if part) or "residual stream" for prefix in prefixes]
    return [
        f"{name} ({given[: index + 1].count(name)})" if given.count(name) > 1 else name
        for index, name in enumerate(given)
    ]


def _inputs(flow: Flow, line: Line) -> str:
    """The model's inputs that a stream starts from."""
    start = line.knots[0].block.skip if line.knots and line.knots[0].block else next(_nodes(line))
    seen = {flow.nodes[start]}
    stack = [flow.nodes[start]]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    given = sorted((node for node in seen if node.op == "placeholder"), key=lambda node: flow.index[node])
    return ", ".join(_with_shape(node.name, flow.shape(flow.index[node])) for node in given)


def _with_shape(name: str, shape: tuple[int, ...] | None) -> str:
    return name if shape is None else f"{name} {'x'.join(map(str, shape)) or 'scalar'}"


def _boxes(adds: Found, line: Line, book: _Book, home: Mapping[int, int], own: int) -> list[Box]:
    """The boxes of a stream, from top to bottom."""
    flow = adds.flow
    boxes: list[Box] = []
    place: dict[int, int] = {}

    def plain(nodes: tuple[int, ...]) -> None:
        """Norms of the sum before, then the rest."""
        dropped = list(takewhile(lambda node: _is_dropped(flow, node, path_of(flow, node), book), nodes))
        for part in (dropped, nodes[len(dropped) :]):
            steps = _steps(flow, part, "", book)
            if steps:
                boxes.append(Box("plain", (len(boxes),), shortcut=steps, shape=flow.shape(part[-1])))
            place.update(dict.fromkeys(part, len(boxes) - 1))

    for knot in line.knots:
        plain(knot.before)
        made = _block(adds, knot, book, home, own) if knot.block is not None else _merge(adds, knot, book, home, own)
        above = place.get(knot.start) if knot.start is not None else None
        made = replace(made, at=(len(boxes),), start=None if above is None else len(boxes) - max(above, 0))
        place[knot.node] = len(boxes)
        boxes.append(made)
        lost = tuple(step for index in made.sites for step in _lost(book.plan.sites[index], "post"))
        if lost:
            boxes.append(Box("plain", (len(boxes),), shortcut=lost, shape=made.shape))
    plain(line.after)
    return boxes


def _block(adds: Found, knot: Knot, book: _Book, home: Mapping[int, int], own: int) -> Box:
    block, flow = knot.block, adds.flow
    assert block is not None
    index = _site(adds, knot.node, book)
    site = book.plan.sites[index] if index is not None else site_of(flow, block.sum, "refused", "")
    path = site_of(flow, block.sum, "converted", "").path  # of the trace: a plan of source text knows the class only
    branches = []
    for position, nodes in enumerate(knot.branches):
        gate, values = _gate(site, position, book)
        steps = (*_steps(flow, nodes, path, book), *_moved(site))
        steps = (*_lost(site, "pre"), *steps, *_lost(site, "inside", "end"))
        reads = sorted({home[node] for node in knot.reads[position] if home.get(node, own) != own})
        branches.append(Branch(steps, gate, values, tuple(reads)))
    inner = [node for nodes in knot.branches for seat in nodes for node in adds.inside.get(seat, ())]
    return Box(
        "block",
        (),
        site.verdict if index is not None else "",
        (path,),
        site.cls,
        tuple(branches),
        _shortcut(flow, knot, path, book),
        () if index is None else (index,),
        tuple(_notes(adds, dict.fromkeys(inner), book)),
        _text(site) if index is not None else "not in this file",
        _full(site),
        shape=flow.shape(knot.node),
    )


def _shortcut(flow: Flow, knot: Knot, owner: str, book: _Book) -> tuple[Step, ...]:
    """The projection or slice on the skip."""
    block = knot.block
    assert block is not None
    if block.kind == "identity":
        return ()
    path = flow.region(block.skip, block.shortcut.value)[1:]
    return _steps(flow, path, owner, book) or (Step(block.kind, f"a {block.kind} of the skip"),)


def _merge(adds: Found, knot: Knot, book: _Book, home: Mapping[int, int], own: int) -> Box:
    """A sum on the stream that is no block, or a concatenation."""
    flow = adds.flow
    index = _site(adds, knot.node, book) if knot.node in adds.refusals or knot.node in adds.nested else None
    other = home.get(knot.start, own) if knot.start is not None else own
    reads = (Branch((), reads=(other,)),) if other != own else ()
    shape = flow.shape(knot.node)
    if index is None:
        path = flow.origin(knot.node).call.path
        return Box("merge", (), paths=(path,), branches=reads, text=flow.name(knot.node), shape=shape)
    site = book.plan.sites[index]
    gate, values = _gate(site, 0, book)
    reads = (Branch((), gate, values, reads[0].reads if reads else ()),) if gate or reads else ()
    return Box(
        "merge",
        (),
        site.verdict,
        (site.path,),
        site.cls,
        reads,
        (),
        (index,),
        (),
        _text(site),
        _full(site),
        shape=shape,
    )


def _notes(adds: Found, nodes: Iterable[int], book: _Book) -> Iterator[Note]:
    """The adds inside branches, equal ones as one."""
    made: dict[str, Note] = {}
    for node in nodes:
        index = _site(adds, node, book)
        if index is not None:
            site = book.plan.sites[index]
            note = made.setdefault(_text(site), Note(site.verdict, _text(site), _full(site)))
            made[note.text] = replace(note, sites=tuple(dict.fromkeys((*note.sites, index))))
    yield from made.values()


def _beside(plan: Plan, drawn: set[int]) -> Iterator[Note]:
    """The sites that no stream shows, equal ones as one."""
    rest = {index: site for index, site in enumerate(plan.sites) if index not in drawn}
    for group in grouped(rest.values()):
        site, paths = group.first, frozenset(group.paths)
        members = tuple(index for index, one in rest.items() if one.path in paths and _same(one, site))
        times = f" (x {len(group.paths)})" if len(group.paths) > 1 else ""
        text = _text(site) or f"{site.code} {site.reason}"
        yield Note(site.verdict, f"{compact(group.paths)}{times}: {text}", _full(site), members)


def _same(site: Site, other: Site) -> bool:
    return (site.span, site.verdict, site.code) == (other.span, other.verdict, other.code)


# What is told of a box


def _gate(site: Site, position: int, book: _Book) -> tuple[str, tuple[float, ...]]:
    """Name and values of a branch's gate."""
    if position >= len(site.gates):
        return "", ()
    gate = site.gates[position]
    if gate.init is not None and not book.report.converted:
        return gate.alpha, (gate.init,)
    prefix = f"{site.path}." if site.path else ""
    values = [value for name in gate.parameters() for value in book.report.alphas.get(prefix + name, ())]
    return gate.alpha, tuple(value for value in values if math.isfinite(value))


def _text(site: Site) -> str:
    """Code and reason, where the gate does not say it all."""
    if site.verdict == "converted" or (site.verdict == "gated" and site.gates):
        return ""
    return f"{site.code} {site.reason}".strip()


def _full(site: Site) -> str:
    first = f"{where_of(site.shown)} {site.code} {site.verdict} {site.form}".strip()
    times = f"runs {number(site.calls, 'time')}" if site.calls > 1 else ""
    return "\n".join(line for line in (first, site.text.strip(), site.reason, times) if line)


def _moved(site: Site) -> tuple[Step, ...]:
    if site.activation is None or site.activation.action != "move":
        return ()
    return (Step(site.activation.type, f"{site.activation.type} of the sum, moved into the branch"),)


def _lost(site: Site, *positions: str) -> tuple[Step, ...]:
    """The norms that a conversion has already taken from some positions."""
    if site.verdict != "gated":
        return ()
    return tuple(
        Step(_relative(norm.path, site.path) or norm.type, f"{norm.path} ({norm.type})", dropped=True)
        for norm in site.norms
        if norm.action != "keep" and norm.position in positions
    )


def _steps(flow: Flow, nodes: Iterable[int], base: str, book: _Book) -> tuple[Step, ...]:
    """The operations worth naming, relative to a module; a parent that is the same as before is left out."""
    steps: list[Step] = []
    before = ""
    for node in nodes:
        named = _named(flow, node)
        if named is None or _is_moved(flow, node, book):
            continue
        path, kind = named
        label = _relative(path, base)
        parent, _, name = label.rpartition(".")
        short = f".{name}" if parent and parent == before else label
        before = parent if path else before
        short = f"{short}:{kind}" if name.isdigit() else short
        if steps and not path and steps[-1].label == kind:
            continue  # the same function again: of keys, then of values
        full = f"{path} ({kind})" if path else kind
        steps.append(Step(short or kind, full, _is_dropped(flow, node, path, book)))
    return tuple(steps)


def _named(flow: Flow, node: int) -> tuple[str, str] | None:
    """Path ("" for a function) and type of an operation that is worth naming."""
    if node in flow.steps:
        return flow.steps[node].path, flow.facts[node].type
    target, facts = flow.nodes[node], flow.facts[node]
    if target.op == "call_module":
        return None if facts.kind in _HIDDEN_MODULES else (str(target.target), facts.type)
    if target.op == "placeholder" or not _is_worth_naming(flow, node, facts):
        return None
    weight = next((path for source in _sources(flow, target) if (path := flow.parameter(source))), "")
    return weight.rpartition(".")[0], flow.name(node)


def _sources(flow: Flow, node: fx.Node) -> Iterator[int]:
    """The operands of an operation, with what they are directly made of: a weight may be transposed."""
    for source in node.all_input_nodes:
        index = flow.index[source]
        yield index
        if flow.constant[index]:
            yield from flow.inputs[index]


def _is_worth_naming(flow: Flow, node: int, facts: Facts) -> bool:
    return facts.kind in _SHOWN or has_weight(flow, node) or flow.name(node) in _SHOWN_NAMES


def _is_moved(flow: Flow, node: int, book: _Book) -> bool:
    frames = flow.steps[node].frames if node in flow.steps else flow.origin(node).frames
    return bool(frames) and book.key(frames[-1].owner, frames[0].span) in book.moved


def _is_dropped(flow: Flow, node: int, path: str, book: _Book) -> bool:
    if flow.facts[node].kind != "norm":
        return False
    frame = frame_of(flow, node)
    return (path, None) in book.gone or (frame is not None and (None, frame.span) in book.gone)


def _relative(path: str, base: str) -> str:
    """A path as seen from a module; from outside of it, as seen from where the two part."""
    here, there = path.split("."), base.split(".") if base else []
    return ".".join(here[len(_common([here[:-1], there])) :])
