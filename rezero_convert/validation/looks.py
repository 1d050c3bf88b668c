"""The gated blocks of a model as a trace shows them, and what the graph alone tells of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.guard import uncollected
from ..capture.trace import Trace, origin
from ..detect import blocks as detected
from ..detect import gates
from ..detect.drafts import is_gated
from ..detect.flow import Flow, around, flow
from ..listing import compact, number
from ..methods import METHODS
from ..plan import Gate, Options, Plan, Scale, Site, Span
from .results import Check


@dataclass(frozen=True, slots=True)
class Branch:
    """A gated branch."""

    value: int
    """Before its gate."""
    product: int
    """The multiplication by the gate."""
    weights: tuple[str, ...]
    """Last first."""
    term: int
    """What is added."""
    sign: int
    """1 or -1; 0 where the add itself scales what it adds."""
    scale: Scale | None = None
    """How its gate is planned to scale it; None if that was not planned here."""


@dataclass(frozen=True, slots=True)
class Block:
    """A gated block as found in a trace of the converted model."""

    path: str
    where: str
    alphas: tuple[str, ...]
    sum: int
    output: int
    shortcut: int
    branches: tuple[Branch, ...]
    inside: frozenset[int]
    """The nodes of all branches."""
    wrong: str
    """What is wrong with the places of its gates."""
    skip: Scale
    """What scales the skip, by the method."""
    chosen: frozenset[str]
    """The checks that need not hold: a norm or an activation behind the sum was kept, a zero init not undone."""


@dataclass(slots=True)
class Look:
    """What is seen of the model in one mode."""

    mode: str
    flow: Flow
    found: list[Block]
    ungated: list[str]
    checks: dict[int, list[Check]] = field(default_factory=dict)
    """By the block's sum."""
    outputs: list[Tensor] = field(default_factory=list)
    """Of the run with real numbers."""
    undifferentiable: str = ""
    """Why no gradients can be computed in this mode."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, nn.Parameter]
    """The gates that the model is registered to have."""
    sites: dict[str, list[Site]]
    """What was planned, by gate."""
    plans: tuple[tuple[str, Plan], ...]
    """With the path of the module that holds it."""
    preserved: frozenset[str]
    """The gates whose blocks compute what they did before."""
    options: Options

    @property
    def closing(self) -> list[nn.Parameter]:
        """What is 0 when all branches are shut: the gates, and the biases beside those that are weights of norms."""
        found = dict(self.named)
        norms = [
            joined(prefix, site.path, gate.alpha)
            for prefix, plan in self.plans
            for site in plan.converted
            for gate in site.gates
            if gate.of_norm
        ]
        if not self.plans and METHODS[self.options.method].norm_gate:
            norms += self.named
        for name in norms:
            beside = f"{name.rpartition('.')[0]}.bias"
            bias = parameter_at(self.model, beside)
            found |= {} if bias is None else {beside: bias}
        return list(found.values())

    symbolic: bool = False
    """There are no inputs to run it on."""

    @property
    def meta(self) -> bool:
        return any(value.is_meta for value in chain(self.model.parameters(), self.model.buffers()))

    @property
    def runs(self) -> bool:
        """Whether there are real numbers to run it with."""
        return not self.symbolic and not self.meta


def parameter_at(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def all_of(named: dict[str, nn.Parameter]) -> str:
    return f"all {number(len(named), 'gate')}" if len(named) > 1 else number(len(named), "gate")


@uncollected()
def look_at(subject: Subject, mode: str, trace: Trace) -> Look:
    """The gated blocks of a trace, and the paths of the modules with a block that has no gate at all."""
    facts = flow(trace)
    known = {id(parameter): name for name, parameter in subject.named.items()}
    look = Look(mode, facts, [], [])
    chosen, _, nested = detected.find(facts, partial(is_gated, facts))
    for block in [*chosen, *(one.block for one in nested)]:
        found = [(branch, _known_gate(subject, facts, branch, known)) for branch in block.branches]
        own = [(branch, gate, name) for branch, pair in found if pair is not None for gate, name in [pair]]
        if own:
            look.found.append(_block(subject, facts, block, own, len(look.found) + 1))
        elif block in chosen:
            look.ungated.append(detected.owner_call(facts, block.sum.node).path)
    return look


def _known_gate(
    subject: Subject, flow: Flow, branch: detected.Branch, known: dict[int, str]
) -> tuple[gates.Found, str] | None:
    """A branch's gate with its name, if registered; else any gate of one number, or zero now, is taken for one."""
    gate = gates.existing(flow, branch)
    norm = gates.last_norm(flow, branch) if gate is None else None
    asked = not known and METHODS[subject.options.method].norm_gate
    if norm is not None and (asked or id(gates.parameter(flow, norm.parameter)) in known):
        gate = norm
    if gate is None or gate.kind in ("input", "offset"):
        return None
    parameter = gates.parameter(flow, gate.parameter)
    if known:
        return (gate, known[id(parameter)]) if id(parameter) in known else None
    wanted = gate.kind == "scalar" or gate.zero or asked or subject.options.granularity == "channel"
    gated = wanted and isinstance(parameter, nn.Parameter)
    return (gate, gate.parameter) if gated else None


