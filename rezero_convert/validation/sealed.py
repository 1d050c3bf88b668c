"""Nothing passes a gate at 0: outputs behind gates do not change with the branches' weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..capture.recorded import one_line
from ..listing import number
from .looks import (
    Look,
    Subject,
    cone,
    module_at,
    parameter_at,
    several,
)
from .measured import gates_at_zero
from .results import Check
from .running import identical, run_model


def seals(subject: Subject, look: Look, notes: list[str]) -> Iterator[Check]:
    """Whether the outputs that are reached through gates only stay when the branches' weights change.

    Weights that are also used outside of branches do not change. An output that no input's values come to is not
    looked at: what it is may have come through Python, as the number of tokens that a router gave each expert does.
    """
    weights = _branch_parameters(subject, look)
    if not weights:
        return
    nodes = look.flow.trace.root.outputs
    owners = {id(weight) for weight in weights}
    computed = {node for node, constant in zip(look.flow.nodes, look.flow.constant, strict=True) if not constant}
    behind = [
        output in computed
        and not any(
            id(parameter) in owners for node in cone(look, [output], sealed=True) for parameter in _used(look, node)
        )
        for output in nodes
    ]
    if not any(behind):
        return
    with gates_at_zero(subject.closing):
        try:
            with _flipped(weights):
                after = _outputs(subject)
            if not len(look.outputs) == len(after) == len(nodes):
                return
            moved = [
                index for index, own in enumerate(behind) if own and not identical(look.outputs[index], after[index])
            ]
            if any(_is_finite(look.outputs[index]) and not _is_finite(after[index]) for index in moved):
                notes.append("not checked whether gates seal branches: with other weights the outputs are not finite")
                return
            if moved and not _repeats(subject, moved):
                notes.append("the model does not give the same outputs twice: not checked whether gates seal branches")
                return
        except Exception as error:  # whatever the model raises with other weights
            notes.append(f"not checked whether gates seal branches: {one_line(error)}")
            return
    changed = several("changes with the branches' weights at gates 0", [f"output {index}" for index in moved])
    yield Check("sealed", "eval", not moved, changed or number(sum(behind), "output"))


def _is_finite(output: Tensor) -> bool:
    return bool(output.isfinite().all())


def _repeats(subject: Subject, outputs: list[int]) -> bool:
    """Whether the model returns the same twice."""
    first, second = _outputs(subject), _outputs(subject)
    return all(identical(first[index], second[index]) for index in outputs)


def _branch_parameters(subject: Subject, look: Look) -> list[nn.Parameter]:
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


def _used(look: Look, node: int) -> Iterator[nn.Parameter]:
    """The parameters that a node reads."""
    model, target = look.flow.trace.model, look.flow.nodes[node]
    if model is None:
        return
    if target.op == "call_module":
        module = module_at(model, str(target.target))
        yield from module.parameters() if module is not None else ()
    for source in target.all_input_nodes:
        if source.op == "get_attr" and (parameter := parameter_at(model, str(source.target))) is not None:
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


def _outputs(subject: Subject) -> list[Tensor]:
    found, _ = run_model(subject.model, subject.args, subject.kwargs, training=False, gradients=True)
    return [tensor.detach() for tensor in found]
