"""Does a converted model hold what ReZero promises? Measured on its own activations and gradients.

For every block, with all gates set to 0 (and restored afterwards), in eval and in train mode: the sum equals the skip
(identity), the gradient that leaves the block equals the one that comes in (VJP identity: a ReLU left after the add
passes the first check and fails this one), the branch is finite and not zero, and the gate gets a gradient from a
random cotangent at the block's own output (liveness). With random gates: the branch's weights get a gradient. For the
whole: every gate that is registered is read as the gate of a branch, every block of the plan is there, every dropped
norm is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .capture import check_model
from .capture.inputs import resolve_inputs
from .capture.recorded import one_line, record, record_on, replay
from .capture.trace import Trace
from .detect import blocks as detected
from .detect import gates
from .detect.flow import Flow, flow
from .errors import ConversionError
from .plan import Plan, Site, as_dict
from .rewrite import modules


@dataclass(frozen=True, slots=True)
class Check:
    """One property of one block (or, with `path` "", of the whole model)."""

    name: str
    """"identity", "vjp", "finite", "nonzero", "alive", "branch-alive", "gated", "read", "norm-gone", ..."""
    mode: str
    """"eval", "train" or "structure"."""
    ok: bool
    detail: str = ""
    choice: bool = False
    """Does not hold, but by the plan: a post-norm or activation that was kept."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The checks of one block."""

    path: str
    alphas: tuple[str, ...]
    where: str
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
        own = [f"{c.name}: {c.detail}" for c in self.checks if not (c.ok or c.choice)]
        blocks = [
            f"{block.path or 'the model'} ({', '.join(block.alphas)}, {block.where}): {check.name} ({check.mode}): {check.detail}"
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
        table = Table(title=f"{self.title}: {'holds' if self.ok else 'DOES NOT HOLD'}", title_justify="left")
        names = list(dict.fromkeys(check.name for block in self.blocks for check in block.checks))
        table.add_column("block", overflow="fold")
        table.add_column("gate", overflow="fold")
        for name in names:
            table.add_column(name, justify="center")
        for block in self.blocks:
            marks = []
            for name in names:
                own = [check for check in block.checks if check.name == name]
                marks.append(_mark(own))
            table.add_row(block.path or "(root)", ", ".join(block.alphas), *marks)
        yield table
        for check in self.checks:
            yield f"{'ok' if check.ok else 'FAILED'}  {check.name}: {check.detail}"
        for line in self.failures:
            yield f"FAILED  {line}"
        if self.asleep:
            yield f"asleep until the second step, behind another zero gate: {', '.join(self.asleep)}"
        yield from self.notes


def _mark(checks: list[Check]) -> str:
    if not checks:
        return "-"
    if all(check.ok for check in checks):
        return "ok"
    return "by choice" if all(check.ok or check.choice for check in checks) else "FAILED"


@dataclass(frozen=True, slots=True)
class _Block:
    """A gated block as found in a trace of the converted model."""

    path: str
    where: str
    alphas: tuple[str, ...]
    sum: int
    output: int
    shortcut: int
    branches: tuple[int, ...]
    """Values of the branches before their gates."""
    weights: tuple[str, ...]
    partial: bool
    """A branch has no gate."""


@dataclass
class _Observed:
    """What one run with real numbers showed, by node."""

    edges: dict[int, GradientEdge] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    equal: dict[int, bool] = field(default_factory=dict)
    finite: dict[int, bool] = field(default_factory=dict)
    nonzero: dict[int, bool] = field(default_factory=dict)


def validate(model: nn.Module, example_inputs: Any = None) -> Validation:
    """Check a converted model, block by block; works at any value of the gates, and leaves the model as it was.

    Args:
        model: converted by `convert`, from a converted file, or hand-written with gates of one number.
        example_inputs: as for `convert`.

    Returns:
        The result; `.ok` is relative to the plan: what was kept by choice does not count as a failure.

    Raises:
        ConversionError: the model cannot be captured, or has no gate at all.
    """
    check_model(model)
    plan = modules.record(model)
    args, kwargs = resolve_inputs(model, example_inputs)
    named = dict(modules.alphas(model))
    structure: list[Check] = []
    results: dict[tuple[str, tuple[str, ...]], tuple[str, list[Check]]] = {}
    notes: list[str] = []
    asleep: tuple[str, ...] = ()
    meta = any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    for mode in ("eval", "train"):
        try:
            trace = _trace(model, args, kwargs, mode, meta=meta)
        except ConversionError as error:
            if mode == "eval":
                raise
            notes.append(f"not checked in train mode, where the model does not run: {error}")
            continue
        facts = flow(trace)
        found = list(_gated(facts, named))
        named = named or {name: _parameter(model, name) for block in found for name in block.alphas}
        structure += _structure(trace, found, named, plan, mode)
        observed = None if meta else _observe(model, args, kwargs, facts, found, named, mode)
        for block in found:
            key = (block.path, block.alphas)
            checks = results.setdefault(key, (block.where, []))[1]
            checks.append(Check("gated", mode, not block.partial, "a branch of the block has no gate"))
            if observed is not None:
                checks += observed[0].get(block.sum, ())
        if observed is not None:
            asleep = asleep or observed[1]
    if not named:
        raise ConversionError(f"{type(model).__qualname__}: there is no gate to validate: convert the model first")
    if meta:
        notes.append("on meta tensors only the structure can be checked")
    blocks = [
        BlockResult(path, alphas, where, _chosen(plan, path, checks))
        for (path, alphas), (where, checks) in results.items()
    ]
    return Validation(type(model).__qualname__, tuple(blocks), tuple(structure), asleep, tuple(notes))


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, *, meta: bool) -> Trace:
    """The graph of a real run: on fake tensors a model may take another path (transformers skips checks there)."""
    if meta:
        return record(model, args, kwargs, training=mode == "train")
    try:
        return record_on("real", model, args, kwargs, training=mode == "train")
    except ConversionError:
        raise
    except Exception as error:  # whatever the model raises
        raise ConversionError(f"the model raised on the example inputs: {one_line(error)}") from error


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    found = model.get_parameter(name)
    return found