def _block(
    subject: Subject, flow: Flow, block: detected.Block, own: list[tuple[detected.Branch, gates.Found, str]], k: int
) -> Block:
    frames = flow.origin(block.sum.node).frames
    span = frames[0].span if frames else None
    site = _site(subject, [name for _, _, name in own], span)
    kept = _keeps_tail(site) if site is not None else not subject.plans and subject.options.activation == "keep"
    chosen = {"vjp"} if kept else set()
    if any(name in subject.preserved for _, _, name in own) or _has_zeros(subject, site):
        chosen |= {"nonzero", "alive", "branch-alive"}
    branches = tuple(
        Branch(
            source,
            gate.node,
            tuple(_weights(flow, branch)),
            branch.term.value,
            _sign(flow, branch),
            _planned(site, name) if site is not None else _asked(subject, flow, gate, k),
        )
        for branch, gate, name in own
        for source in ([branch.term.value] if gate.node == branch.term.add else flow.inputs[gate.node])
        if not flow.constant[source]
    )
    where = site.span if site is not None and site.span is not None else span
    skip = _skip(subject, site, k)
    return Block(
        path=frames[-1].owner or "" if frames else "",
        where=str(where) if where is not None else "(no source)",
        alphas=tuple(name for _, _, name in own),
        sum=block.sum.node,
        output=output_of(flow, block.sum.node, site),
        shortcut=block.shortcut.value if skip == Scale() else _unscaled(flow, block.shortcut.value),
        branches=branches,
        inside=frozenset(node for branch in block.branches for node in branch.region[1:]),
        wrong=_misplaced(flow, block, own, skip),
        skip=skip,
        chosen=frozenset(chosen),
    )


def _site(subject: Subject, names: list[str], span: Span | None) -> Site | None:
    """What was planned for a block: by its gates; of several adds with one gate, the nearest line."""
    sites = [site for name in names for site in subject.sites.get(name, ())]
    line = span.line if span is not None else 0
    return min(sites, key=lambda site: abs(site.span.line - line) if site.span is not None else line, default=None)


def _has_zeros(subject: Subject, site: Site | None) -> bool:
    """Whether the branch's last layer starts at zero by the method."""
    return bool(site.shifts) if site is not None else METHODS[subject.options.method].biases


def _keeps_tail(site: Site) -> bool:
    return (site.activation is not None and site.activation.action == "keep") or any(
        norm.position == "post" and norm.action == "keep" for norm in site.norms
    )


def _weights(flow: Flow, branch: detected.Branch) -> Iterator[str]:
    for node in reversed(branch.region[1:]):
        if detected.has_weight(flow, node):
            yield from _parameters_at(flow, node)


