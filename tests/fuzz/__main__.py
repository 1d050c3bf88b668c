"""The command."""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

from . import models, mutations, oracles


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random models with known truth.")
    parser.add_argument("--examples", type=int, default=100, help="how many models to draw")
    parser.add_argument("--mutants", type=int, default=0, help="how many mutations of real files to try")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no example after this time")
    parser.add_argument("--show", type=int, default=3, help="how many failures of a kind to print with their text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, tried, failures = time.perf_counter(), 0, collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.examples):
            if time.perf_counter() - start > options.seconds:
                break
            tried += 1
            case = models.model(random.Random(seed))
            try:
                oracles.check(case, Path(folder))
            except Exception as error:
                _tell(f"seed {seed}", error, case.text, failures, options.show)
        for seed in range(options.seed, options.seed + options.mutants):
            if time.perf_counter() - start > options.seconds:
                break
            tried += 1
            mutant = mutations.mutant(random.Random(seed))
            try:
                mutations.check(mutant)
            except Exception as error:
                _tell(f"mutant {seed} of {mutant.name}", error, mutant.change, failures, options.show)
    print(f"{tried} tried, {sum(failures.values())} failed, {time.perf_counter() - start:.0f} s")
    return int(bool(failures))


def _tell(what: str, error: Exception, text: str, failures: collections.Counter[str], show: int) -> None:
    message = f"{type(error).__name__}: {error}"
    kind = re.sub(r"\d+", "#", message.partition("\n")[0])[:80]
    failures[kind] += 1
    print(f"--- {what}: {message[:1500]}")
    if failures[kind] <= show:
        if not isinstance(error, AssertionError):
            print("".join(traceback.format_exception(error)[-4:]))
        print("\n".join(f"{number:3} {line}" for number, line in enumerate(text.split("\n"), 1)))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
