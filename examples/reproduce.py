"""The paper's tables and figures in small, next to the paper's: "ReZero is All You Need", Bachlechner et al., UAI 2021.

`python examples/reproduce.py` trains what is not yet in `examples/results/*.json`, run by run, prints the tables and
draws the figures there. It can be stopped at any time and goes on where it was. `--print` trains nothing;
`--only fc deep transformer resnet jacobian alphas` chooses.

The data are small and the nets narrow: only orders and ratios compare with the paper's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tasks import (
    CharTransformer,
    PostLayer,
    PreLayer,
    Task,
    char_loss,
    char_task,
    dense,
    dense_task,
    digit_batches,
    resnet_task,
    text_batches,
)
from torch import nn

import rezero_convert as rz

RESULTS = Path(__file__).parent / "results"
DEPTHS = (32, 64, 128)
NOTEBOOK = {"vanilla": 2.02, "residual, var 0.25/w": 1.87, "post-norm": 2.02, "ReZero": 0.52}
"""Loss after 10 epochs of 64 layers on CIFAR-10, as the authors' notebook logs it."""
TABLE_3 = {
    "post-norm": "diverged",
    "post-norm, warm-up": "13,690 (1.56)",
    "pre-norm": "17,765 (2.02)",
    "GPT2-norm (in and out)": "21,187 (2.41)",
    "alpha = 1": "14,506 (1.65)",
    "ReZero": "8,800 (1)",
}
"""Iterations to 1.2 bits a character, 12 layers on enwiki8, and how many times ReZero's."""
RESNET_56 = {
    "vanilla": "20, 6.27",
    "gated": "9, 6.80",
    "zero-gamma": "39, 7.84",
    "FixUp": "13, 7.26",
    "ReZero": "15, 6.58",
}
"""Epochs to 80 % and error in % on CIFAR-10."""
SPECTRA = {("post-norm", 12): 0.810, ("pre-norm", 12): 10.2, ("alpha = 0.1", 12): 1.06, ("post-norm", 128): 0.000,
           ("pre-norm", 128): 66.3, ("alpha = 0.1", 128): 2.14}  # fmt: skip
"""Mean squared singular values that the authors' notebook shows."""


def ran(name: str, task: Task, asked: argparse.Namespace, methods: Sequence[str] = (), **changes: Any) -> None:
    """Train what is missing in the file of that name."""
    given: dict[str, Any] = {"lrs": task.lrs[:1], "thresholds": task.thresholds, "steps": task.steps}
    rz.race(
        task.make_model,
        task.batches,
        {method: task.methods[method] for method in methods or task.methods},
        seeds=range(asked.seeds),
        keep=RESULTS / f"{name}.json",
        on_run=lambda run: print(
            f"{name}: {run.method}, lr {run.lr:g}, seed {run.seed}: {run.last:.4g}", file=sys.stderr
        ),
        **{**given, **task.settings, **changes},
    )


def kept(name: str) -> rz.Race | None:
    path = RESULTS / f"{name}.json"
    return rz.Race.from_dict(json.loads(path.read_text())) if path.exists() else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def picture(file: str, title: str, draw: Callable[[Path], Any]) -> None:
    draw(RESULTS / file)
    print(f"![{title}](examples/results/{file})\n")


def shown(race: rz.Race, method: str, lr: float, threshold: float) -> str:
    """Each seed's steps, "-" for never, "x" for a run that diverged."""
    found = [(run.steps_to(threshold), run.diverged) for run in race.of(method, lr)]
    return ", ".join("x" if gone else "-" if step is None else str(step) for step, gone in found)


def end(race: rz.Race, method: str, lr: float, what: Callable[[rz.Run], float | None] = lambda run: run.metric) -> str:
    values = [value for run in race.of(method, lr) if (value := what(run)) is not None and math.isfinite(value)]
    return f"{mean(values):.3f}" if values else ""


