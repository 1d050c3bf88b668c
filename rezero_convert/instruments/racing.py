"""`race`: the same model under several methods, on equal terms: one grid of learning rates, the same seeds and batches.

What reviewers of the paper asked for (steps to several thresholds and the final metric, spread
over seeds, a learning rate tuned for each method, parameter counts). A run that diverges is a result.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from .. import files
from ..api import convert
from ..errors import ConversionError, NoEffectWarning
from ..listing import plain

Entrant = Mapping[str, Any] | Callable[[], nn.Module] | None
"""Options of `convert`; or a function that makes another model; or None, the model as it is."""
_WINDOW = 10
"""Steps that the training loss is averaged over; a running mean would trail a high first loss by its own decay."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    method: str
    lr: float
    seed: int
    curve: tuple[tuple[int, float], ...]
    """(steps done, value), in the units of the loss or of `evaluate`."""
    metric: float | None
    """At the end; None if it diverged or no `metric` was given."""
    diverged: int | None
    """The step at which the loss or the value was not finite, which ended the run."""
    parameters: int
    """Numbers that are trained."""
    ms_per_step: float
    """Median wall-clock time of a step (forward, backward, optimizer) in milliseconds."""

    @property
    def last(self) -> float:
        """The last value of the curve; infinite if the run diverged."""
        return math.inf if self.diverged is not None or not self.curve else self.curve[-1][1]

    def steps_to(self, threshold: float) -> int | None:
        """Steps until the curve was first below a threshold; None if it never was."""
        return next((step for step, value in self.curve if value < threshold), None)


