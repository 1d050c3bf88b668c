"""Does a converted model hold what ReZero promises? Measured on its own activations and gradients.

For every block, with all gates set to 0 (and restored afterwards), in eval and in train mode: the sum equals the skip
(identity), the gradient that leaves the block equals the one that comes in (vjp: a ReLU left after the add passes the
first check and fails this one), the branch is finite and not zero, the gate gets a gradient from a random cotangent at
the block's own output (alive), and the branch's weights get one from the branch (branch-alive). For the whole: every
gate is a trainable parameter and is read as the gate of a branch, every dropped norm is gone, and what is reached
through gates only does not change with the branches' weights (sealed).

`equality` and `idempotence` are the two oracles that take more than the converted model, or another look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .capture import capture, check_model
from .capture.guard import substitute, untouched
from .capture.inputs import resolve_inputs
from .capture.recorded import one_line, record, record_on, replay, tensors_in
from .capture.trace import Trace, origin
from .detect import blocks as detected
from .detect import detect, gates
from .detect.flow import Flow, flow
from .errors import ConversionError
from .listing import compact, number, short
from .plan import Options, Plan, Site, Span, as_dict
from .rewrite import modules

MODES = ("eval", "train")
_RETRIES = 8  # stochastic depth may silence a whole branch in one run
_SEED = 0


@dataclass(frozen=True, slots=True)
class Check:
    """One property of one block, or of the whole model."""

    name: str
    """Of a block: "gated", "identity", "finite", "nonzero", "vjp", "alive", "branch-alive". Of the model:
    "registered", "trainable", "read", "norm-gone", "sealed"; "outputs", "gradients" (equality), "idempotence"."""
    mode: str
    """"eval", "train" or "structure"."""
    ok: bool
    detail: str = ""
    """What was found; of a block's check, what is wrong ("" if nothing)."""
    choice: bool = False
    """Does not hold, but by the plan: a post-norm or activation that was kept."""

    @property
    def status(self) -> str:
        return "ok" if self.ok else "by choice" if self.choice else "FAILED"

    def __str__(self) -> str:
        mode = "" if self.mode == "structure" else f" ({self.mode})"
        return f"{self.status:9} {self.name}{mode}: {self.detail}".rstrip(": ")

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, **as_dict(self)}


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The checks of one block."""

    path: str
    alphas: tuple[str, ...]
    where: str
    """`file:line:col` of the sum in the user's own file, where that is known."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok or check.choice for check in self.checks)


