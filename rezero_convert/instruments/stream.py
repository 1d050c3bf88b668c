"""A residual stream of a model as one run shows it: where it begins and ends, and what each block adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..capture import check_model
from ..capture.guard import untouched
from ..capture.inputs import resolve_inputs
from ..capture.recorded import one_line, record_on, replay
from ..detect import detect
from ..detect.blocks import Block, owner_call
from ..detect.flow import Flow, around, flow
from ..errors import ConversionError
from ..pictures.lines import found, lines
from ..plan import Site
from ..rewrite.modules import record
from ..validation.looks import output_of
from ..validation.running import SEED


@dataclass(frozen=True, slots=True)
class BlockFlow:
    """What one block does to the stream, over all elements of its tensors."""

    path: str
    """Of the module that owns the add."""
    skip_variance: float
    """Of the operand that carries the skip."""
    branch_variance: float
    """Of all that is added to it: the gated branches."""
    variance: float
    """Of the block's output."""
    share: float
    """|b|^2 / (|s|^2 + |b|^2) with b what is added and s the skip: 0 where the block is the identity, 1/2 where both
    weigh the same."""


@dataclass(frozen=True, slots=True)
class End:
    """The stream at its beginning or end, in autograd's graph."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Stream:
    """One run of a stream; holds autograd's graph of it."""

    begin: End
    """What the first block's skip and branches are computed from."""
    end: End
    """The last block's output: the sum, or the post-norm or activation that its module applies to it."""
    blocks: tuple[BlockFlow, ...]
    of: int
    """How many streams the model has."""


def run_stream(model: nn.Module, inputs: Any, number: int | None, *, training: bool) -> Stream:
    """Run `model` once and watch one of its residual streams; the model is left as it was.

    Args:
        model: converted or not.
        inputs: as for `convert`.
        number: which stream, in the order of their first blocks; None for the one with most blocks.
        training: in train mode.

    Raises:
        ConversionError: the model cannot be run, has no residual block or no such stream, or the end of the stream
            does not depend on its beginning by way of gradients.
    """
    check_model(model)
    args, kwargs = resolve_inputs(model, inputs)
    try:
        with untouched(model), sdpa_kernel(SDPBackend.MATH):  # fused kernels cannot be differentiated twice
            torch.manual_seed(SEED)
            trace = record_on("real", model, args, kwargs, training=training)
            plan, seen = detect(trace), flow(trace)
            streams = [[knot.block for knot in line.knots if knot.block is not None] for line in lines(found(seen))]
            blocks = _chosen([blocks for blocks in streams if blocks], number)
            done = record(model)
            sites = (*(done.sites if done is not None else ()), *plan.sites)
            last = blocks[-1].sum.node
            ends = (blocks[0].skip, output_of(seen, last, _site(seen, last, sites)))
            torch.manual_seed(SEED)
            watched = _Watch(blocks, ends)
            replay(model, args, kwargs, trace, watched, training=training)
    except ConversionError:
        raise
    except Exception as error:  # whatever the model raises
        raise ConversionError(f"the model raised on the inputs: {one_line(error)}") from error
    if any(node not in watched.ends for node in ends):
        raise ConversionError("no gradient passes along the stream: its values are integers, or made without gradients")
    rows = tuple(watched.row(seen, block) for block in blocks)
    return Stream(watched.ends[ends[0]], watched.ends[ends[1]], rows, len(streams))


def _chosen(streams: list[list[Block]], number: int | None) -> list[Block]:
    if not streams:
        raise ConversionError("the model has no residual block (audit() says why)")
    if number is None:
        return max(streams, key=len)
    if not 0 <= number < len(streams):
        raise ConversionError(f"there is no residual stream {number}: the model has {len(streams)}, counted from 0")
    return streams[number]


def _site(seen: Flow, node: int, sites: Sequence[Site]) -> Site | None:
    """What is planned for an add, by its owner and place; what tells of norms and activations first."""
    frames = seen.origin(node).frames
    spans = {frame.span for frame in (*frames[:1], *around(frames)[len(frames) - 1 :])}
    paths = {owner_call(seen, node).path, *(frame.owner for frame in frames[-1:])}
    own = [site for site in sites if site.path in paths and site.span in spans]
    return next((site for site in own if site.norms or site.activation), None)


class _Watch:
    """Notes of a run what matters, as it is made: tensors may be overwritten later."""

    def __init__(self, blocks: list[Block], ends: tuple[int, int]) -> None:
        self.ends: dict[int, End] = {}
        self._wanted = ends
        self._skips = {block.sum.node: block.shortcut.value for block in blocks}
        self._last = {skip: node for node, skip in sorted(self._skips.items())}
        self._held: dict[int, Tensor] = {}
        self._rows: dict[int, tuple[float, ...]] = {}

    def __call__(self, index: int, node: fx.Node, value: Tensor) -> None:
        if index in self._wanted and value.is_floating_point():
            if not value.requires_grad and torch.is_grad_enabled() and index == self._wanted[0]:
                value.requires_grad_()
            if value.requires_grad:
                self.ends[index] = End(get_gradient_edge(value), value.shape, value.dtype, value.device)
        skip = self._skips.get(index)
        if skip is not None:
            self._rows[index] = _measured(self._held[skip], value.detach())
            if self._last[skip] == index:
                del self._held[skip]
        if index in self._last:
            self._held[index] = value.detach().clone()

    def row(self, seen: Flow, block: Block) -> BlockFlow:
        frames = seen.origin(block.sum.node).frames
        path = frames[-1].owner if frames else None
        return BlockFlow(path or "", *self._rows[block.sum.node])


def _measured(skip: Tensor, total: Tensor) -> tuple[float, ...]:
    wide = torch.promote_types(total.dtype, torch.float32)
    skip, total = skip.to(wide), total.to(wide)
    branch = total - skip
    added, carried = float(branch.square().mean()), float(skip.expand_as(total).square().mean())
    share = added / (added + carried) if added + carried else 0.0
    return (_variance(skip), _variance(branch), _variance(total), share if math.isfinite(share) else math.nan)


def _variance(value: Tensor) -> float:
    return float(value.var(unbiased=False))
