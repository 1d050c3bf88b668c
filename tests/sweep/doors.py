"""Graphs of torch.fx against the module route: `python -m tests.sweep.doors [NAME ...]` from the repository's root.

Without names, one architecture of each of torchvision's files; with `all`, all of its classification models.

Every model goes through every door (a tracer that makes a graph module of it), is converted there, and compared with
the model converted as a module: as many blocks, by the same names where the tracer notes modules; preserve mode
bit-identical; validation; equal outputs and gradients (of the gates and the input) under equal random gates.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rezero_convert as rz
from rezero_convert.capture import capture

from . import zoos
from .made import NotRunnable

Door = Callable[[nn.Module, Tensor], nn.Module]

DOORS: dict[str, Door] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "rz.trace": lambda model, x: rz.trace(model, x),
}

NAMES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5",
    "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32",
)  # fmt: skip
"""torchvision's classification models, one for each architecture that a file of them has."""


@dataclass(frozen=True)
class Outcome:
    """One model through one door."""

    model: str
    door: str
    gates: int
    traced: bool
    """The tracer itself made a graph of it."""
    failures: tuple[str, ...]
    seconds: float


def outcomes(name: str, doors: Iterable[str] = tuple(DOORS)) -> Iterator[Outcome]:
    """A model through each door.

    Raises:
        NotRunnable: it does not run unconverted.
    """
    torch.manual_seed(0)
    made = zoos.ZOOS["torchvision"].make(name, "numbers")
    model, x = made.model.eval(), made.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = rz.convert(model, x, verify=False)
        for door in doors:
            start = time.monotonic()
            try:
                traced = DOORS[door](copy.deepcopy(model), x)
            except Exception as error:  # whatever a tracer raises
                yield Outcome(name, door, 0, False, (_told(error),), time.monotonic() - start)
                continue
            try:
                found = tuple(failures(module, traced, x, named=door != "make_fx"))
            except Exception as error:
                found = (_told(error),)
            yield Outcome(name, door, len(dict(rz.alphas(module))), True, found, time.monotonic() - start)


def failures(module: nn.Module, traced: nn.Module, x: Tensor, *, named: bool) -> Iterator[str]:
    """What does not hold of a graph module converted, against the same model converted as a module."""
    expected = _gates(module, x)
    graph = rz.convert(traced, x, verify=False)
    found = _gates(graph, x)
    if named and sorted(found) != sorted(expected):
        yield f"other names: {sorted(set(found) ^ set(expected))[:4]}"
    if len(found) != len(expected):
        yield f"{len(found)} gates instead of {len(expected)}"
        return
    preserved = rz.convert(traced, x, alpha_init="preserve", verify=False)
    with torch.no_grad():
        if not torch.equal(preserved(x), traced(x)):
            yield "preserve mode is not bit-identical"
    if expected:
        yield from rz.validate(graph, x).failures
    yield from _apart(copy.deepcopy(module), graph, x, dict(zip(expected, found, strict=True)))


def _gates(model: nn.Module, x: Tensor) -> list[str]:
    """The names of the gates in the order of their first use."""
    names = {name for name, _ in rz.alphas(model)}
    used = [str(node.target) for node in capture(model, x).graph.nodes if node.op == "get_attr"]
    return [name for name in dict.fromkeys(used) if name in names]


def _apart(module: nn.Module, graph: nn.Module, x: Tensor, names: dict[str, str]) -> Iterator[str]:
    """What differs under equal random gates."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = dict(rz.alphas(module)), dict(rz.alphas(graph))
    with torch.no_grad():
        for one, other in names.items():
            value = 0.5 + torch.rand(ours[one].shape, generator=generator)
            ours[one].copy_(value)
            theirs[other].copy_(value.reshape(theirs[other].shape))
    weights = torch.randn(module(x).shape, generator=generator)
    left = _with_gradients(module, x, [ours[one] for one in names], weights)
    right = _with_gradients(graph, x, [theirs[other] for other in names.values()], weights)
    for what, one, other in zip(("output", "gradient of the input", *names), left, right, strict=True):
        if not torch.allclose(one.reshape(other.shape), other, rtol=1e-3, atol=1e-4 * float(one.abs().max())):
            yield f"{what} differs under equal random gates"


def _with_gradients(model: nn.Module, x: Tensor, gates: list[nn.Parameter], weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [x, *gates])]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def table(rows: Iterable[Outcome]) -> str:
    """Per door how many of how many hold, then every failure, as Markdown."""
    rows = list(rows)
    lines = ["| door | traced | hold | share | gates |", "|---|---|---|---|---|"]
    for door in DOORS:
        own = [one for one in rows if one.door == door]
        traced = [one for one in own if one.traced]
        held = [one for one in traced if not one.failures]
        share = f"{100 * len(held) / len(traced):.0f} %" if traced else "-"
        gates = sum(one.gates for one in held)
        lines.append(f"| {door} | {len(traced)}/{len(own)} | {len(held)}/{len(traced)} | {share} | {gates} |")
    for one in rows:
        lines += [f"{one.model}, {one.door}: {failure}" for failure in one.failures]
    return "\n".join(lines)


def main(names: list[str]) -> int:
    rows: list[Outcome] = []
    chosen = zoos.classifiers() if names == ["all"] else names or NAMES
    for name in chosen:
        try:
            for one in outcomes(name):
                rows.append(one)
                print(f"{one.model:20} {one.door:15} {one.gates:3} gates {one.seconds:6.1f} s  "
                      f"{'; '.join(one.failures) or 'ok'}", flush=True)  # fmt: skip
        except NotRunnable as error:
            print(f"{name}: does not run: {error}", file=sys.stderr)
    print(table(rows))
    return int(any(one.failures for one in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