@dataclass(frozen=True, slots=True)
class Validation:
    """What was checked and what came out. `print` it for a table."""

    title: str
    blocks: tuple[BlockResult, ...]
    checks: tuple[Check, ...]
    """Of the model as a whole."""
    asleep: tuple[str, ...] = ()
    """Gates whose gradient from the model's output is zero at the start because it has to pass another zero gate;
    they wake at the second step."""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for everything that does not hold and was not chosen."""
        own = [f"{c.name} ({c.mode}): {c.detail}" for c in self.checks if not (c.ok or c.choice)]
        blocks = [
            f"{block.path or 'the model'} ({', '.join(block.alphas)}, {block.where}): "
            f"{check.name} ({check.mode}): {check.detail}"
            for block in self.blocks
            for check in block.checks
            if not (check.ok or check.choice)
        ]
        return (*own, *blocks)

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "ok": self.ok, "failures": list(self.failures), **as_dict(self)}

    def __str__(self) -> str:
        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        verdict = "holds" if self.ok else "DOES NOT HOLD"
        title = Text(f"{self.title}: {verdict}", style="bold green" if self.ok else "bold red")
        table = Table(title=title, title_justify="left", pad_edge=False)
        for name, share in (("block", 5), ("gate", 4), ("where", 5), ("result", 4)):
            table.add_column(name, ratio=share, overflow="fold")
        for members in _grouped(self.blocks):
            first = members[0]
            times = f" x {len(members)}" if len(members) > 1 else ""
            gate = "\n".join(_local(name, first.path) for name in first.alphas)
            table.add_row(
                Text(compact(block.path for block in members) + times),
                Text(gate),
                Text(_shown(first.where)),
                _result(first.checks),
            )
        yield table
        names = dict.fromkeys(check.name for block in self.blocks for check in block.checks)
        yield Text(f"{number(len(self.blocks), 'block')}, each checked: {', '.join(names)}")
        for check in _by_mode(self.checks):
            yield _line(check.status, f" {check.name}{check.mode}: {check.detail}")
        for members in _grouped(self.blocks):
            for check in _by_mode(members[0].checks):
                if not check.ok:
                    who = compact(block.path for block in members)
                    yield _line(check.status, f" {check.name}{check.mode}: {who}: {check.detail}")
        if self.asleep:
            yield _line("asleep", f" until the second step, behind another zero gate: {compact(self.asleep)}")
        yield from (Text(f"note: {note}") for note in self.notes)


_STYLES = {"ok": "green", "by choice": "yellow", "FAILED": "bold red", "asleep": "yellow"}


def _line(status: str, text: str) -> Text:
    return Text(status, style=_STYLES[status]).append(text, style="not bold default")


def _result(checks: tuple[Check, ...]) -> Text:
    """ "ok", or what does not hold, worst first."""
    lines = []
    for status in ("FAILED", "by choice"):
        names = dict.fromkeys(check.name for check in checks if check.status == status)
        if names:
            lines.append(Text(f"{status}: {', '.join(names)}", style=_STYLES[status]))
    return Text("\n").join(lines) if lines else Text("ok", style=_STYLES["ok"])


def _by_mode(checks: Iterable[Check]) -> list[Check]:
    """Equal checks of several modes as one; its `mode` is as shown: "", " (train)", " (eval, train)"."""
    found: dict[tuple[object, ...], list[Check]] = {}
    for check in checks:
        found.setdefault((check.name, check.ok, check.choice, check.detail), []).append(check)
    return [replace(some[0], mode=_modes(some)) for some in found.values()]


def _modes(checks: list[Check]) -> str:
    names = [check.mode for check in checks if check.mode != "structure"]
    return f" ({', '.join(names)})" if names else ""


def _grouped(blocks: Iterable[BlockResult]) -> list[list[BlockResult]]:
    """Blocks with the same code, gates and results; those that fail first."""
    groups: dict[tuple[object, ...], list[BlockResult]] = {}
    for block in blocks:
        alphas = tuple(_local(name, block.path) for name in block.alphas)
        marks = tuple((check.name, check.mode, check.status) for check in block.checks)
        groups.setdefault((block.where, alphas, marks), []).append(block)
    return sorted(groups.values(), key=lambda members: members[0].ok)


def _local(name: str, path: str) -> str:
    return name.removeprefix(f"{path}.") if path else name


def _shown(where: str) -> str:
    file, colon, rest = where.partition(":")
    return f"{short(file)}{colon}{rest}"


@dataclass(frozen=True, slots=True)
class _Branch:
    """A gated branch."""

    value: int
    """Before its gate."""
    product: int
    """The multiplication by the gate."""
    weights: tuple[str, ...]
    """Last first."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A gated block as found in a trace of the converted model."""

    path: str
    where: str
    alphas: tuple[str, ...]
    sum: int
    output: int
    shortcut: int
    branches: tuple[_Branch, ...]
    inside: frozenset[int]
    """The nodes of all branches."""
    partial: bool
    """A branch has no gate."""
    chosen: bool
    """A norm or an activation behind the sum was kept by the plan."""


@dataclass(slots=True)
class _Look:
    """What is seen of the model in one mode."""

    mode: str
    flow: Flow
    found: list[_Block]
    ungated: list[str]
    checks: dict[int, list[Check]] = field(default_factory=dict)
    """By the block's sum."""


@dataclass(frozen=True, slots=True)
class _Subject:
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
    options: Options

    @property
    def meta(self) -> bool:
        return any(value.is_meta for value in [*self.model.parameters(), *self.model.buffers()])


def validate(model: nn.Module, example_inputs: Any = None, *, options: Options | None = None) -> Validation:
    """Check a converted model, block by block; works at any value of the gates, and leaves the model as it was.

    Args:
        model: converted by `convert`, from a converted file, or hand-written with gates of one number.
        example_inputs: as for `convert`.
        options: what the conversion was asked for, where the model holds no record of it (a converted file).

    Returns:
        The result; `.ok` is relative to the plan: what was kept by choice does not count as a failure.

    Raises:
        ConversionError: the model cannot be captured, or has no gate at all.
    """
    check_model(model)
    args, kwargs = resolve_inputs(model, example_inputs)
    plans = tuple((path, plan) for path, module in model.named_modules() if (plan := modules.record(module)))
    sites: dict[str, list[Site]] = {}
    for prefix, plan in plans:
        for site in plan.converted:
            for gate in site.gates:
                sites.setdefault(_join(prefix, site.path, gate.alpha), []).append(site)
    registered, broken = _registered(model, sites)
    subject = _Subject(model, args, kwargs, registered, sites, plans, options or Options())
    with untouched(model):  # the random states among others
        torch.manual_seed(_SEED)
        return _validated(subject, broken)