def _gated(flow: Flow, named: dict[str, nn.Parameter]) -> Iterator[_Block]:
    """The blocks of a trace with a gate on at least one branch."""
    known = {id(parameter) for parameter in named.values()}
    chosen, _, nested = detected.find(flow)
    for block in [*chosen, *(one.block for one in nested)]:
        found = [gates.existing(flow, branch) for branch in block.branches]
        own = [gate for gate in found if gate is not None and gate.kind != "input" and _is_known(flow, gate, known)]
        if own:
            yield _block(flow, block, own)


def _is_known(flow: Flow, gate: gates.Found, known: set[int]) -> bool:
    """Whether a gate is one of the registered ones; in a model without registration, any gate of one number."""
    parameter = gates.parameter(flow, gate.parameter)
    return id(parameter) in known if known else gate.kind == "scalar"


def _block(flow: Flow, block: detected.Block, own: list[gates.Found]) -> _Block:
    frames = flow.origin(block.sum.node).frames
    before = [source for gate in own for source in flow.inputs[gate.node] if not flow.constant[source]]
    weights = {
        path
        for branch in block.branches
        for node in branch.region[1:]
        if detected.has_weight(flow, node)
        for path in _parameters(flow, node)
    }
    return _Block(
        path=frames[-1].owner or "" if frames else "",
        where=str(frames[0].span) if frames else "",
        alphas=tuple(gate.parameter for gate in own),
        sum=block.sum.node,
        output=_output(flow, block.sum.node),
        shortcut=block.shortcut.value,
        branches=tuple(before),
        weights=tuple(sorted(weights)),
        partial=len(own) < len(block.branches),
    )


