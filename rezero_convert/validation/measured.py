"""The checks that need a run with real numbers, with all gates at 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..capture.recorded import one_line, record_on, replay
from ..errors import ConversionError
from ..listing import compact
from ..plan import Scale
from .looks import (
    Block,
    Branch,
    Look,
    Subject,
    look_at,
    parameter_at,
    several,
)
from .results import Check
from .running import SEED


class _NoGradients(RuntimeError):
    """The model runs, but what it computes cannot be differentiated: it overwrites what the gradient needs."""


MORTAL = ("nonzero", "alive", "branch-alive")
_RETRIES = 8  # stochastic depth may silence a whole branch in one run


@dataclass(slots=True)
class _Observed:
    """What one run showed, by node."""

    outputs: list[Tensor] = field(default_factory=list)
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    """Where the gradients of a value start."""
    ends: dict[int, GradientEdge] = field(default_factory=dict)
    """Where those of a skip arrive."""
    forward_only: str = ""
    """Why the run was without gradients."""
    paused: set[int] = field(default_factory=set)
    """Sums made with gradients turned off."""
    likes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    equal: dict[int, bool] = field(default_factory=dict)
    finite: dict[int, bool] = field(default_factory=dict)
    nonzero: dict[int, bool] = field(default_factory=dict)
    """Of branches and skips."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Of all that a block's form speaks of, where that was asked for."""

    late: dict[int, Tensor] = field(default_factory=dict)
    """Made with gradients turned off: in an `autograd.Function`, their history comes when that returns."""

    def link(self, node: int, value: Tensor) -> None:
        self.likes[node] = (value.shape, value.dtype, value.device)
        if value.requires_grad:
            self.edges[node] = get_gradient_edge(value)
        elif not torch.is_grad_enabled():
            self.late[node] = value

    def catch_up(self) -> None:
        for node in [node for node, value in self.late.items() if value.requires_grad]:
            self.edges[node] = get_gradient_edge(self.late.pop(node))

    def cotangent(self, node: int) -> Tensor:
        shape, dtype, device = self.likes[node]
        return torch.randn(shape, dtype=dtype, device=device)


def with_numbers(subject: Subject, look: Look, notes: list[str]) -> Look | None:
    """The look with its blocks' checks; on real tensors the model may have gone another way than in the trace."""
    try:
        with gates_at_zero(subject.closing):
            try:
                found = _measure(subject, look, notes)
            except ConversionError:  # on fake tensors transformers skips some of its branches
                training = look.mode == "train"
                trace = record_on("real", subject.model, subject.args, subject.kwargs, training=training)
                found = _measure(subject, look_at(subject, look.mode, trace), notes)
        _measure_forms(subject, found)
        return found
    except Exception as error:  # whatever the model raises
        said = str(error) if isinstance(error, ConversionError) else one_line(error)
        if look.mode == "eval":
            raise ConversionError(f"the model raised on the example inputs: {said}") from error
        notes.append(f"not checked in train mode, where the model does not run: {said}")
        return None


def _measure(subject: Subject, look: Look, notes: list[str]) -> Look:
    seen = _run(subject, look)
    try:
        look.checks = {block.sum: list(_at_gates(subject, block, seen, look.mode)) for block in look.found}
    except _NoGradients as error:
        if look.mode == "train":
            raise
        look.undifferentiable = str(error)
        look.checks = {block.sum: list(_of_values(block, seen, look.mode)) for block in look.found}
        notes.append(f"no gradients were checked in eval mode, where the model cannot be differentiated: {error}")
    still = [block.path for block in look.found if not seen.nonzero.get(block.shortcut, True) and _excuse(look, block)]
    if still:
        notes.append(f"liveness was not checked where the stream is zero before the block: {compact(still)}")
    blind = [block.path for block in look.found if block.output in seen.edges and block.shortcut not in seen.ends]
    if blind:
        notes.append(f"the gradient through the block was not checked, the skip has none: {compact(blind)}")
    paused = [block.path for block in look.found if block.sum in seen.paused]
    if paused:
        why = seen.forward_only or f"the model turns them off around {compact(paused)}"
        notes.append(f"no gradients were checked: {why}")
    look.outputs = seen.outputs
    del seen  # the run's activations
    if look.mode == "train":
        _retry(subject, look)
    return look


def _measure_forms(subject: Subject, look: Look) -> None:
    """Where a block is more than `x + a * F(x)`: whether it computes what its method says, at random gates.

    There also the gates are alive whose map has no slope at 0.
    """
    formed = [block for block in look.found if block.skip != Scale() or _formed(block)]
    if not formed:
        return
    with gates_at(subject.named.values(), _random):
        seen = _run(subject, look, forms=frozenset(block.sum for block in formed))
        for block in formed:
            check = Check("form", look.mode, _holds(subject, block, seen), "the sum is not what the method says")
            checks = [*look.checks[block.sum], check]
            if any(branch.scale is not None and branch.scale.map for branch in block.branches):
                again = {one.name: one for one in _at_gates(subject, block, seen, look.mode)}
                checks = [again["alive"] if one.name == "alive" and "alive" in again else one for one in checks]
            look.checks[block.sum] = checks