@dataclass(frozen=True, slots=True)
class Race:
    """What came out of a race. `print` it for a table."""

    measured: str
    """What the curves show."""
    steps: int
    thresholds: tuple[float, ...]
    """From the easiest to the hardest."""
    runs: tuple[Run, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def lrs(self) -> tuple[float, ...]:
        return tuple(sorted({run.lr for run in self.runs}))

    def of(self, method: str, lr: float | None = None) -> tuple[Run, ...]:
        """The runs of a method at a learning rate, by default its best one."""
        lr = self.best_lr(method) if lr is None else lr
        return tuple(run for run in self.runs if run.method == method and run.lr == lr)

    def best_lr(self, method: str) -> float:
        """The rate at which most seeds reach the hardest threshold, then in the fewest steps, then the next one's, and
        of what is still equal the lowest mean of the last values.

        Raises:
            ConversionError: there is no run of this method.
        """
        rates = sorted({run.lr for run in self.runs if run.method == method})
        if not rates:
            raise ConversionError(f"no run of {method!r} (there are {', '.join(self.methods)})")
        return min(rates, key=lambda lr: self._rank(self.of(method, lr)))

    def _rank(self, runs: Sequence[Run]) -> tuple[float, ...]:
        rank: list[float] = []
        for threshold in reversed(self.thresholds):
            steps = [found for run in runs if (found := run.steps_to(threshold)) is not None]
            rank += [-len(steps) / len(runs), sum(steps) / len(steps) if steps else math.inf]
        return (*rank, sum(run.last for run in runs) / len(runs))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: a value that is not finite is None."""
        return {"version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Race:
        """The race that `to_dict` gave."""
        runs = tuple(
            Run(**(run | {"curve": tuple((step, value) for step, value in run["curve"])})) for run in data["runs"]
        )
        return cls(data["measured"], data["steps"], tuple(data["thresholds"]), runs)

    def plot(self, path: str | os.PathLike[str], title: str = "") -> Path:
        """Draw the mean curve of each method at its best rate and the range over the seeds (takes the `plot` extra).

        A curve ends where a run diverges, with a cross.

        Raises:
            ConversionError: matplotlib is not installed.
        """
        from .plots import raced

        return raced(self, Path(path), title)

    def __str__(self) -> str:
        return plain(self, 160)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            title=f"{self.measured}: steps (of {self.steps}) until below", title_justify="left", pad_edge=False
        )
        heads = [
            "method",
            "best lr",
            *(f"{one:g}" for one in self.thresholds),
            "at the end",
            "metric",
            "parameters",
            "ms/step",
        ]
        for head in heads:
            table.add_column(head, justify="left" if head == "method" else "right")
        for method in self.methods:
            runs = self.of(method)
            table.add_row(
                method,
                f"{runs[0].lr:g}",
                *(_steps([run.steps_to(threshold) for run in runs]) for threshold in self.thresholds),
                _spread([run.last for run in runs]),
                _spread([run.metric for run in runs if run.metric is not None]),
                f"{runs[0].parameters:,}",
                f"{median(run.ms_per_step for run in runs):.1f}",
            )
        yield table
        if len(self.lrs) > 1:
            yield self._grid()

    def _grid(self) -> Table:
        hardest = self.thresholds[-1]
        table = Table(title=f"by learning rate, until below {hardest:g}", title_justify="left", pad_edge=False)
        table.add_column("method")
        for lr in self.lrs:
            table.add_column(f"{lr:g}", justify="right")
        for method in self.methods:
            cells = [[run.steps_to(hardest) for run in self.of(method, lr)] for lr in self.lrs]
            table.add_row(method, *(_steps(cell) if cell else "" for cell in cells))
        return table


def race(
    make_model: Callable[[], nn.Module],
    batches: Callable[[int], Iterable[tuple[Any, Any]]],
    methods: Sequence[str] | Mapping[str, Entrant] = ("original", "rezero"),
    *,
    lrs: Sequence[float],
    thresholds: Sequence[float],
    steps: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 1,
    metric: Callable[[nn.Module], float] | None = None,
    keep: str | os.PathLike[str] | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Race:
    """Train a model under several methods, each at each learning rate with each seed, and compare.

    At one seed all methods start from the same weights and see the same batches.

    Args:
        make_model: makes the model; called after `torch.manual_seed(seed)`.
        batches: by seed, at least `steps` pairs of inputs (a tensor, a tuple of positional or a dict of keyword
            arguments) and targets.
        methods: names of `convert`'s methods, and "original" for the model as it is; or by a name of your choice the
            options of `convert` (`{"ReZero, norms kept": {"method": "rezero", "drop_norm": "none"}}`), None for the
            model as it is, or a function that makes another model.
        lrs: learning rates, the same for all methods.
        thresholds: of the curve, which is better the lower it is.
        steps: of the optimizer, per run.
        seeds: of weights and batches.
        loss: of the model's output and the targets.
        optimizer: makes one from the model and a learning rate; None is Adam with one rate for weights and gates. See
            `param_groups` for another rate of the gates.
        schedule: factor of the learning rates by steps done, from 0 (a warm-up).
        clip: largest norm of the gradients, None for any.
        evaluate: what the curve shows, of the model in eval mode without gradients; None for the training loss,
            the mean of the last 10 steps.
        every: steps between points of the curve.
        metric: of the model in eval mode after the last step, such as an accuracy.
        keep: a JSON file that gets each run when it is finished; runs that it holds are not repeated, so that a race
            can be stopped, resumed and extended. It may hold runs of other calls, of as many steps.
        on_run: called with each new run.

    Returns:
        The runs, by method, learning rate and seed. A run that diverges ends there, and counts as one that never
        reached a threshold.

    Raises:
        ConversionError: a model cannot be converted by a method, or has nothing that a method would change; nothing was
            trained yet then; an argument is out of its range; `make_model` gives one model twice; the batches run out;
            or `keep` is a file of other runs.

    Example:
        >>> import torch, rezero_convert as rz
        >>> def make_model():
        ...     return torch.nn.TransformerEncoderLayer(16, 2, 32)
        >>> def batches(seed):
        ...     return [(torch.randn(5, 2, 16), torch.zeros(5, 2, 16)) for _ in range(4)]
        >>> mse = torch.nn.functional.mse_loss
        >>> race = rz.race(make_model, batches, lrs=[0.1], thresholds=[0.5], steps=4, seeds=[0], loss=mse)
        >>> [(run.method, run.lr, run.seed) for run in race.runs]
        [('original', 0.1, 0), ('rezero', 0.1, 0)]
    """
    entrants = _entrants(methods)
    if not (entrants and lrs and seeds and thresholds) or steps < 1 or every < 1:
        raise ConversionError("a race takes a method, a learning rate, a seed and a threshold; steps, every at least 1")
    one, other = make_model(), make_model()
    if not {id(weight) for weight in one.parameters()}.isdisjoint(id(weight) for weight in other.parameters()):
        raise ConversionError("make_model gave the same weights twice: every run starts from a model made anew")
    del one, other
    measured = (
        f"training loss, mean of {_WINDOW} steps" if evaluate is None else getattr(evaluate, "__name__", "evaluate")
    )
    result = Race(measured, steps, tuple(sorted(thresholds, reverse=True)), ())
    kept = _kept(Path(keep), result) if keep is not None else {}
    cells = list(product(entrants, lrs, seeds))
    inputs, _ = next(iter(batches(seeds[0])))
    for name in dict.fromkeys(name for name, lr, seed in cells if (name, lr, seed) not in kept):
        _made(name, entrants[name], make_model, inputs, seeds[0], verify=True)
    optimizer = optimizer or _adam
    for name, lr, seed in cells:
        if (name, lr, seed) in kept:
            continue
        model = _made(name, entrants[name], make_model, inputs, seed, verify=False)
        training = _Training(model, optimizer(model, lr), loss, schedule, clip)
        run = _run(Run(name, lr, seed, (), None, None, 0, 0.0), training, batches(seed), steps, every, evaluate, metric)
        kept[name, lr, seed] = run
        if keep is not None:
            files.replace(Path(keep), _json(replace(result, runs=tuple(kept.values()))).encode())
        if on_run is not None:
            on_run(run)
    return replace(result, runs=tuple(kept[cell] for cell in cells))


@dataclass(frozen=True, slots=True)
class _Training:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Any], Tensor]
    schedule: Callable[[int], float] | None
    clip: float | None

    def losses(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[float, float]]:
        """The loss before each step, and the seconds that the step took."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for done, (inputs, targets) in enumerate(batches):
            begin = time.perf_counter()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (self.schedule(done) if self.schedule is not None else 1.0)
            self.optimizer.zero_grad()
            value = self.loss(_called(self.model, inputs), targets)
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            yield value.item(), time.perf_counter() - begin


def _run(
    blank: Run,
    training: _Training,
    batches: Iterable[tuple[Any, Any]],
    steps: int,
    every: int,
    evaluate: Callable[[nn.Module], float] | None,
    metric: Callable[[nn.Module], float] | None,
) -> Run:
    curve: list[tuple[int, float]] = []
    seconds: list[float] = []
    last: deque[float] = deque(maxlen=_WINDOW)
    diverged = None
    for step, (loss, took) in enumerate(training.losses(batches), 1):
        seconds.append(took)
        last.append(loss)
        value = sum(last) / len(last)
        if evaluate is not None and step % every == 0 and math.isfinite(loss):
            value = _evaluated(training.model, evaluate)
        if not math.isfinite(value):
            diverged = step
            break
        if step % every == 0:
            curve.append((step, float(f"{value:.5g}")))
        if step == steps:
            break
    else:
        raise ConversionError(f"the batches of seed {blank.seed} ran out before step {steps}")
    final = _evaluated(training.model, metric) if metric is not None and diverged is None else None
    return replace(
        blank,
        curve=tuple(curve),
        metric=final if final is not None and math.isfinite(final) else None,
        diverged=diverged,
        parameters=sum(one.numel() for one in training.model.parameters() if one.requires_grad),
        ms_per_step=round(1000 * median(seconds), 3),
    )


def _entrants(methods: Sequence[str] | Mapping[str, Entrant]) -> dict[str, Entrant]:
    if isinstance(methods, Mapping):
        return dict(methods)
    names = [methods] if isinstance(methods, str) else methods
    return {name: None if name == "original" else {"method": name} for name in names}


def _made(
    name: str, entrant: Entrant, make_model: Callable[[], nn.Module], inputs: Any, seed: int, *, verify: bool
) -> nn.Module:
    """A method's model in train mode; the same random numbers follow for all methods."""
    torch.manual_seed(seed)
    model = entrant() if callable(entrant) else make_model()
    if isinstance(entrant, Mapping):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", NoEffectWarning)
                model = convert(model, inputs, inplace=True, verify=verify, **entrant)
        except (ConversionError, NoEffectWarning) as error:
            raise ConversionError(f"{name}: {error}") from error
    torch.manual_seed(seed)
    return model.train()


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _evaluated(model: nn.Module, measure: Callable[[nn.Module], float]) -> float:
    model.eval()
    try:
        with torch.no_grad():
            return float(measure(model))
    finally:
        model.train()


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def _kept(path: Path, wanted: Race) -> dict[tuple[str, float, int], Run]:
    """The runs in a file, none if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = Race.from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} does not hold a race: {error!r}") from error
    if (found.steps, found.measured) != (wanted.steps, wanted.measured):
        raise ConversionError(f"{path} holds runs of {found.steps} steps ({found.measured}), not {wanted.steps}")
    return {(run.method, run.lr, run.seed): run for run in found.runs}


def _json(race: Race) -> str:
    """One line a run."""
    head = race.to_dict() | {"runs": []}
    lines = ",\n".join(json.dumps(asdict(run), separators=(",", ":"), allow_nan=False) for run in race.runs)
    return json.dumps(head)[: -len("[]}")] + f"[\n{lines}\n]}}\n"


def _steps(found: Sequence[int | None]) -> str:
    """Each seed's, "-" for never; of many their median and range."""
    if len(found) <= 5:
        return ", ".join("-" if one is None else str(one) for one in found)
    steps = sorted(one for one in found if one is not None)
    never = f", {len(found) - len(steps)} never" if len(steps) < len(found) else ""
    return f"{median(steps):g} ({steps[0]}-{steps[-1]}){never}" if steps else "-"


def _spread(values: Sequence[float]) -> str:
    """Mean and half of the range of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    gone = f", {len(values) - len(finite)} diverged" if len(finite) < len(values) else ""
    if not finite:
        return "diverged" if values else ""
    half = (max(finite) - min(finite)) / 2
    return f"{sum(finite) / len(finite):.3g}" + (f" +-{half:.2g}" if len(finite) > 1 else "") + gone