def _parameters_at(flow: Flow, node: int) -> Iterator[str]:
    """The matrices that a node multiplies by."""
    target = flow.nodes[node]
    if target.op == "call_module" and flow.trace.model is not None:
        module = module_at(flow.trace.model, str(target.target)) or nn.Module()  # one that is no submodule has no name
        yield from (f"{target.target}.{name}" for name, value in module.named_parameters() if value.dim() > 1)
    else:
        for source in flow.inputs[node]:
            while flow.parameter(source) is None and flow.constant[source] and len(flow.inputs[source]) == 1:
                (source,) = flow.inputs[source]  # transposed, cast
            if (path := flow.parameter(source)) is not None:
                yield path


def output_of(flow: Flow, node: int, site: Site | None) -> int:
    """The block's output: the sum, or the activation that its module applies to it, or its post-norm."""
    call = detected.owner_call(flow, node)
    post = {norm.path for norm in site.norms if norm.position == "post"} if site is not None else set()
    while len(users := flow.users[node]) == 1:
        step = flow.steps.get(users[0])
        parent = step.parent if step is not None else flow.origin(users[0]).call
        target = step.path if step is not None else str(flow.nodes[users[0]].target)
        kind = flow.facts[users[0]].kind
        own = parent is call if "" in post and step is None else False  # a functional norm has no path
        known = own or any(path and (target == path or target.endswith(f".{path}")) for path in post)
        active = kind == "activation" and parent is call and (site is None or _follows_every(flow, node, site))
        if not (active or (kind == "norm" and known)):
            break
        node = users[0]
    return node


def _follows_every(flow: Flow, node: int, site: Site) -> bool:
    """Whether an activation follows all runs of an add in its module: one behind a loop follows the last pass."""
    here, call = around(flow.origin(node).frames), flow.origin(node).call
    level = next((level for level, frame in enumerate(here) if frame.span == site.span), 0)
    alike = [(i, around(origin(one).frames)) for i, one in enumerate(flow.nodes) if origin(one).call is call]
    runs = [i for i, frames in alike if frames[: level + 1] == here[: level + 1]]
    return all(any(flow.facts[user].kind == "activation" for user in flow.users[run]) for run in runs)


def _unscaled(flow: Flow, node: int) -> int:
    """What a method's factor of the skip multiplies, or the value itself if nothing does."""
    found = node
    while flow.name(found) in ("mul", "to", "type_as"):
        sources = [source for source in flow.inputs[found] if not flow.constant[source]]
        if len(sources) != 1:
            return node
        if flow.name(found) == "mul":
            return sources[0]
        found = sources[0]
    return node


def _sign(flow: Flow, branch: detected.Branch) -> int:
    add = branch.term.add
    plain = flow.name(add) in ("add", "sub") and "alpha" not in flow.nodes[add].kwargs
    return (-1 if branch.term.negative else 1) if plain else 0


def _asked(subject: Subject, flow: Flow, gate: gates.Found, k: int) -> Scale:
    """How the method scales the branch of a file's k-th block; the view of its gate is what it is."""
    method = METHODS[subject.options.method]
    if method.plain and subject.options.granularity == "scalar":
        return Scale()
    factors = [flow.shape(source) or () for source in flow.inputs[gate.node] if flow.constant[source]]
    wide = [len(shape) - 1 - i for shape in factors for i, size in enumerate(shape) if size > 1]
    factor = 1.0 if method.factor is None else method.factor(k, max(len(subject.named), k))
    return Scale(method.map, factor, wide[0] if len(wide) == 1 else 0)


def _planned(site: Site, name: str) -> Scale | None:
    """How a new gate is planned to scale its branch."""
    for gate in site.gates:
        own = [joined(site.path, one) for one in gate.parameters()]
        if not gate.existing and any(f".{name}".endswith(f".{one}") for one in own):
            return gate.scale
    return None


