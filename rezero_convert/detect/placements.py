"""Pre-norm, post-norm and GPT2-norm: whether the norm of a block can be moved there, and what it then goes around.

Nothing is invented: a block has one norm, which runs in the method that adds, and whose call can be written at the
other place. Several norms, or one for several branches, have no place in the forms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import replace

from .. import sources
from ..capture.trace import Call, Frame
from ..listing import number
from ..plan import WHOLE, Move, Operand, Position, Site
from . import code, helpers, norms
from .blocks import Branch, owner_call
from .drafts import Draft, in_helper, is_receiver, placed, works_in_place
from .flow import Flow

_NAMES = {"pre": "before the branch", "end": "behind the branch", "post": "behind the sum", "inside": "in the branch"}


class _Fixed(Exception):
    """The norm cannot be moved; the message is a clause that says why."""


def moved(flow: Flow, draft: Draft, target: Position) -> Draft:
    """The draft with the move that its norm makes; or refused, or left alone because it makes none.

    Args:
        flow: of a trace.
        draft: of a block, with its norms.
        target: where the norm is to stand.
    """
    site = draft.site
    if site.verdict != "converted":
        return draft
    if [member.position for member in draft.members] == [target]:
        reason = f"its norm stands {_NAMES[target]} already"
        return Draft(draft.block, replace(site, verdict="gated", code="RZ122", reason=reason))
    try:
        move = _move(flow, draft, target)
    except _Fixed as error:
        return Draft(draft.block, replace(site, verdict="refused", code="RZ919", reason=str(error)))
    (member,) = draft.members
    kept = replace(member.norm, reason=f"moved {_NAMES[target]}")
    return replace(draft, site=replace(site, move=move), members=(replace(member, norm=kept),))


def notes(flow: Flow, drafts: Iterable[Draft], target: Position) -> Iterator[str]:
    """What a reader should know of the network as a whole: norms that stay elsewhere, and the end of the stream, where
    none may be left before the head."""
    drafts = list(drafts) if flow.trace.model is not None else []  # a class by itself does not tell
    done = [draft for draft in drafts if draft.site.move is not None]
    left = [draft for draft in drafts if draft.site.code == "RZ919" and _is_normed(flow, draft)]
    if done and left:
        blocks = f"{number(len(left), 'block')} of {len(done) + len(left)}"
        yield f"{blocks} could not be changed: the network mixes placements"
    if target == "post" or not done:
        return
    last = max(drafts, key=lambda draft: draft.block.sum.node)
    node = last.block.sum.node
    own = [member.node for member in last.members if member.position == "post"]
    while len(users := flow.users[own.pop() if own else node]) == 1:
        node = users[0]
        if flow.facts[node].kind not in ("layout", "dropout", "pool") and flow.name(node) != "mean":
            break
    if flow.facts[node].kind != "norm":
        where = last.site.path or "the model"
        yield f"no norm stands behind the last block, {where}: such networks mostly have one there, and none is made"


def _is_normed(flow: Flow, draft: Draft) -> bool:
    block = draft.block
    nodes = (node for branch in block.branches for node in branch.cuts)
    return any(flow.facts[node].kind == "norm" for node in (*nodes, *flow.users[block.sum.node]))


def _move(flow: Flow, draft: Draft, target: Position) -> Move:
    block, members = draft.block, draft.members
    if len(block.branches) > 1:
        raise _Fixed("several branches are added to one skip, and the placements are defined for one")
    if not members:
        raise _Fixed("the block has no norm that could be moved, and none is made")
    if len({member.node for member in members}) > 1:
        places = ", ".join(f"{member.norm.path or member.norm.type} {_NAMES[member.position]}" for member in members)
        raise _Fixed(f"the block has several norms ({places}), and the placements are defined for one")
    if block.kind != "identity":
        raise _Fixed(f"the placements are defined for an identity skip, and this one is a {block.kind}")
    (branch,), (member, *_) = block.branches, members
    at = _call(flow, draft.site, member, branch)
    settled = placed(flow, block, draft.site)
    assert isinstance(settled[0], Site)
    site, operands = settled[0], settled[1]
    assert not isinstance(operands, str)
    if target == "pre":
        to = _entries(flow, draft, branch, operands[branch.term])
    elif target == "end":
        _check_unscaled(flow, branch.term.value)
        to = (operands[branch.term],)
    else:
        to = (_whole(flow, site, block.sum.node),)
    if at.span not in flow.trace.generated:
        _check_names(at, to)
    return Move(target, at, to)


def _call(flow: Flow, site: Site, member: norms.Member, branch: Branch) -> Operand:
    """The call of the norm, which must be in the method that adds and normalize what the form says."""
    node, at = member.node, member.norm.at
    frame = norms.frame_of(flow, node)
    name = member.norm.path or f"the {member.norm.type}"
    if flow.facts[node].fused:
        raise _Fixed(f"{name} also applies an activation")
    generated = frame is not None and frame.span in flow.trace.generated
    own = generated or (frame is not None and (frame.place, frame.owner) == (site.place, site.path))
    if at is None or not own or (not generated and code.operand(at) is None):
        raise _Fixed(f"{name} is not called in the text of the method that adds")
    if member.position == "inside":
        raise _Fixed(f"{name} stands between the layers of the branch")
    if member.position != "post":
        outside = [user for user in flow.users[node] if user not in branch.region and user != branch.term.add]
        if outside or flow.nodes[node] in flow.trace.root.outputs:
            raise _Fixed(f"the output of {name} is also read outside the branch")
    if member.position == "pre" and flow.inputs[node][0] != branch.region[0]:
        raise _Fixed(f"{name} does not read the stream itself")
    if member.position == "pre" and any(works_in_place(flow, user) for user in flow.users[node]):
        raise _Fixed(f"what reads {name} works in place, and would overwrite the stream")
    if member.position == "end":
        value = branch.term.value
        while value != node and flow.facts[value].kind == "dropout":
            value = flow.inputs[value][0]
        if value != node:
            raise _Fixed(f"the branch goes on behind {name}")
    return at


def _check_unscaled(flow: Flow, value: int) -> None:
    """A norm behind a constant factor would undo it."""
    factors = [source for source in flow.inputs[value] if not flow.constant[source]]
    if flow.name(value) in ("mul", "div") and len(factors) == 1:
        raise _Fixed("the branch ends in a factor, which a norm behind it would undo")


def _whole(flow: Flow, site: Site, node: int) -> Operand:
    """The sum as an expression whose value is used."""
    if in_helper(flow, node):
        raise _Fixed("the add is inside a function, whose call is not known to return the sum")
    assert site.place is not None
    assert site.span is not None
    definition = sources.function(site.place)
    for statement in ast.walk(definition) if definition is not None else ():
        if isinstance(statement, ast.Expr) and sources.span_of(site.span.file, statement.value) == site.span:
            raise _Fixed("the add is a statement that works in place, not a value")
    return Operand(site.place, site.span, WHOLE)


# --- where the branch reads the stream ---


def _entries(flow: Flow, draft: Draft, branch: Branch, end: Operand) -> tuple[Operand, ...]:
    """The operands through which the stream enters a branch, in the text of the method that adds."""
    entry, site = branch.region[0], draft.site
    found: dict[Operand, None] = {}
    for node in branch.region[1:]:
        if entry in flow.inputs[node]:
            found.update(dict.fromkeys(_reads(flow, node, entry, draft, end)))
    to = tuple(sorted(found, key=lambda at: (at.span, str(at.index))))
    if len(to) > 1 and not flow.trace.generated:
        variables = {text.id if isinstance(text := code.operand(at), ast.Name) else "" for at in to}
        if len(variables) > 1 or "" in variables:
            raise _Fixed("the branch reads the stream by several expressions")
        assert site.place is not None
        if not code.follow(site.place, tuple(at.span for at in to)):
            raise _Fixed("no statement by itself comes before all that reads the stream")
    return to


def _reads(flow: Flow, node: int, entry: int, draft: Draft, end: Operand) -> Iterator[Operand]:
    """The operands of the owner's text by which one operation comes to read the stream."""
    owner = owner_call(flow, draft.block.sum.node)
    step = flow.steps.get(node)
    frames, call = (
        (step.frames, step.parent) if step is not None else (flow.origin(node).frames, flow.origin(node).call)
    )
    child: Call | None = step if step is not None and step.inputs else None
    while call is not None and call is not owner:
        child, frames, call = call, call.frames, call.parent
    if call is None or not frames or draft.site.place is None:
        raise _Fixed("the stream enters the branch in another module")
    own = (
        _passed(flow, child, entry, frames[0], draft.site) if child is not None else _own(flow, node, entry, frames[0])
    )
    for at in own:
        yield at if at.place == draft.site.place else _argument(at, frames[0], draft.site, end)