def middle(race: rz.Race, method: str, lr: float, threshold: float) -> float:
    """Median of the steps; never counts as infinite."""
    found = [run.steps_to(threshold) for run in race.of(method, lr)]
    return median(math.inf if step is None else step for step in found) if found else math.nan


def ratio(upper: float, lower: float, most: int) -> str:
    """Of two numbers of steps; what was not reached in all the steps took more than these."""
    if math.isinf(lower):
        return ""
    return f"> {most / lower:.2f}" if math.isinf(upper) else f"{upper / lower:.2f}"


# Fully connected nets


def fc(asked: argparse.Namespace) -> None:
    if not asked.print:
        for depth in DEPTHS:
            ran(f"fc{depth}", dense_task(depth), asked, methods=("pre-norm", "ReZero"))
        for depth in DEPTHS:
            ran(f"fc{depth}", dense_task(depth), asked)
    races = {depth: race for depth in DEPTHS if (race := kept(f"fc{depth}"))}
    print("Fully connected, 128 wide, digits, Adagrad 0.01: steps (of 200) to a training loss of 0.1, each seed.")
    print("Last column: test accuracy at 128 layers. Paper: the authors' notebook, CIFAR-10, loss after 10 epochs; its")
    print("post-norm net has no skip, and so has ours.\n")
    rows = []
    for method in dense_task(32).methods:
        steps = [shown(races[depth], method, 0.01, 0.1) if depth in races else "" for depth in DEPTHS]
        paper = f"{NOTEBOOK[method]}" if method in NOTEBOOK else ""
        rows.append([method, paper, *steps, end(races[128], method, 0.01) if 128 in races else ""])
    rows = [row for row in rows if any(row[2:])]
    table(["net", "paper: loss, 64 layers", *(f"{depth} layers" for depth in DEPTHS), "accuracy"], rows)
    steps = {depth: middle(race, "ReZero", 0.01, 0.1) for depth, race in races.items()}
    if {32, 128} <= set(steps):
        print(f"ReZero, 128 layers against 32: {ratio(steps[128], steps[32], 200)} times the steps.")
        for depth, race in races.items():
            times = ratio(middle(race, "pre-norm", 0.01, 0.1), steps[depth], 200)
            print(f"Pre-norm against ReZero, {depth} layers: {times}.")
        print()
    if 128 in races:
        title = "128 fully connected layers, Adagrad 0.01"
        picture("fc128.png", title, partial(races[128].plot, title=title))


def deep(asked: argparse.Namespace) -> None:
    """10,000 layers: the identity, the gradients, and as many steps as fit into `--minutes`."""
    path = RESULTS / "fc10000.json"
    if not asked.print and not path.exists():
        path.write_text(json.dumps(_deep(10_000, 32, asked.minutes), indent=None) + "\n")
    if not path.exists():
        return
    found = json.loads(path.read_text())
    losses = found["losses"]
    print(f"{found['layers']:,} layers, {found['width']} wide (paper: 10,000 of 150, which trains):")
    print(
        f"output of the blocks is their input, bit for bit: {found['identity']}; its gradient too: {found['gradient']};"
    )
    print(f"gates with a gradient: {found['live']:,} of {found['layers']:,}.")
    if losses:
        print(
            f"{len(losses)} steps of Adagrad {found['lr']:g}, gates {found['alpha_lr']:g}: training loss "
            f"{losses[0]:.3f} at first, {max(losses):.3f} at most, {losses[-1]:.3f} at last."
        )
    print()