def _formed(block: Block) -> bool:
    return any(branch.scale not in (None, Scale()) for branch in block.branches)


def _holds(subject: Subject, block: Block, seen: _Observed) -> bool:
    """Whether products and sum are what `plan.Scale` says, up to rounding."""
    for branch, name in zip(block.branches, block.alphas, strict=True):
        if branch.scale is not None and branch.value != branch.product:
            value, product = seen.values[branch.value], seen.values[branch.product]
            if not _near(product, _factor(branch.scale, subject.named[name]) * value):
                return False
    if block.skip == Scale():
        return True
    (branch,) = block.branches
    left = block.skip.factor * seen.values[block.shortcut]
    if block.skip.map:
        left = _factor(block.skip, subject.named[block.alphas[0]]) * seen.values[block.shortcut]
    return not branch.sign or _near(seen.values[block.sum], left + branch.sign * seen.values[branch.term])


def _factor(scale: Scale, alpha: Tensor) -> Tensor:
    """`factor * map(alpha)`, written again for the check."""
    value = alpha.detach().double()
    value = value.clamp(min=0) if scale.map == "relu" else 1 - value if scale.map == "complement" else value
    return scale.factor * value.reshape(-1, *[1] * scale.trailing)


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding in the precision of the first."""
    if one.shape != other.shape:
        return False
    bound = 16 * torch.finfo(one.dtype).eps * float(other.abs().max()) if other.numel() else 0.0
    return bool(((one.double() - other.double()).abs() <= bound).all())


def _excuse(look: Look, block: Block) -> bool:
    """Leave out what a block failed of the checks of liveness; whether that was anything."""
    checks = look.checks[block.sum]
    look.checks[block.sum] = [check for check in checks if check.ok or check.name not in MORTAL]
    return len(look.checks[block.sum]) < len(checks)


def _retry(subject: Subject, look: Look) -> None:
    """Measure again what stochastic depth may have silenced in one run: alive once is alive."""
    for seed in range(SEED + 1, SEED + 1 + _RETRIES):
        dead = {c.name for checks in look.checks.values() for c in checks if not c.ok and c.name in MORTAL}
        silent = [block for block in look.found if any(not c.ok and c.name in MORTAL for c in look.checks[block.sum])]
        if not dead or not all(_is_random(look, block) for block in silent):
            return
        try:
            seen = _run(subject, look, seed)
        except ConversionError:  # it goes another way: layers are dropped at random
            return
        for block in silent:
            again = {check.name: check for check in _at_gates(subject, block, seen, look.mode)}
            look.checks[block.sum] = [
                again[check.name] if check.name in MORTAL and check.name in again and not check.ok else check
                for check in look.checks[block.sum]
            ]
        del seen


def _is_random(look: Look, block: Block) -> bool:
    """Whether a branch draws random numbers: dropout, stochastic depth."""
    nodes = _cone_inside(look, block)
    return any(look.flow.facts[node].kind == "dropout" or look.flow.name(node) in _RANDOM for node in nodes)


_RANDOM = frozenset(
    {"bernoulli", "rand", "rand_like", "randn", "randn_like", "new_empty", "empty", "uniform", "normal"}
)


def _cone_inside(look: Look, block: Block) -> set[int]:
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


def gates_at_zero(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Set gates to 0, able to get a gradient; and put back what was there."""
    return gates_at(parameters, torch.zeros_like)


def _random(gate: Tensor) -> Tensor:
    return 0.5 + torch.rand_like(gate)