def _registered(model: nn.Module, planned: Iterable[str]) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The gates by name, each parameter once; and the names that are to be gates but are no parameters."""
    names = [
        _join(prefix, name)
        for prefix, module in model.named_modules()
        for name in module.__dict__.get("rezero_gates", ())
    ]
    found: dict[str, nn.Parameter] = {}
    broken: list[str] = []
    seen: set[int] = set()
    for name in dict.fromkeys([*names, *planned]):
        parameter = _parameter(model, name)
        if parameter is None:
            broken.append(name)
        elif id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found, broken


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _validated(subject: _Subject, broken: list[str]) -> Validation:
    looks: list[_Look] = []
    notes: list[str] = []
    for mode in MODES:
        try:
            looks.append(
                _look(subject, mode, record(subject.model, subject.args, subject.kwargs, training=mode == "train"))
            )
        except ConversionError as error:
            if mode == "eval":
                raise
            notes.append(f"not checked in train mode, where the model does not run: {error}")
    plain = sorted({name for look in looks for name in _plain_gates(look.flow)}) if not subject.plans else []
    broken += plain
    if not subject.named:  # hand-written
        names = dict.fromkeys(name for look in looks for block in look.found for name in block.alphas)
        subject = replace(subject, named={name: subject.model.get_parameter(name) for name in names})
    if not (subject.named or broken):
        raise ConversionError(
            f"{type(subject.model).__qualname__}: there is no gate to validate: convert the model first"
        )
    checks = [
        Check("registered", "structure", not broken, _several("is not a parameter", broken) or _all(subject.named))
    ]
    checks += _trainable(subject, notes)
    asleep: tuple[str, ...] = ()
    if subject.meta:
        notes.append("on meta tensors only the structure can be checked")
    else:
        looks = [measured for look in looks if (measured := _measured(subject, look, notes)) is not None]
    for look in looks:
        checks += _structure(subject, look, looks, notes)
        if look.mode == "eval":
            asleep = _asleep(subject, look, notes)
            if not subject.meta and look.found:
                checks += _sealed(subject, look, notes)
    missing = dict.fromkeys(path for look in looks for path in look.ungated)
    if missing and not subject.plans:
        notes.append(f"{number(len(missing), 'residual block')} without a gate: {compact(missing)}")
    return Validation(
        type(subject.model).__qualname__, _results(looks), tuple(checks), asleep, tuple(dict.fromkeys(notes))
    )


def _all(named: dict[str, nn.Parameter]) -> str:
    return f"all {number(len(named), 'gate')}" if len(named) > 1 else number(len(named), "gate")


def _results(looks: list[_Look]) -> tuple[BlockResult, ...]:
    """The blocks of both modes; of a module that runs twice, every check must hold both times."""
    blocks: dict[tuple[str, tuple[str, ...], str], dict[tuple[str, str], Check]] = {}
    for look in looks:
        for block in look.found:
            checks = blocks.setdefault((block.path, block.alphas, block.where), {})
            gated = Check("gated", look.mode, not block.partial, "a branch of the block has no gate")
            for check in (gated, *look.checks.get(block.sum, ())):
                key = (check.name, check.mode)
                if key not in checks or (checks[key].ok and not check.ok):
                    chosen = block.chosen and check.name == "vjp" and not check.ok
                    checks[key] = replace(check, detail="" if check.ok else check.detail, choice=chosen)
    return tuple(BlockResult(*key, tuple(checks.values())) for key, checks in blocks.items())


# What a trace shows


def _look(subject: _Subject, mode: str, trace: Trace) -> _Look:
    """The gated blocks of a trace, and the paths of the modules with a block that has no gate at all."""
    facts = flow(trace)
    known = {id(parameter): name for name, parameter in subject.named.items()}
    look = _Look(mode, facts, [], [])
    chosen, _, nested = detected.find(facts)
    for block in [*chosen, *(one.block for one in nested)]:
        found = [(branch, _known_gate(facts, branch, known)) for branch in block.branches]
        own = [(branch, gate, name) for branch, pair in found if pair is not None for gate, name in [pair]]
        if own:
            look.found.append(_block(subject, facts, block, own))
        elif block in chosen:
            look.ungated.append(detected.owner_call(facts, block.sum.node).path)
    return look


def _known_gate(flow: Flow, branch: detected.Branch, known: dict[int, str]) -> tuple[gates.Found, str] | None:
    """A branch's gate with its name, if registered; in a model without registration, any gate of one number."""
    gate = gates.existing(flow, branch)
    if gate is None or gate.kind == "input":
        return None
    parameter = gates.parameter(flow, gate.parameter)
    if known:
        return (gate, known[id(parameter)]) if id(parameter) in known else None
    scalar = gate.kind == "scalar" and isinstance(parameter, nn.Parameter)
    return (gate, gate.parameter) if scalar else None