def _parameters(flow: Flow, node: int) -> Iterator[str]:
    target = flow.nodes[node]
    if target.op == "call_module" and flow.trace.model is not None:
        module = flow.trace.model.get_submodule(str(target.target))
        yield from (f"{target.target}.{name}" for name, value in module.named_parameters() if value.dim() > 1)
    else:
        yield from (path for source in flow.inputs[node] if (path := flow.parameter(source)) is not None)


def _output(flow: Flow, node: int) -> int:
    """The block's output: the sum, or the activation that its module applies to it."""
    users = flow.users[node]
    call = detected.owner_call(flow, node)
    if len(users) == 1 and flow.facts[users[0]].kind == "activation":
        step = flow.steps.get(users[0])
        parent = step.parent if step is not None else flow.origin(users[0]).call
        if parent is call:
            return users[0]
    return node


def _structure(
    trace: Trace, found: list[_Block], named: dict[str, nn.Parameter], plan: Plan | None, mode: str
) -> Iterator[Check]:
    """What the graph alone tells: gates read, planned blocks present, dropped norms gone."""
    gating = {name for block in found for name in block.alphas}
    unread = sorted(name for name in named if name not in gating)
    yield Check(
        "read", mode, not unread, _several("gates no branch", unread) or f"all {len(named)} gates gate a branch"
    )
    if plan is None:
        return
    planned = {_join(site.path, name) for site in plan.converted for gate in site.gates for name in gate.parameters()}
    missing = sorted(planned - gating - set(unread))
    yield Check("planned", mode, not missing, _several("is not registered", missing) or f"all {len(planned)} are there")
    called = {str(node.target) for node in trace.graph.nodes if node.op == "call_module"}
    called |= {call.path for call in trace.calls}
    dropped = {norm.path for site in plan.converted for norm in site.norms if norm.action == "bypass" and norm.path}
    left = sorted(dropped & called)
    yield Check(
        "norm-gone", mode, not left, _several("was to go but is called", left) or f"{len(dropped)} norms dropped"
    )


def _several(text: str, names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {text}" if names else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _chosen(plan: Plan | None, path: str, checks: list[Check]) -> tuple[Check, ...]:
    """Mark what fails because the plan kept a norm or an activation behind the add."""
    kept = plan is not None and any(site.path == path and _keeps_tail(site) for site in plan.converted)
    if not kept:
        return tuple(checks)
    return tuple(
        Check(check.name, check.mode, check.ok, check.detail, choice=not check.ok and check.name == "vjp")
        for check in checks
    )


def _keeps_tail(site: Site) -> bool:
    return (site.activation is not None and site.activation.action == "keep") or any(
        norm.position == "post" and norm.action == "keep" for norm in site.norms
    )


# With real numbers


def _observe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flow: Flow,
    found: list[_Block],
    named: dict[str, nn.Parameter],
    mode: str,
) -> tuple[dict[int, list[Check]], tuple[str, ...]]:
    """Run with real numbers, gates at 0 and (in eval mode) at random; the checks by block, and the gates asleep."""
    checks: dict[int, list[Check]] = {block.sum: [] for block in found}
    with _gates_at(named.values(), zero=True):
        seen, outputs = _run(model, args, kwargs, flow, found, mode)
        for block in found:
            checks[block.sum] += _at_zero(block, seen, named, mode)
        asleep = _asleep(outputs, named) if mode == "eval" else ()
        del seen, outputs  # a run's activations; the next run has its own
    if mode == "eval":
        with _gates_at(named.values(), zero=False):
            seen, _ = _run(model, args, kwargs, flow, found, mode)
            for block in found:
                checks[block.sum] += _at_random(model, block, seen, mode)
    return checks, asleep


