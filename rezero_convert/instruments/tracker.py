"""`AlphaTracker`: gates and what they let through, over the steps of training."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..errors import ConversionError
from ..files import replace
from ..listing import plain
from ..rewrite.modules import alphas
from .watching import Watch, blocks_of, gates_now, whole


@dataclass(frozen=True, slots=True)
class Reading:
    """One gate at one step. Losses are in the loss's own units; None is what was not measured."""

    step: int
    gate: str
    alpha: float
    """The mean, of a gate with one number a channel."""
    rms: float
    """Root mean square; |alpha| of a gate of one number."""
    ratio: float | None
    """|alpha F(x)| / |x|, norms over all elements of this process's batch: what the branch weighs on the stream."""
    effect: float | None
    """-sum(alpha * dL/dalpha): to first order, how much the loss would change without the branch."""
    ablation: float | None
    """How much the loss changes with this gate at 0, measured."""


class AlphaTracker:
    """Follows the gates of a converted model while it trains.

    Call `step()` once for each step of the optimizer, between `backward()` and `zero_grad()`. Every `every`-th time,
    and the first, a row for each gate is added to `readings`. The ratios come from that step's own forward pass,
    which runs uncompiled and under a `TorchFunctionMode` that is on for this one pass; other steps are not touched.

    Args:
        model: converted; the one that you call, which may be it inside DistributedDataParallel or `torch.compile`, or
            sharded by FSDP2: then all processes have to call `step()`, since the gates are gathered.
        every: steps between rows, at least 1.
        loss: called without arguments, returns the loss (a number, or a tensor of one) on data of your choice; then
            gates are also set to 0 one by one and the change of this loss is noted (`ablation`).
        ablate_every: steps between these, which take one `loss()` per gate and one more; 20 * `every` if None.
        on_record: each called with the new readings; see `tensorboard`.

    Raises:
        ConversionError: the model has no gate, or a number is out of its range.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> model = rz.convert(layer, x)
        >>> optimizer, tracker = torch.optim.SGD(rz.param_groups(model, lr=0.1)), rz.AlphaTracker(model, every=1)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     rows = tracker.step()
        >>> [(reading.step, reading.gate) for reading in tracker.readings]
        [(1, 'alpha_self_attn'), (1, 'alpha_linear2'), (2, 'alpha_self_attn'), (2, 'alpha_linear2')]
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 50,
        *,
        loss: Callable[[], Tensor | float] | None = None,
        ablate_every: int | None = None,
        on_record: tuple[Callable[[tuple[Reading, ...]], None], ...] = (),
    ) -> None:
        if every < 1 or (ablate_every is not None and ablate_every < 1):
            raise ConversionError("every and ablate_every must be at least 1")
        self.model = _inner(model)
        self._called = model
        blocks = blocks_of(self.model)
        self._names = {name: blocks.get(name) for name, _ in alphas(self.model)}
        if not self._names:
            raise ConversionError(f"{type(self.model).__qualname__} has no gate: convert the model first")
        self.every = every
        self.readings: list[Reading] = []
        self._loss = loss
        self._ablate_every = 20 * every if ablate_every is None else ablate_every
        self._on_record = on_record
        self._step = 0
        self._watch: Watch | None = None
        self._handles: list[Any] = []
        self._arm()

    def step(self, number: int | None = None) -> tuple[Reading, ...]:
        """Count a step; returns the new readings, none in most steps.

        Args:
            number: of the step, where it does not count from 1 (training goes on from a checkpoint).
        """
        self._step = self._step + 1 if number is None else number
        rows: tuple[Reading, ...] = ()
        if self._handles:
            self._disarm()
        if self._is_due(self._step):
            rows = self._read()
            self.readings += rows
            for listen in self._on_record:
                listen(rows)
        if self._is_due(self._step + 1):
            self._arm()
        return rows

    def close(self) -> None:
        """Take off what waits for the next forward pass."""
        self._disarm()

    def ablate(self, loss: Callable[[], Tensor | float]) -> dict[str, float]:
        """The change of a loss with each gate at 0 by itself, in eval mode; gates are put back."""
        with _evaluating(self.model), torch.no_grad():
            base = float(loss())
            changes = {}
            for name, gate in gates_now(self.model, self._names):
                saved = gate.detach().clone()
                try:
                    gate.zero_()
                    changes[name] = float(loss()) - base
                finally:
                    gate.copy_(saved)
        return changes

    # output

    def table(self) -> list[dict[str, Any]]:
        """All readings as dicts, by step, then gate."""
        return [asdict(reading) for reading in self.readings]

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write all readings, one a line; what was not measured is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Reading)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.table())
        replace(Path(path), text.getvalue().encode())
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "every": self.every, "readings": self.table()}

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write all readings."""
        replace(Path(path), json.dumps(self.to_dict(), indent=1).encode())
        return Path(path)

    def plot(self, path: str | os.PathLike[str], what: str = "alpha", kind: str = "lines") -> Path:
        """Draw a quantity over the steps (takes the `plot` extra).

        Args:
            path: the file; its ending tells the format (.png, .svg, .pdf).
            what: "alpha", "rms", "ratio", "effect" or "ablation".
            kind: "lines", a trajectory for each gate; or "heatmap", layer by step.

        Raises:
            ConversionError: matplotlib is not installed, a name is not one of these, or nothing was measured.
        """
        from .plots import plotted

        return plotted(self.readings, Path(path), what, kind)

    def callback(self) -> Any:
        """A `transformers.TrainerCallback` that calls `step` before each step of the optimizer."""
        from .callbacks import trainer_callback

        return trainer_callback(self)

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Today's gates; `rich.live.Live(tracker)` shows them while training runs."""
        now = self.readings[-len(self._names) :]
        most = max((reading.rms for reading in now), default=0.0) or 1.0
        table = Table(title=f"step {now[0].step if now else '-'}", title_justify="left", pad_edge=False)
        for name in ("gate", "alpha", "", "|aF|/|x|", "effect", "ablation"):
            table.add_column(name, justify="left" if name in ("gate", "") else "right")
        room = max(1, options.max_height - 6)
        for reading in now[:room]:
            bar = "#" * round(20 * reading.rms / most) if math.isfinite(reading.rms) else "?"
            rest = (reading.ratio, reading.effect, reading.ablation)
            table.add_row(reading.gate, _shown(reading.alpha), bar, *map(_shown, rest))
        yield table
        if len(now) > room:
            yield f"and {len(now) - room} more"

    # measuring

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def _arm(self) -> None:
        """Have the next forward pass with gradients watched."""
        self._watch = None
        watch, on = Watch(self.model, self._names), ExitStack()

        def before(module: nn.Module, args: Any) -> None:
            if torch.is_grad_enabled() and self._watch is None and not torch.compiler.is_compiling():
                self._watch = watch
                if "torch._dynamo" in sys.modules:  # compiled code calls no mode
                    on.enter_context(torch.compiler.set_stance("force_eager"))
                on.enter_context(watch)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            on.close()

        self._handles = [
            self._called.register_forward_pre_hook(before),
            self._called.register_forward_hook(after, always_call=True),
        ]

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _read(self) -> tuple[Reading, ...]:
        ratios = self._watch.ratios() if self._watch is not None else {}
        due = self._loss is not None and self._step % self._ablate_every == 0
        ablations = self.ablate(self._loss) if due and self._loss is not None else {}
        rows = []
        for name, gate in gates_now(self.model, self._names):
            value = whole(gate.detach()).float()
            grad = whole(gate.grad.detach()).float() if gate.grad is not None else None
            rows.append(
                Reading(
                    self._step,
                    name,
                    float(value.mean()),
                    float(value.square().mean().sqrt()),
                    float(ratios[name]) if name in ratios else None,
                    -float((value * grad).sum()) if grad is not None else None,
                    ablations.get(name),
                )
            )
        return tuple(rows)


def _inner(model: nn.Module) -> nn.Module:
    """The model itself: what compiles or replicates it has other names for the gates."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