def _skip(subject: Subject, site: Site | None, k: int) -> Scale:
    """What scales the skip, by the plan, or by the method of a file's k-th block."""
    if site is not None:
        return Scale() if site.skip_gate is None else site.skip_gate.scale
    method = METHODS[subject.options.method]
    if callable(method.skip):
        return Scale(factor=method.skip(k, max(len(subject.named), k)))
    return Scale(map="complement" if method.skip == "complement" else "")


def _misplaced(
    flow: Flow, block: detected.Block, own: list[tuple[detected.Branch, gates.Found, str]], skip: Scale
) -> str:
    if len(own) < len(block.branches):
        return "a branch of the block has no gate"
    known = {id(gates.parameter(flow, gate.parameter)): name for _, gate, name in own}
    if _gates_skip(flow, block, known) == (skip.map == "complement"):
        return ""
    return "no gate scales the skip" if skip.map else "a gate scales the skip"


def _gates_skip(flow: Flow, block: detected.Block, known: dict[int, str]) -> bool:
    """Whether a gate scales the skip."""
    for node in flow.region(block.skip, block.shortcut.value)[1:]:
        stack = [source for source in flow.inputs[node] if flow.constant[source]]
        while stack:
            source = stack.pop()
            path = flow.parameter(source)
            if path is not None and id(gates.parameter(flow, path)) in known:
                return True
            stack += flow.inputs[source]
    return False


def plain_gates(flow: Flow) -> Iterator[str]:
    """Blocks whose branch is scaled by a tensor of one number that is neither a parameter nor a buffer."""
    model = flow.trace.model or nn.Module()
    known = {name for own in (model.named_parameters, model.named_buffers) for name, _ in own(remove_duplicate=False)}
    for block in detected.find(flow, partial(is_gated, flow))[0]:
        for branch in block.branches:
            product = branch.term.value
            factors = flow.inputs[product] if flow.name(product) == "mul" else ()
            for factor in factors:
                path, shape = flow.parameter(factor), flow.shape(factor)
                if path is not None and path not in known and torch.Size(shape or ()).numel() == 1:
                    owner = detected.owner_call(flow, block.sum.node).path
                    yield f"the tensor that scales the branch of {owner or 'the model'}"


def trainable(subject: Subject, notes: list[str]) -> Iterator[Check]:
    frozen = [name for name, parameter in subject.named.items() if not parameter.requires_grad]
    if not any(parameter.requires_grad for parameter in subject.model.parameters()):
        notes.append("all parameters are frozen, the gates too")
        return
    reused = {name for name in frozen for site in subject.sites.get(name, ()) if _is_reused(site, name)}
    if reused:
        notes.append(f"frozen gates that were in the model before: {compact(sorted(reused))}")
    constant = {name for name in frozen for site in subject.sites.get(name, ()) if not _is_trained(site, name)}
    if not subject.plans and not METHODS[subject.options.method].trainable:
        constant = set(frozen)
    stuck = [name for name in frozen if name not in reused | constant]
    yield Check("trainable", "structure", not stuck, several("is frozen", stuck) or all_of(subject.named))


def _is_reused(site: Site, name: str) -> bool:
    return any(gate.existing and _is_of(gate, name) for gate in site.gates)


def _is_trained(site: Site, name: str) -> bool:
    return all(gate.trainable for gate in site.gates if _is_of(gate, name))


def _is_of(gate: Gate, name: str) -> bool:
    """Whether a parameter, by its path from the root, is one of a gate's, by their paths from its owner."""
    return any(f".{name}".endswith(f".{own}") for own in gate.parameters())