def _own(flow: Flow, node: int, entry: int, frame: Frame) -> Iterator[Operand]:
    """The stream among the operands of an operation."""
    target, stream = flow.nodes[node], flow.nodes[entry]
    receiver = is_receiver(flow, node, frame.span)
    indices: list[int | str] = [i for i, value in enumerate(target.args) if value is stream]
    indices += [name for name, value in target.kwargs.items() if value is stream]
    written = code.expression(frame.span)
    both = len([value for value in target.args[:2] if value in flow.index]) == 2
    if not indices or (isinstance(written, ast.BinOp) and not both and frame.span not in flow.trace.generated):
        raise _Fixed(f"{flow.name(node)} reads the stream, which is not found in its text")
    for index in indices:
        yield _checked(Operand(frame.place, frame.span, index, receiver), frame.span in flow.trace.generated)


def _passed(flow: Flow, call: Call, entry: int, frame: Frame, site: Site) -> Iterator[Operand]:
    """The stream among the arguments of a module's call."""
    written, stream = code.expression(frame.span), flow.nodes[entry]
    given = [value is stream for value in call.inputs]
    if not isinstance(written, ast.Call) or not any(given):
        raise _Fixed(f"{call.path} reads the stream, which is not among its arguments")
    places: list[tuple[int | str, ast.expr]] = [*enumerate(written.args)]
    places += [(one.arg, one.value) for one in written.keywords if one.arg is not None]
    if len(places) != len(given) or any(one.arg is None for one in written.keywords):
        names = _aliases(site)  # some are no tensors, or not written out: the stream is told by its name
        alike = [isinstance(value, ast.Name) and value.id in names for _, value in places]
        given = alike if sum(alike) == sum(given) else []
    if not given or any(isinstance(one, ast.Starred) for one in written.args):
        raise _Fixed(f"which argument of {call.path} is the stream, its text does not tell")
    for (index, _), is_stream in zip(places, given, strict=True):
        if is_stream:
            yield _checked(Operand(frame.place, frame.span, index), generated=False)


