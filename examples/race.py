"""Methods against each other, each at its best learning rate, over several seeds.

`python examples/race.py fc32` runs a shipped task with a few methods; `--help` shows the choices, `--list` the tasks.
`--out race.json` keeps each run as it ends: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tasks import TASKS

import rezero_convert as rz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="fc32", choices=list(TASKS))
    parser.add_argument(
        "--methods", nargs="+", help="names of the task's methods, or of convert's (default: the task's)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates, the same for all methods")
    parser.add_argument("--steps", type=int, help="of the optimizer, per run")
    parser.add_argument("--out", type=Path, help="JSON file of the runs")
    parser.add_argument("--plot", type=Path, help="picture of the curves")
    parser.add_argument("--list", action="store_true", help="show the tasks and their methods")
    asked = parser.parse_args()
    if asked.list:
        for name, make in TASKS.items():
            print(f"{name}: {', '.join(make().methods)}")
        return
    task = TASKS[asked.task]()
    names = asked.methods or list(task.methods)
    own = {"original": None}
    methods = {name: task.methods[name] if name in task.methods else own.get(name, {"method": name}) for name in names}
    result = rz.race(
        task.make_model,
        task.batches,
        methods,
        lrs=asked.lrs or task.lrs,
        thresholds=task.thresholds,
        steps=asked.steps or task.steps,
        seeds=range(asked.seeds),
        keep=asked.out,
        on_run=lambda run: print(f"{run.method}, lr {run.lr:g}, seed {run.seed}: {run.last:.4g}", file=sys.stderr),
        **task.settings,
    )
    print(result)
    if asked.plot:
        print(result.plot(asked.plot, asked.task))


if __name__ == "__main__":
    main()