@contextmanager
def gates_at(parameters: Iterable[nn.Parameter], values: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Set gates, able to get a gradient; and put back what was there."""
    saved = [(parameter, parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, _, _ in saved:
                parameter.requires_grad_(True)
                parameter.copy_(values(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value, required in saved:
                parameter.copy_(value)
                parameter.requires_grad_(required)


def _run(subject: Subject, look: Look, seed: int = SEED, forms: frozenset[int] = frozenset()) -> _Observed:
    """One run with gradients, watching the nodes that matter; the values of the blocks with these sums are kept."""
    torch.manual_seed(seed)
    try:
        return _watch(subject, look, forms, mark=True)
    except RuntimeError:  # an input that is overwritten in place must not require a gradient
        torch.manual_seed(seed)
        try:
            return _watch(subject, look, forms, mark=False)
        except NotImplementedError as error:  # FlexAttention has no backward on a CPU, and does not begin
            torch.manual_seed(seed)
            seen = _watch(subject, look, forms, mark=False, gradients=False)
            seen.forward_only = one_line(error)
            return seen


def _spoken_of(look: Look, forms: frozenset[int]) -> frozenset[int]:
    """The nodes that the forms of the blocks with these sums speak of."""
    blocks = [block for block in look.found if block.sum in forms]
    inside = {node for block in blocks for one in block.branches for node in (one.value, one.product, one.term)}
    return frozenset(inside | {node for block in blocks for node in (block.sum, block.shortcut)})


def _cuts(look: Look) -> frozenset[int]:
    """The skips outside of all branches: there the graph of gradients is cut into one for each block.

    Else each check would walk the graph from its block to the model's inputs: n blocks would cost n * n.
    """
    inside = frozenset[int]().union(*(block.inside for block in look.found))
    return frozenset(block.shortcut for block in look.found) - inside


def _arrival(value: Tensor, *, mark: bool, cut: bool) -> GradientEdge | None:
    """Where the gradient of a skip arrives; with `mark` made able to get one, with `cut` of no graph before it."""
    if mark and value.is_floating_point():
        if cut and value.grad_fn is not None and not value._is_view():  # views cannot be detached in place
            value.detach_()
        if not value.requires_grad:
            value.requires_grad_()
    return get_gradient_edge(value) if value.requires_grad and torch.is_grad_enabled() else None


def _watch(subject: Subject, look: Look, forms: frozenset[int], *, mark: bool, gradients: bool = True) -> _Observed:
    seen = _Observed()
    last: dict[int, int] = {}
    sums: dict[int, list[Block]] = {}
    kept = _spoken_of(look, forms)
    cuts = _cuts(look)
    for block in look.found:
        last[block.shortcut] = max(block.sum, last.get(block.shortcut, 0))
        sums.setdefault(block.sum, []).append(block)
    branches = {branch.value for block in look.found for branch in block.branches}
    edges = {node for block in look.found for node in (block.sum, block.output)} | branches
    skips: dict[int, Tensor] = {}

    def observe(index: int, node: fx.Node, value: Tensor) -> None:
        if index in sums and not torch.is_grad_enabled():
            seen.paused.add(index)
        if index in edges:
            seen.link(index, value)
        if index in last and (edge := _arrival(value, mark=mark, cut=index in cuts)) is not None:
            seen.ends[index] = edge
        seen.catch_up()
        plain = value.detach()
        if index in kept:
            seen.values[index] = plain.clone()
        for block in sums.get(index, ()):
            skip = skips[block.shortcut] if block.shortcut in skips else plain[:0]
            seen.equal[index] = skip.shape == plain.shape and torch.equal(plain, block.skip.factor * skip)
            if last[block.shortcut] == index:
                del skips[block.shortcut]
        if index in last:
            skips[index] = plain.clone()  # it may be overwritten before the sum
            seen.nonzero[index] = bool(plain.any())
        if index in branches:
            seen.finite[index] = bool(plain.isfinite().all())
            seen.nonzero[index] = bool(plain.any())

    training = look.mode == "train"
    outputs = replay(
        subject.model, subject.args, subject.kwargs, look.flow.trace, observe, training=training, gradients=gradients
    )
    seen.outputs = [output.detach() for output in outputs]
    return seen


def _of_values(block: Block, seen: _Observed, mode: str) -> Iterator[Check]:
    values = [branch.value for branch in block.branches]
    finite = all(seen.finite.get(node, False) for node in values)
    why = "" if finite else ": the branch is not finite, so that 0 times it is not 0 (are all weights initialized?)"
    yield Check("identity", mode, seen.equal.get(block.sum, False), f"the sum differs from the skip{why}")
    yield Check("finite", mode, finite, "the branch is not finite")
    yield Check("nonzero", mode, all(seen.nonzero.get(node, False) for node in values), "the branch is zero")


def _at_gates(subject: Subject, block: Block, seen: _Observed, mode: str) -> Iterator[Check]:
    yield from _of_values(block, seen, mode)
    if block.sum in seen.paused:
        return
    output = seen.edges.get(block.output)
    if output is None:
        yield Check("alive", mode, False, f"{', '.join(block.alphas)} gets no gradient: the block's output has none")
        return
    if block.shortcut in seen.ends:
        cotangent = seen.cotangent(block.output)
        (back,) = _grads(output, [seen.ends[block.shortcut]], cotangent)
        same = back is not None and torch.equal(back, block.skip.factor * cotangent)
        yield Check("vjp", mode, same, "the gradient passing back through the block is not the one coming in")
    grads = _grads(seen.edges[block.sum], [subject.named[name] for name in block.alphas], seen.cotangent(block.sum))
    dead = [name for name, grad in zip(block.alphas, grads, strict=True) if grad is None or not bool(grad.any())]
    yield Check("alive", mode, not dead, several("gets no gradient", dead))
    still = [branch for branch in block.branches if not _has_live_weight(subject.model, branch, seen)]
    yield Check("branch-alive", mode, not still, "no weight of the branch gets a gradient from it")


def _has_live_weight(model: nn.Module, branch: Branch, seen: _Observed) -> bool:
    """Whether a weight gets a gradient from its branch; true of a branch with frozen weights only."""
    own = [
        weight for name in branch.weights if (weight := parameter_at(model, name)) is not None and weight.requires_grad
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
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            edge, inputs, cotangent, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        raise _NoGradients(one_line(error)) from error
    return found