def structure(subject: Subject, look: Look, looks: list[Look], notes: list[str]) -> Iterator[Check]:
    """What the graph alone tells: gates read, dropped norms gone."""
    gating = {name for block in look.found for name in block.alphas}
    elsewhere = {name for other in looks for block in other.found for name in block.alphas}
    ran = _ran(look)
    unread = sorted(name for name in subject.named if name not in gating)
    # a block that adds without its gate is another matter: its owner is among the ungated
    idle = {path for name in unread for path in _owners(name) if path not in ran or path not in look.ungated}
    optional = elsewhere if subject.symbolic else elsewhere | _of_unrun(subject)
    skipped = [name for name in unread if name in optional and _owners(name) <= idle]
    if skipped:  # layer drop, auxiliary heads
        notes.append(f"adds that did not run in {look.mode} mode: gates {compact(skipped)} not checked there")
    unread = [name for name in unread if name not in skipped]
    yield Check("read", look.mode, not unread, several("gates no branch", unread) or all_of(subject.named))
    if not subject.plans:
        return
    left = _left_norms(subject, look)
    dropped = len({norm.path for _, plan in subject.plans for site in plan.converted for norm in site.norms
                   if norm.action != "keep"})  # fmt: skip
    yield Check("norm-gone", look.mode, not left, several("was to go but runs", left) or number(dropped, "norm"))


def _of_unrun(subject: Subject) -> set[str]:
    """The gates that were decided without a run: one run need not come to all of them."""
    return {
        joined(prefix, site.path, name)
        for prefix, plan in subject.plans
        if plan.route.startswith("static")
        for site in plan.converted
        for gate in site.gates
        for name in gate.parameters()
    }


def _ran(look: Look) -> set[str]:
    """The paths of the modules whose code ran."""
    frames = {frame.owner for node in look.flow.nodes for frame in origin(node).frames if frame.owner is not None}
    return frames | {call.path for call in look.flow.trace.calls[1:]}


def _owners(name: str) -> set[str]:
    """The module that holds a gate, and those around it but the root: a gate may lie below the add's owner."""
    parts = name.split(".")[:-1]
    return {".".join(parts)} if parts else {""}


def _left_norms(subject: Subject, look: Look) -> list[str]:
    """The norms that the plan dropped and that run all the same."""
    called = {call.path: call.facts.norm is not None for call in look.flow.trace.calls}
    for node in look.flow.nodes:
        if node.op == "call_module":
            called[str(node.target)] = origin(node).facts.norm is not None
    left = []
    for prefix, plan in subject.plans:
        for site in plan.converted:
            for norm in site.norms:
                path = joined(prefix, norm.path) if norm.path else ""
                if norm.action == "keep" or path not in called or not path:
                    continue
                own = module_at(subject.model, path)
                if called[path] or (norm.action == "bypass" and not isinstance(own, nn.Identity)):
                    left.append(path)
    return sorted(set(left))


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def several(text: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{compact(names, limit=3)} {text}"


def asleep_gates(subject: Subject, look: Look, notes: list[str]) -> tuple[str, ...]:
    """The gates whose way to the model's outputs passes the branch of another gate."""
    awake = cone(look, look.flow.trace.root.outputs, sealed=True)
    connected = cone(look, look.flow.trace.root.outputs, sealed=False)
    products = [
        (name, branch.product)
        for block in look.found
        for name, branch in zip(block.alphas, block.branches, strict=False)
    ]
    names = {name for name, product in products if product in awake}
    some = {name for name, product in products if product in connected}
    useless = [name for name, _ in products if name not in some]
    if useless:
        notes.append(f"gates that no output depends on: {compact(dict.fromkeys(useless))}")
    return tuple(dict.fromkeys(name for name, _ in products if name in some and name not in names))


def cone(look: Look, ends: Iterable[fx.Node], *, sealed: bool) -> set[int]:
    """The nodes that `ends` depend on in any way; with `sealed`, not counting ways through a gated branch."""
    index = look.flow.index
    cut = {(branch.product, branch.value) for block in look.found for branch in block.branches} if sealed else set()
    seen = {index[node] for node in ends if node in index}
    stack = list(seen)
    while stack:
        node = stack.pop()
        for source in look.flow.nodes[node].all_input_nodes:
            number_ = index[source]
            if number_ not in seen and (node, number_) not in cut:
                seen.add(number_)
                stack.append(number_)
    return seen