def _deep(layers: int, width: int, minutes: float) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = dense(layers, norm=False, width=width)
    batches = digit_batches(0, 100)
    x, y = next(batches)
    model = rz.convert(plain, x, inplace=True, verify=False)
    stem, blocks, head = model[:2], model[2], model[3]
    inner = stem(x).detach().requires_grad_()
    outer = blocks(inner)
    identity = torch.equal(outer, inner)
    loss = nn.functional.cross_entropy(head(outer), y)
    (by_inner,) = torch.autograd.grad(loss, inner, retain_graph=True)
    (by_outer,) = torch.autograd.grad(loss, outer, retain_graph=True)
    gates = [gate for _, gate in rz.alphas(model)]
    live = sum(bool(grad.abs().sum() > 0) for grad in torch.autograd.grad(loss, gates))
    del outer, loss
    lr, alpha_lr, losses, begin = 0.003, 1 / layers, [], time.monotonic()  # its first step is of the rate's size
    optimizer = torch.optim.Adagrad(rz.param_groups(model, lr=lr, alpha_lr=alpha_lr))
    for x, y in batches:
        if len(losses) == 300 or time.monotonic() - begin > 60 * minutes:
            break
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
        print(f"10,000 layers, step {len(losses)}: {losses[-1]}", file=sys.stderr)
    record = {"layers": layers, "width": width, "lr": lr, "alpha_lr": alpha_lr, "identity": identity, "live": live}
    return record | {"gradient": torch.equal(by_inner, by_outer), "losses": losses}


# Transformers


def transformer(asked: argparse.Namespace) -> None:
    task = char_task(12)
    if not asked.print:
        ran("char12", task, asked, methods=("pre-norm", "ReZero", "post-norm"))
        warm = replace(task, methods={"post-norm, warm-up": task.methods["post-norm"]})
        ran("char12", warm, asked, schedule=lambda done: min(1.0, (done + 1) / 200))
        ran("char12", task, asked)
        ran("char12", task, asked, methods=("pre-norm", "ReZero"), lrs=(1e-3,))
        faster = replace(task, methods={"ReZero, gates x 10": task.methods["ReZero"]})
        ran("char12", faster, asked, lrs=(3e-3, 1e-3), optimizer=_adam_with_fast_gates)
    race = kept("char12")
    if race is None:
        return
    print("Transformer of 12 layers, characters of Python's library, Adam, clipped at 1, no warm-up unless said: steps")
    print(f"(of {race.steps}) to 4 and to 3.5 bits a character on held-out text, each seed, and the bits at the end.\n")
    own = {lr: middle(race, "ReZero", lr, 3.5) for lr in race.lrs if race.of("ReZero", lr)}
    rows = []
    for lr in sorted(race.lrs, reverse=True):
        for method in dict.fromkeys([*TABLE_3, *race.methods]):
            if race.of(method, lr):
                times = ratio(middle(race, method, lr, 3.5), own[lr], race.steps) if lr in own else ""
                steps = [shown(race, method, lr, threshold) for threshold in (4.0, 3.5)]
                paper = TABLE_3.get(method, "") if lr == 3e-3 else ""
                rows.append([method, f"{lr:g}", paper, *steps, times, end(race, method, lr, lambda run: run.last)])
    table(["net", "rate", "paper: iterations", "to 4", "to 3.5", "times ReZero's", "at the end"], rows)
    shown_runs = (run for run in race.runs if run.lr == 3e-3)
    below = (replace(run, curve=tuple(point for point in run.curve if point[1] < 6)) for run in shown_runs)
    drawn = replace(race, runs=tuple(below))
    title = "Transformer of 12 layers, Adam 0.003, below 6 bits"
    picture("char12.png", title, partial(drawn.plot, title=title))


