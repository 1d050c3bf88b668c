"""`isometry`: does a model's residual stream keep lengths? The spectrum of its input-output Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..errors import ConversionError
from ..listing import compact, plain
from ..plan import as_dict
from .spectrum import Sample, exact, lanczos
from .stream import BlockFlow, run_stream

_EXACT = 1024
"""Elements of the stream, up to which all singular values are computed."""


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of the histogram: low <= log10(singular value) < high."""

    low: float
    high: float
    share: float
    """Of the directions of the stream's beginning."""
    error: float
    """Standard error of `share`; 0 where it is exact."""


@dataclass(frozen=True, slots=True)
class Isometry:
    """The spectrum of a residual stream's Jacobian. `print` it for a table."""

    title: str
    method: Literal["exact", "lanczos"]
    stream: tuple[str, str]
    """Where it begins and ends: the modules that own its first and its last add."""
    shape: tuple[int, ...]
    """At its beginning."""
    mean_squared: float
    """Mean squared singular value: the mean of |J v|^2 over all unit vectors v; 1 for an isometry."""
    mean_squared_error: float
    """Its standard error; 0 where it is exact."""
    largest: float
    """The largest singular value, at least."""
    median: float
    """Of the singular values; with "lanczos" an estimate."""
    floor: float
    """What singular values have to reach to be told from zero: the largest one times the precision of the model's
    numbers (1.2e-7 in single; a model in double shows more)."""
    zero: float
    """Share of directions whose singular value is below `floor`: the stream forgets them."""
    histogram: tuple[Bin, ...]
    """Of log10 of the other singular values; with `zero`, the shares sum to 1."""
    blocks: tuple[BlockFlow, ...]
    singular_values: tuple[float, ...] = ()
    """In descending order, where they are exact; as many as the stream's beginning has elements."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, **as_dict(self)}

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.title}: {' -> '.join(path or '(the model)' for path in self.stream)}, {self.method}", "bold")
        error = f" +- {self.mean_squared_error:.2g}" if self.method != "exact" else ""
        yield Text(f"mean squared singular value {self.mean_squared:.4g}{error}, median {self.median:.4g}, "
                   f"largest {self.largest:.4g}")  # fmt: skip
        yield _bars(self)
        yield _flows(self.blocks)
        yield from self.notes


def isometry(
    model: nn.Module,
    inputs: Any = None,
    *,
    method: Literal["auto", "exact", "lanczos"] = "auto",
    stream: int | None = None,
    training: bool = False,
    probes: int = 8,
    steps: int = 24,
    bin_width: float = 0.5,
    seed: int = 0,
) -> Isometry:
    """The singular values of the Jacobian of a model's residual stream, and what each block does to the stream.

    The Jacobian J is that of the last block's output (its sum, or the post-norm or activation of that sum, where the
    model has one) with respect to what the first block's skip and branches are computed from, at the given inputs, over
    all elements, those of the batch included. What lies between two blocks (a patch merging) belongs to the stream;
    embedding, stem and head do not. A ReZero network starts with J = 1 (Bachlechner et al., UAI 2021, section 3.2);
    where there are projection shortcuts, J is theirs.

    Args:
        model: any `nn.Module`, converted or not; it is left as it was.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred
            (transformers, timm). One example does.
        method: "exact" takes one backward pass for each element of the stream's end; "lanczos" is stochastic Lanczos
            quadrature, with `probes` random vectors of `steps` pairs of products each, and gives standard errors over
            the probes; "auto" is exact up to 1024 elements.
        stream: which one, in the order of their first blocks, where a model has several (encoder and decoder); None for
            the one with most blocks.
        training: run in train mode (batch norms, dropout).
        probes: random vectors, at least 2.
        steps: pairs of products a vector, at least 1.
        bin_width: of the histogram, in decades.
        seed: of the random vectors.

    Returns:
        A frozen record.

    Raises:
        ConversionError: an argument is out of its range, the model cannot be run or has no such stream, no gradient
            passes along it, the Jacobian is not finite, or an operation cannot be differentiated twice ("lanczos").

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> result = rz.isometry(rz.convert(layer, x), x)
        >>> result.mean_squared, result.largest, result.shape
        (1.0, 1.0, (5, 2, 16))
    """
    if method not in ("auto", "exact", "lanczos"):
        raise ConversionError(f'method must be "auto", "exact" or "lanczos", not {method!r}')
    if probes < 2 or steps < 1 or not bin_width > 0:
        raise ConversionError("there must be at least 2 probes and 1 step, and bin_width must be more than 0")
    run = run_stream(model, inputs, stream, training=training)
    size = max(run.begin.shape.numel(), run.end.shape.numel())
    chosen: Literal["exact", "lanczos"]
    chosen = ("exact" if size <= _EXACT else "lanczos") if method == "auto" else method
    if chosen == "exact":
        samples = [exact(run)]
    else:
        generator = torch.Generator().manual_seed(seed)
        samples = [lanczos(run, steps=steps, generator=generator) for _ in range(probes)]
    if not all(bool(sample.values.isfinite().all()) for sample in samples):
        raise ConversionError("the Jacobian is not finite")
    mean, error = _mean([one.mean_squared for one in samples])
    largest = max(float(one.values.max()) for one in samples)
    floor = largest * torch.finfo(run.end.dtype).eps
    zero, bins = _histogram(samples, bin_width, floor)
    others = f"{run.of - 1} other residual streams: stream=0 .. {run.of - 1} chooses" if run.of > 1 else ""
    return Isometry(
        type(model).__qualname__,
        chosen,
        (run.blocks[0].path, run.blocks[-1].path),
        tuple(run.begin.shape),
        mean,
        error,
        largest,
        _median(samples),
        floor,
        zero,
        bins,
        run.blocks,
        tuple(samples[0].values.tolist()) if chosen == "exact" else (),
        (others,) if others else (),
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _histogram(samples: Sequence[Sample], width: float, floor: float) -> tuple[float, tuple[Bin, ...]]:
    """The share of zeros, and the bars, with 0 (singular value 1) in the middle of one."""
    alive = [(one.values >= floor) & (one.values > 0) for one in samples]
    places = [torch.floor(one.values.clamp(min=1e-300).log10() / width + 0.5).long() for one in samples]
    zero, _ = _mean([one.share(~ok) for one, ok in zip(samples, alive, strict=True)])
    taken = torch.cat([place[ok] for place, ok in zip(places, alive, strict=True)])
    if not len(taken):
        return zero, ()
    bins = []
    for place in range(int(taken.min()), int(taken.max()) + 1):
        shares = [one.share(ok & (at == place)) for one, at, ok in zip(samples, places, alive, strict=True)]
        bins.append(Bin((place - 0.5) * width, (place + 0.5) * width, *_mean(shares)))
    return zero, tuple(bins)


def _median(samples: Sequence[Sample]) -> float:
    values: Tensor = torch.cat([one.values for one in samples])
    weights: Tensor = torch.cat([one.weights for one in samples])
    order = values.argsort()
    reached = weights[order].cumsum(0) >= weights.sum() / 2 * (1 - 1e-9)
    return float(values[order][reached][0])


def _bars(result: Isometry) -> Table:
    table = Table(pad_edge=False)
    for name, side in (("log10", "right"), ("share", "right"), ("", "left")):
        table.add_column(name, justify="right" if side == "right" else "left")
    most = max([result.zero, *(one.share for one in result.histogram)])
    rows = [(f"{one.low:.2f} .. {one.high:.2f}", one.share, one.error) for one in result.histogram]
    if result.zero:
        rows.insert(0, (f"below {math.log10(result.floor):.2f}" if result.floor else "zero", result.zero, 0.0))
    for name, share, error in rows:
        said = f"{share:.1%}" + (f" +- {error:.1%}" if result.method != "exact" else "")
        table.add_row(name, said, "#" * round(40 * share / most))
    return table


def _flows(blocks: Sequence[BlockFlow]) -> Table:
    table = Table(pad_edge=False)
    for name in ("block", "variance", "of the skip", "of the branch", "branch's share"):
        table.add_column(name, justify="left" if name == "block" else "right", overflow="fold")
    members: dict[tuple[str, ...], list[str]] = {}
    for one in blocks:
        shown = (one.variance, one.skip_variance, one.branch_variance)
        members.setdefault((*(f"{value:.4g}" for value in shown), f"{one.share:.1%}"), []).append(one.path)
    for cells, paths in members.items():
        table.add_row(compact(paths), *cells)
    return table