def _block(
    subject: _Subject, flow: Flow, block: detected.Block, own: list[tuple[detected.Branch, gates.Found, str]]
) -> _Block:
    frames = flow.origin(block.sum.node).frames
    span = frames[0].span if frames else None
    site = _site(subject, [name for _, _, name in own], span)
    kept = _keeps_tail(site) if site is not None else not subject.plans and subject.options.activation == "keep"
    branches = tuple(
        _Branch(source, gate.node, tuple(_weights(flow, branch)))
        for branch, gate, _ in own
        for source in flow.inputs[gate.node]
        if not flow.constant[source]
    )
    where = site.span if site is not None and site.span is not None else span
    return _Block(
        path=frames[-1].owner or "" if frames else "",
        where=str(where) if where is not None else "(no source)",
        alphas=tuple(name for _, _, name in own),
        sum=block.sum.node,
        output=_output(flow, block.sum.node, site),
        shortcut=block.shortcut.value,
        branches=branches,
        inside=frozenset(node for branch in block.branches for node in branch.region[1:]),
        partial=len(own) < len(block.branches),
        chosen=kept,
    )


def _site(subject: _Subject, names: list[str], span: Span | None) -> Site | None:
    """What was planned for a block: by its gates; of several adds with one gate, the nearest line."""
    sites = [site for name in names for site in subject.sites.get(name, ())]
    line = span.line if span is not None else 0
    return min(sites, key=lambda site: abs(site.span.line - line) if site.span is not None else line, default=None)


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
        module = flow.trace.model.get_submodule(str(target.target))
        yield from (f"{target.target}.{name}" for name, value in module.named_parameters() if value.dim() > 1)
    else:
        yield from (path for source in flow.inputs[node] if (path := flow.parameter(source)) is not None)


def _output(flow: Flow, node: int, site: Site | None) -> int:
    """The block's output: the sum, or the activation that its module applies to it, or the norm after it."""
    call = detected.owner_call(flow, node)
    post = site is not None and any(norm.position == "post" for norm in site.norms)
    while len(users := flow.users[node]) == 1:
        step = flow.steps.get(users[0])
        parent = step.parent if step is not None else flow.origin(users[0]).call
        kind = flow.facts[users[0]].kind
        if not ((kind == "activation" and parent is call) or (kind == "norm" and post)):
            break
        node = users[0]
    return node


def _plain_gates(flow: Flow) -> Iterator[str]:
    """Blocks whose branch is scaled by a tensor of one number that is neither a parameter nor a buffer."""
    for block in detected.find(flow)[0]:
        for branch in block.branches:
            product = branch.term.value
            factors = flow.inputs[product] if flow.name(product) == "mul" else ()
            for factor in factors:
                path, shape = flow.parameter(factor), flow.shape(factor)
                if path is not None and path.startswith("_constant_") and torch.Size(shape or ()).numel() == 1:
                    owner = detected.owner_call(flow, block.sum.node).path
                    yield f"the tensor that scales the branch of {owner or 'the model'}"


def _trainable(subject: _Subject, notes: list[str]) -> Iterator[Check]:
    frozen = [name for name, parameter in subject.named.items() if not parameter.requires_grad]
    if not any(parameter.requires_grad for parameter in subject.model.parameters()):
        notes.append("all parameters are frozen, the gates too")
        return
    reused = {name for name in frozen for site in subject.sites.get(name, ()) if _is_reused(site, name)}
    if reused:
        notes.append(f"frozen gates that were in the model before: {compact(sorted(reused))}")
    stuck = [name for name in frozen if name not in reused]
    yield Check("trainable", "structure", not stuck, _several("is frozen", stuck) or _all(subject.named))


def _is_reused(site: Site, name: str) -> bool:
    return any(gate.existing and name.endswith(gate.alpha) for gate in site.gates)


def _structure(subject: _Subject, look: _Look, looks: list[_Look], notes: list[str]) -> Iterator[Check]:
    """What the graph alone tells: gates read, dropped norms gone."""
    gating = {name for block in look.found for name in block.alphas}
    elsewhere = {name for other in looks for block in other.found for name in block.alphas}
    ran = _ran(look)
    unread = sorted(name for name in subject.named if name not in gating)
    skipped = [name for name in unread if name in elsewhere and not _owners(name) & ran]
    if skipped:  # layer drop, auxiliary heads
        notes.append(f"modules that did not run in {look.mode} mode: gates {compact(skipped)} not checked there")
    unread = [name for name in unread if name not in skipped]
    yield Check("read", look.mode, not unread, _several("gates no branch", unread) or _all(subject.named))
    if not subject.plans:
        return
    left, dropped = _left_norms(subject, look), 0
    dropped = len({norm.path for _, plan in subject.plans for site in plan.converted for norm in site.norms
                   if norm.action != "keep"})  # fmt: skip
    yield Check("norm-gone", look.mode, not left, _several("was to go but runs", left) or number(dropped, "norm"))