def _adam_with_fast_gates(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(rz.param_groups(model, lr=lr, optimizer=torch.optim.Adam))


# ResNet


def resnet(asked: argparse.Namespace) -> None:
    task = resnet_task()
    if not asked.print:
        ran("resnet56", task, asked, methods=("vanilla", "ReZero"))
        ran("resnet56", task, asked)
        ran("resnet56", task, asked, lrs=(0.02,))
    race = kept("resnet56")
    if race is None:
        return
    print("ResNet-56, digits of 8 by 8, SGD with momentum 0.9 and decay 5e-4: steps (of 96) to a training loss of 0.3,")
    print('each seed ("-" never, "x" diverged), by learning rate, and the test accuracy at the end.\n')
    rows = []
    for method in task.methods:
        cells = [shown(race, method, lr, 0.3) for lr in task.lrs]
        rows.append([method, RESNET_56.get(method, ""), *cells, *(end(race, method, lr) for lr in task.lrs)])
    rows = [row for row in rows if any(row[2:])]
    head = [f"rate {lr:g}" for lr in task.lrs]
    table(["net", "paper: epochs to 80 %, error %", *head, *(f"accuracy, {lr:g}" for lr in task.lrs)], rows)
    steps = {name: middle(race, name, 0.1, 0.3) for name in ("vanilla", "ReZero")}
    print(
        f"Vanilla against ReZero, rate 0.1: {ratio(steps['vanilla'], steps['ReZero'], race.steps)} times the steps.\n"
    )
    drawn = replace(race, runs=tuple(run for run in race.runs if run.lr == 0.1))
    picture("resnet56.png", "ResNet-56, SGD 0.1", partial(drawn.plot, title="ResNet-56, SGD 0.1"))


# The Jacobian of the residual stream


def jacobian(asked: argparse.Namespace) -> None:
    path = RESULTS / "jacobian.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    for depth in (12, 64, 128):
        for name in ("post-norm", "pre-norm", "alpha = 0.1", "ReZero"):
            rows = found.setdefault(f"{name}, {depth}", [])
            for seed in range(len(rows), 0 if asked.print else asked.seeds):
                rows.append(_spectrum(name, depth, seed))
                path.write_text(json.dumps(found) + "\n")
                print(f"jacobian: {name}, {depth}, seed {seed}: {rows[-1]['mean']:.3g}", file=sys.stderr)
    if not any(found.values()):
        return
    print("Mean squared singular value of the stream's Jacobian at the start, mean over seeds, and the median singular")
    print("value; layers of width 16 on 4 positions, Xavier weights. Paper: the authors' notebook, one net each.\n")
    rows = []
    for key, values in found.items():
        name, _, depth = key.rpartition(", ")
        if values:
            squared, typical = (mean(value[what] for value in values) for what in ("mean", "median"))
            paper = SPECTRA.get((name, int(depth)))
            rows.append([name, depth, "" if paper is None else f"{paper:g}", f"{squared:.3g}", f"{typical:.2g}"])
    table(["net", "layers", "paper", "mean squared", "median"], rows)
    picture("jacobian.png", "Singular values at the start", partial(_drawn_spectra, found))


def _spectrum(name: str, depth: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(*((PostLayer if name == "post-norm" else PreLayer)(16, 2) for _ in range(depth)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    x = torch.randn(1, 4, 16)
    if not name.endswith("norm"):
        model = rz.convert(model, x, verify=False, alpha_init=0.1 if "0.1" in name else 0.0)
    result = rz.isometry(model.double(), x.double())
    values = [float(f"{value:.4g}") for value in result.singular_values]
    return {"mean": result.mean_squared, "median": result.median, "values": values}


def _drawn_spectra(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    depths = ("12", "64", "128")
    panels = figure.subplots(1, len(depths), sharey=True)
    edges = [0.25 * at for at in range(-56, 13)]
    for axes, depth in zip(panels, depths, strict=True):
        for key, values in found.items():
            name, _, layers = key.rpartition(", ")
            if layers == depth and values:
                logs = [max(-14.0, math.log10(max(one, 1e-14))) for value in values for one in value["values"]]
                weights = [1 / len(logs)] * len(logs)
                axes.hist(logs, bins=edges, weights=weights, histtype="stepfilled", alpha=0.55, label=name)
        axes.set(title=f"{depth} layers", xlabel="log10 of the singular value", yscale="log", ylim=(0.003, 1.3))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share")
    panels[0].legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(path)


# The gates


def alphas(asked: argparse.Namespace) -> None:
    path = RESULTS / "alphas.json"
    if not asked.print and not path.exists():
        _follow(250).to_json(path)
    if path.exists():
        found = json.loads(path.read_text())
        tracker = rz.AlphaTracker(_tracked(), every=found["every"])
        tracker.readings = [rz.Reading(**row) for row in found["readings"]]
        tracker.close()
        picture("alphas.png", "Alphas of a 12-layer Transformer", tracker.plot)
        last = [row for row in tracker.readings if row.step == tracker.readings[-1].step]
        sizes = [row.rms for row in last]
        print(f"12-layer Transformer, Adam 0.003, step {last[0].step}: mean |alpha| {mean(sizes):.3f}, first half of")
        print(f"the branches {mean(sizes[:12]):.3f}, second half {mean(sizes[12:]):.3f}; the paper's end near 1/L.")
    task = dense_task(32)
    if not asked.print:
        rates = replace(task, methods={"ReZero": task.methods["ReZero"]}, lrs=(0.1, 1.0, 10.0, 30.0, 100.0))
        ran("alpha_rates", rates, asked, lrs=rates.lrs, optimizer=_adam_by_multiple)
    race = kept("alpha_rates")
    if race is None:
        return
    print("\nFC, 32 layers, Adam 0.001, gates at a multiple of it: steps to a training loss of 0.1, each seed.\n")
    table(["gates' rate, times", "steps"], [[f"{lr:g}", shown(race, "ReZero", lr, 0.1)] for lr in race.lrs])
    by_rate = tuple(replace(run, method=f"gates x {run.lr:g}", lr=0.0) for run in race.runs)
    title = "32 layers, Adam 0.001, by the gates' rate"
    picture("alpha_rates.png", title, partial(replace(race, runs=by_rate).plot, title=title))


def _adam_by_multiple(model: nn.Module, times: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(rz.param_groups(model, lr=1e-3, alpha_lr=times * 1e-3))


def _tracked() -> nn.Module:
    return rz.convert(CharTransformer(12), torch.zeros(1, 4, dtype=torch.long), inplace=True, verify=False)


def _follow(steps: int) -> rz.AlphaTracker:
    torch.manual_seed(0)
    model = _tracked()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tracker = rz.AlphaTracker(model, every=10)
    for _, (inputs, targets) in zip(range(steps), text_batches(0), strict=False):
        optimizer.zero_grad()
        char_loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tracker.step()
        optimizer.step()
    return tracker


CAVEATS = """Where ReZero does not win, and what differs from the paper:

- In the paper its ResNet-56 has a higher error than vanilla (6.58 against 6.27), and gated reaches 80 % sooner. Here
  vanilla is ahead at the rate of 0.02, 22 to 28 steps against 60 to 65, and as accurate; 0.1 it does not bear.
- Under Adam at a low learning rate pre-norm is ahead: the 12-layer Transformer at 0.001 took 185 to 200 steps to
  3.5 bits with pre-norm, 195 to 215 with ReZero and ten times the rate for the gates, more than 250 without that.
- At 12 layers and 0.003 the skips do it, not the zero: with alpha = 1, or no gate at all, the net without norms is as
  fast as with ReZero.
- With Adam at the best of three rates each, 32 fully connected layers took 40 steps with pre-norm, 46 with ReZero (the
  same). The fully connected pre-norm net above has no final norm; at 128 layers its first loss is near 80.
- ReZero with pre-norms kept is faster than without (0.62 of the steps), which is not the paper's recipe.
- T5-base, 223M parameters, by Narang et al. 2021: ReZero 61.69 on SuperGLUE against 71.66 for pre-norm, with warm-up.
- Data: digits and source text instead of CIFAR-10 and enwiki8; nets of width 64 and 128; one alpha a branch, where the
  authors' Transformer has one a layer; Adam instead of LAMB; RescaleNet without its data-dependent biases.
"""
SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "fc": fc,
    "resnet": resnet,
    "transformer": transformer,
    "jacobian": jacobian,
    "alphas": alphas,
    "deep": deep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--minutes", type=float, default=10, help="for the steps of the 10,000 layers (default 10)")
    parser.add_argument("--print", action="store_true", help="train nothing")
    asked = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in asked.only:
        SECTIONS[name](asked)
    print(CAVEATS)


if __name__ == "__main__":
    main()