@contextmanager
def _gates_at(parameters: Any, *, zero: bool) -> Iterator[None]:
    """Set gates to 0, or to random values away from it, and put back what was there."""
    saved = [(parameter, parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, _, _ in saved:
                parameter.requires_grad_(True)
                parameter.zero_() if zero else parameter.copy_(0.1 + 0.1 * torch.rand_like(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value, required in saved:
                parameter.copy_(value)
                parameter.requires_grad_(required)


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], flow: Flow, found: list[_Block], mode: str
) -> tuple[_Observed, list[torch.Tensor]]:
    """One run with gradients, watching the nodes that matter."""
    seen = _Observed()
    shortcuts = {block.shortcut for block in found}
    watched = {node for block in found for node in (block.sum, block.output, block.shortcut)}
    branches = {node for block in found for node in block.branches}
    sums = {block.sum: block.shortcut for block in found}

    def observe(index: int, node: fx.Node, value: torch.Tensor) -> None:
        if index in watched and value.requires_grad:
            seen.edges[index] = get_gradient_edge(value)
            seen.values.setdefault(index, torch.empty((0,), dtype=value.dtype).new_empty(0))
        if index in shortcuts or index in watched:
            seen.values[index] = value.detach().clone()
        if index in sums:
            skip = seen.values.get(sums[index])
            seen.equal[index] = skip is not None and skip.shape == value.shape and torch.equal(value.detach(), skip)
        if index in branches:
            seen.finite[index] = bool(value.detach().isfinite().all())
            seen.nonzero[index] = bool(value.detach().any())

    outputs = replay(model, args, kwargs, flow.trace, observe, training=mode == "train")
    return seen, outputs


def _at_zero(block: _Block, seen: _Observed, named: dict[str, nn.Parameter], mode: str) -> Iterator[Check]:
    detail = "the sum differs from the skip"
    yield Check("identity", mode, seen.equal.get(block.sum, False), detail)
    yield Check(
        "finite", mode, all(seen.finite.get(node, False) for node in block.branches), "the branch is not finite"
    )
    yield Check("nonzero", mode, all(seen.nonzero.get(node, False) for node in block.branches), "the branch is zero")
    output = seen.edges.get(block.output)
    if output is None:
        return
    cotangent = torch.randn_like(seen.values[block.output])
    if block.shortcut in seen.edges:
        (back,) = torch.autograd.grad(
            output, seen.edges[block.shortcut], cotangent, retain_graph=True, allow_unused=True
        )
        same = back is not None and torch.equal(back, cotangent)
        yield Check("vjp", mode, same, "the gradient passing back through the block is not the one coming in")
    own = [named[name] for name in block.alphas]
    grads = torch.autograd.grad(seen.edges[block.sum], own, cotangent, retain_graph=True, allow_unused=True)
    dead = [name for name, grad in zip(block.alphas, grads, strict=True) if grad is None or not bool(grad.any())]
    yield Check("alive", mode, not dead, _several("gets no gradient", dead))


def _at_random(model: nn.Module, block: _Block, seen: _Observed, mode: str) -> Iterator[Check]:
    output = seen.edges.get(block.sum)
    own = [parameter for name in block.weights if (parameter := model.get_parameter(name)).requires_grad]
    if output is None or not own:
        return
    cotangent = torch.randn_like(seen.values[block.sum])
    grads = torch.autograd.grad(output, own, cotangent, retain_graph=True, allow_unused=True)
    some = any(grad is not None and bool(grad.any()) for grad in grads)
    yield Check("branch-alive", mode, some, "no weight of the branch gets a gradient once its gate has moved")


def _asleep(outputs: list[torch.Tensor], named: dict[str, nn.Parameter]) -> tuple[str, ...]:
    """The gates that get no gradient from the model's outputs."""
    live = [output for output in outputs if output.requires_grad]
    if not live:
        return ()
    cotangents = [torch.randn_like(output) for output in live]
    grads = torch.autograd.grad(live, list(named.values()), cotangents, retain_graph=True, allow_unused=True)
    return tuple(name for name, grad in zip(named, grads, strict=True) if grad is None or not bool(grad.any()))