def _ran(look: _Look) -> set[str]:
    """The paths of the modules whose code ran."""
    frames = {frame.owner for node in look.flow.nodes for frame in origin(node).frames if frame.owner is not None}
    return frames | {call.path for call in look.flow.trace.calls[1:]}


def _owners(name: str) -> set[str]:
    """The module that holds a gate, and those around it but the root: a gate may lie below the add's owner."""
    parts = name.split(".")[:-1]
    return {".".join(parts)} if parts else {""}


def _left_norms(subject: _Subject, look: _Look) -> list[str]:
    """The norms that the plan dropped and that run all the same."""
    called = {call.path: call.facts.norm is not None for call in look.flow.trace.calls}
    for node in look.flow.nodes:
        if node.op == "call_module":
            called[str(node.target)] = origin(node).facts.norm is not None
    left = []
    for prefix, plan in subject.plans:
        for site in plan.converted:
            for norm in site.norms:
                path = _join(prefix, norm.path) if norm.path else ""
                if norm.action == "keep" or path not in called or not path:
                    continue
                own = _module(subject.model, path)
                if called[path] or (norm.action == "bypass" and not isinstance(own, nn.Identity)):
                    left.append(path)
    return sorted(set(left))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _several(text: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{compact(names, limit=3)} {text}"


def _asleep(subject: _Subject, look: _Look, notes: list[str]) -> tuple[str, ...]:
    """The gates whose way to the model's outputs passes the branch of another gate."""
    awake = _cone(look, look.flow.trace.root.outputs, sealed=True)
    connected = _cone(look, look.flow.trace.root.outputs, sealed=False)
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


def _cone(look: _Look, ends: Iterable[fx.Node], *, sealed: bool) -> set[int]:
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


# With real numbers, all gates at 0


@dataclass(slots=True)
class _Observed:
    """What one run showed, by node."""

    outputs: list[Tensor] = field(default_factory=list)
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    likes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    equal: dict[int, bool] = field(default_factory=dict)
    finite: dict[int, bool] = field(default_factory=dict)
    nonzero: dict[int, bool] = field(default_factory=dict)

    def cotangent(self, node: int) -> Tensor:
        shape, dtype, device = self.likes[node]
        return torch.randn(shape, dtype=dtype, device=device)


def _measured(subject: _Subject, look: _Look, notes: list[str]) -> _Look | None:
    """The look with its blocks' checks; on real tensors the model may have gone another way than in the trace."""
    try:
        with _zeroed(subject.named.values()):
            try:
                return _measure(subject, look, notes)
            except ConversionError:  # on fake tensors transformers skips some of its branches
                training = look.mode == "train"
                trace = record_on("real", subject.model, subject.args, subject.kwargs, training=training)
                return _measure(subject, _look(subject, look.mode, trace), notes)
    except Exception as error:  # whatever the model raises
        said = str(error) if isinstance(error, ConversionError) else one_line(error)
        if look.mode == "eval":
            raise ConversionError(f"the model raised on the example inputs: {said}") from error
        notes.append(f"not checked in train mode, where the model does not run: {said}")
        return None


def _measure(subject: _Subject, look: _Look, notes: list[str]) -> _Look:
    seen = _run(subject, look)
    look.checks = {block.sum: list(_at_zero(subject, block, seen, look.mode)) for block in look.found}
    blind = [block.path for block in look.found if block.output in seen.edges and block.shortcut not in seen.edges]
    if blind:
        notes.append(f"the gradient through the block was not checked, the skip has none: {compact(blind)}")
    del seen  # the run's activations
    if look.mode == "train":
        _retry(subject, look)
    return look


def _retry(subject: _Subject, look: _Look) -> None:
    """Measure again what stochastic depth may have silenced in one run: alive once is alive."""
    mortal = ("nonzero", "alive", "branch-alive")
    for seed in range(_SEED + 1, _SEED + 1 + _RETRIES):
        dead = {c.name for checks in look.checks.values() for c in checks if not c.ok and c.name in mortal}
        silent = [block for block in look.found if any(not c.ok and c.name in mortal for c in look.checks[block.sum])]
        if not dead or not all(_is_random(look, block) for block in silent):
            return
        torch.manual_seed(seed)
        try:
            seen = _run(subject, look)
        except ConversionError:  # it goes another way: layers are dropped at random
            return
        for block in silent:
            again = {check.name: check for check in _at_zero(subject, block, seen, look.mode)}
            look.checks[block.sum] = [
                again[check.name] if check.name in mortal and check.name in again and not check.ok else check
                for check in look.checks[block.sum]
            ]
        del seen


def _is_random(look: _Look, block: _Block) -> bool:
    """Whether a branch draws random numbers: dropout, stochastic depth."""
    nodes = _cone_inside(look, block)
    return any(look.flow.facts[node].kind == "dropout" or look.flow.name(node) in _RANDOM for node in nodes)


_RANDOM = frozenset(
    {"bernoulli", "rand", "rand_like", "randn", "randn_like", "new_empty", "empty", "uniform", "normal"}
)


def _cone_inside(look: _Look, block: _Block) -> set[int]:
    """The nodes of the branches, with what is computed for them from no input."""
    seen = set(block.inside)
    stack = list(seen)
    while stack:
        for source in look.flow.nodes[stack.pop()].all_input_nodes:
            position = look.flow.index[source]
            if position > block.shortcut and position not in seen:
                seen.add(position)
                stack.append(position)
    return seen


@contextmanager
def _zeroed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set gates to 0, able to get a gradient; and put back what was there."""
    saved = [(parameter, parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, _, _ in saved:
                parameter.requires_grad_(True)
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value, required in saved:
                parameter.copy_(value)
                parameter.requires_grad_(required)


def _run(subject: _Subject, look: _Look) -> _Observed:
    """One run with gradients, watching the nodes that matter."""
    state = torch.get_rng_state()
    try:
        return _watch(subject, look, mark=True)
    except RuntimeError:  # an input that is overwritten in place must not require a gradient
        torch.set_rng_state(state)
        return _watch(subject, look, mark=False)


def _watch(subject: _Subject, look: _Look, *, mark: bool) -> _Observed:
    seen = _Observed()
    last: dict[int, int] = {}
    sums: dict[int, list[int]] = {}
    for block in look.found:
        last[block.shortcut] = max(block.sum, last.get(block.shortcut, 0))
        sums.setdefault(block.sum, []).append(block.shortcut)
    branches = {branch.value for block in look.found for branch in block.branches}
    edges = {node for block in look.found for node in (block.sum, block.output, block.shortcut)} | branches
    skips: dict[int, Tensor] = {}

    def observe(index: int, node: fx.Node, value: Tensor) -> None:
        if index in last and mark and not value.requires_grad and value.is_floating_point():
            value.requires_grad_()
        if index in edges:
            seen.likes[index] = (value.shape, value.dtype, value.device)
            if value.requires_grad:
                seen.edges[index] = get_gradient_edge(value)
        plain = value.detach()
        for shortcut in sums.get(index, ()):
            skip = skips[shortcut] if shortcut in skips else plain[:0]
            seen.equal[index] = skip.shape == plain.shape and torch.equal(plain, skip)
            if last[shortcut] == index:
                del skips[shortcut]
        if index in last:
            skips[index] = plain.clone()  # it may be overwritten before the sum
        if index in branches:
            seen.finite[index] = bool(plain.isfinite().all())
            seen.nonzero[index] = bool(plain.any())

    training = look.mode == "train"
    outputs = replay(subject.model, subject.args, subject.kwargs, look.flow.trace, observe, training=training)
    seen.outputs = [output.detach() for output in outputs]
    return seen


def _at_zero(subject: _Subject, block: _Block, seen: _Observed, mode: str) -> Iterator[Check]:
    values = [branch.value for branch in block.branches]
    yield Check("identity", mode, seen.equal.get(block.sum, False), "the sum differs from the skip")
    yield Check("finite", mode, all(seen.finite.get(node, False) for node in values), "the branch is not finite")
    yield Check("nonzero", mode, all(seen.nonzero.get(node, False) for node in values), "the branch is zero")
    output = seen.edges.get(block.output)
    if output is None:
        yield Check("alive", mode, False, f"{', '.join(block.alphas)} gets no gradient: the block's output has none")
        return
    if block.shortcut in seen.edges:
        cotangent = seen.cotangent(block.output)
        (back,) = _grads(output, [seen.edges[block.shortcut]], cotangent)
        same = back is not None and torch.equal(back, cotangent)
        yield Check("vjp", mode, same, "the gradient passing back through the block is not the one coming in")
    grads = _grads(seen.edges[block.sum], [subject.named[name] for name in block.alphas], seen.cotangent(block.sum))
    dead = [name for name, grad in zip(block.alphas, grads, strict=True) if grad is None or not bool(grad.any())]
    yield Check("alive", mode, not dead, _several("gets no gradient", dead))
    still = [branch for branch in block.branches if not _has_live_weight(subject.model, branch, seen)]
    yield Check("branch-alive", mode, not still, "no weight of the branch gets a gradient from it")


def _has_live_weight(model: nn.Module, branch: _Branch, seen: _Observed) -> bool:
    """Whether a weight gets a gradient from its branch; true of a branch with frozen weights only."""
    own = [
        weight for name in branch.weights if (weight := _parameter(model, name)) is not None and weight.requires_grad
    ]
    edge = seen.edges.get(branch.value)
    if not own:
        return True
    if edge is None:
        return False
    cotangent = seen.cotangent(branch.value)
    grads = (_grads(edge, [weight], cotangent)[0] for weight in own)  # the last layer's mostly answers
    return any(grad is not None and bool(grad.any()) for grad in grads)


def _grads(edge: GradientEdge, inputs: list[Any], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        edge, inputs, cotangent, retain_graph=True, allow_unused=True
    )
    return found


# Sealed: nothing passes a zero gate


def _sealed(subject: _Subject, look: _Look, notes: list[str]) -> Iterator[Check]:
    """Whether the outputs that are reached through gates only stay when the branches' weights change.

    Weights that are also used outside of branches do not change.
    """
    weights = _branch_parameters(subject, look)
    if not weights:
        return
    nodes = look.flow.trace.root.outputs
    owners = {id(weight) for weight in weights}
    behind = [
        not any(
            id(parameter) in owners for node in _cone(look, [output], sealed=True) for parameter in _used(look, node)
        )
        for output in nodes
    ]
    if not any(behind):
        return
    with _zeroed(subject.named.values()):
        try:
            before = _outputs(subject)
            with _flipped(weights):
                after = _outputs(subject)
            if len(before) != len(nodes) or len(after) != len(nodes):
                return
            moved = [not _same(*pair) for pair, own in zip(zip(before, after, strict=True), behind, strict=True) if own]
            if any(moved) and not all(map(_same, before, _outputs(subject))):
                notes.append("the model does not give the same outputs twice: not checked whether gates seal branches")
                return
        except RuntimeError as error:
            notes.append(f"not checked whether gates seal branches: {one_line(error)}")
            return
    detail = f"{number(sum(moved), 'output')} changes with the branches' weights, with all gates at 0"
    yield Check("sealed", "eval", not any(moved), detail if any(moved) else number(len(moved), "output"))


def _branch_parameters(subject: _Subject, look: _Look) -> list[nn.Parameter]:
    """The parameters of gated branches that nothing else uses."""
    inside = frozenset(node for block in look.found for node in block.inside)
    gate = {id(parameter) for parameter in subject.named.values()}
    used: dict[int, nn.Parameter] = {}
    others: set[int] = set()
    for node in range(len(look.flow.nodes)):
        if look.flow.nodes[node].op == "get_attr":
            continue  # counted where it is used
        for parameter in _used(look, node):
            if node in inside:
                used[id(parameter)] = parameter
            else:
                others.add(id(parameter))
    return [p for key, p in used.items() if key not in others and key not in gate and p.is_floating_point()]


def _used(look: _Look, node: int) -> Iterator[nn.Parameter]:
    """The parameters that a node reads."""
    model, target = look.flow.trace.model, look.flow.nodes[node]
    if model is None:
        return
    if target.op == "call_module":
        module = _module(model, str(target.target))
        yield from module.parameters() if module is not None else ()
    for source in target.all_input_nodes:
        if source.op == "get_attr" and (parameter := _parameter(model, str(source.target))) is not None:
            yield parameter


@contextmanager
def _flipped(weights: list[nn.Parameter]) -> Iterator[None]:
    """Flip the signs of random rows: it changes what a branch computes, and is undone exactly without a copy."""
    done: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for weight in weights:
                rows = (*weight.shape[:1], *[1] * (weight.dim() - 1))
                signs = torch.where(torch.rand(rows, device=weight.device) < 0.5, -1, 1).to(weight.dtype)
                done.append((weight, signs))
                weight.mul_(signs)
        yield
    finally:
        with torch.no_grad():
            for weight, signs in done:
                weight.mul_(signs)


def _outputs(subject: _Subject) -> list[Tensor]:
    found, _ = _call(subject.model, subject.args, subject.kwargs, training=False, gradients=False)
    return [tensor.detach() for tensor in found]


def _call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, gradients: bool
) -> tuple[list[Tensor], dict[str, nn.Parameter]]:
    """The tensors that a model returns, from a fixed random state; it is left as it was."""
    with untouched(model, training=training, gradients=gradients):
        substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
        torch.manual_seed(_SEED)
        return list(tensors_in(model(*args, **kwargs))), dict(model.named_parameters())


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit-identical up to the payload of NaNs."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


# Equality and idempotence


def equality(original: nn.Module, preserved: nn.Module, example_inputs: Any = None) -> tuple[Check, ...]:
    """Whether a model converted with `alpha_init="preserve"` is the original: the first oracle.

    In eval and in train mode, from the same random state and with torch.nn's fused attention off on both sides: the
    outputs are bit-identical, and every parameter that both have gets the same gradient from a random cotangent, up
    to the order of summation. Both models are left as they were.

    Raises:
        ConversionError: one of the models raises on the example inputs in eval mode.
    """
    args, kwargs = resolve_inputs(original, example_inputs)
    checks: list[Check] = []
    for mode in MODES:
        checks += _equal_in(mode, original, preserved, lambda: _fresh((args, kwargs)))
    return tuple(checks)


def _fresh(inputs: Any) -> Any:
    """The inputs again, for a model that may overwrite them."""
    if isinstance(inputs, Tensor):
        return inputs.detach().clone().requires_grad_(inputs.requires_grad)
    if type(inputs) in (tuple, list):
        return type(inputs)([_fresh(item) for item in inputs])
    if type(inputs) is dict:
        return {key: _fresh(item) for key, item in inputs.items()}
    return inputs


def _equal_in(mode: str, original: nn.Module, preserved: nn.Module, inputs: Callable[[], Any]) -> Iterator[Check]:
    results = []
    for name, model in (("the original", original), ("the converted model", preserved)):
        args, kwargs = inputs()
        try:
            results.append(_call(model, args, kwargs, training=mode == "train", gradients=True))
        except Exception as error:  # whatever a model raises
            if mode == "eval":
                raise ConversionError(f"{name} raised on the example inputs: {one_line(error)}") from error
            said = f"not compared, {name} does not run: {one_line(error)}"
            yield Check("outputs", mode, len(results) == 0, said)
            return
    (left, ours), (right, theirs) = results
    if len(left) != len(right):
        yield Check("outputs", mode, False, f"{len(left)} and {len(right)} tensors are returned")
        return
    apart = [
        index for index, pair in enumerate(zip(left, right, strict=True)) if not _same(*(t.detach() for t in pair))
    ]
    names = _several("differs", [f"output {index}" for index in apart])
    yield Check("outputs", mode, not apart, names or f"{number(len(left), 'output')}, bit-identical")
    if not apart:
        yield _equal_gradients(mode, left, right, ours, theirs)


def _equal_gradients(
    mode: str, left: list[Tensor], right: list[Tensor], ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]
) -> Check:
    shared = [name for name, value in ours.items() if value.requires_grad and name in theirs]
    missing = [name for name in ours if name not in theirs]
    if missing:
        return Check("gradients", mode, False, _several("is missing in the converted model", missing))
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one.requires_grad]
    if not pairs or not shared:
        return Check("gradients", mode, True, "nothing to compare: no output has a gradient")
    torch_state = torch.random.fork_rng(devices=[])
    with torch_state:
        torch.manual_seed(_SEED)
        cotangents = [torch.randn_like(one) for one, _ in pairs]
    sides = [
        torch.autograd.grad(
            [pair[side] for pair in pairs], [names[name] for name in shared], cotangents, allow_unused=True
        )
        for side, names in ((0, ours), (1, theirs))
    ]
    largest = max((float(grad.abs().max()) for grad in sides[0] if grad is not None and grad.numel()), default=0.0)
    apart = [name for name, *grads in zip(shared, *sides, strict=True) if not _close(*grads, largest)]
    exact = sum(_both(*grads, torch.equal) for grads in zip(*sides, strict=True))
    detail = f"{number(len(shared), 'parameter')}, {exact} bit-identical, the others up to rounding"
    return Check("gradients", mode, not apart, _several("gets another gradient", apart) or detail)


def _both(one: Tensor | None, other: Tensor | None, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    return equal(one, other) if one is not None and other is not None else one is other


def _close(one: Tensor | None, other: Tensor | None, largest: float) -> bool:
    """Equal up to the order of summation; noise is measured by the largest gradient of all."""

    def near(left: Tensor, right: Tensor) -> bool:
        precision = torch.finfo(left.dtype).eps
        bound = precision**0.5 * float(left.abs().max()) + 100 * precision * largest if left.numel() else 0.0
        return left.shape == right.shape and bool(((left - right).abs() <= bound).all())

    return _both(one, other, near)


def idempotence(model: nn.Module, example_inputs: Any = None) -> Check:
    """Whether looking at a converted model again finds nothing to convert: the seventh oracle.

    Asked with the options of the conversion, if the model holds a record of them.

    Raises:
        ConversionError: the model cannot be captured.
    """
    record_ = modules.record(model)
    plan = detect(capture(model, example_inputs), record_.options if record_ is not None else None)
    left = [f"{site.path or 'the model'} ({site.span})" for site in plan.converted]
    detail = _several("would be converted", left) or f"{number(len(plan.of('gated')), 'block')} gated already"
    return Check("idempotence", "structure", not left, detail)