def _checked(at: Operand, generated: bool) -> Operand:
    if not generated and code.operand(at) is None:
        raise _Fixed("the branch reads the stream where no text of its own is found")
    return at


def _aliases(site: Site) -> set[str]:
    """The variables that the skip is in: `residual = x`."""
    found = {site.skip}
    definition = sources.function(site.place) if site.place is not None else None
    for node in ast.walk(definition) if definition is not None else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            names = {node.value.id, *(target.id for target in node.targets if isinstance(target, ast.Name))}
            found |= names if site.skip in names else set()
    return found


def _argument(at: Operand, frame: Frame, site: Site, end: Operand) -> Operand:
    """The argument by which another method of the module, `self._attend(x)`, gets what it reads at an operand."""
    read = code.operand(at)
    definition = sources.function(site.place) if site.place is not None else None
    if frame.owner != site.path or not isinstance(read, ast.Name) or definition is None or site.place is None:
        raise _Fixed("the stream enters the branch in another module")
    me = code.self_name(site.place)
    calls = [
        sources.span_of(site.place.file, node)
        for node in ast.walk(definition)
        if isinstance(node, ast.Call) and code.is_path(node.func, me, frame.place.name)
    ]
    if len(calls) > 1:
        branch = code.operand(end)
        inside = sources.span_of(end.span.file, branch) if branch is not None else end.span
        calls = [span for span in calls if inside.contains(span)]
    if len(calls) != 1:
        raise _Fixed(f"which call of {frame.place.name} is the branch, the text does not tell")
    found = helpers.passed(frame, Frame(site.place, calls[0], site.path), read)
    if found is None:
        raise _Fixed(f"the stream enters the branch in {frame.place.name}, as no argument of its call")
    return found


def _check_names(at: Operand, to: tuple[Operand, ...]) -> None:
    """The call must mean the same at the other place: its variables, but what it normalizes, are set before both."""
    written, own = code.expression(at.span), code.operand(at)
    definition = sources.function(at.place)
    if written is None or definition is None:
        raise _Fixed("the text of the method that adds cannot be read")
    inner = set(ast.walk(own)) if own is not None else set()
    used = {node.id for node in ast.walk(written) if isinstance(node, ast.Name) and node not in inner}
    first = min((one.span.line, one.span.col) for one in (at, *to))
    for node in ast.walk(definition):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in used
        if isinstance(node, ast.Name) and stored and (node.lineno, node.col_offset) >= first:
            raise _Fixed(f"the call of the norm uses {node.id}, which is set anew")
