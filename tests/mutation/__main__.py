"""The command."""

from __future__ import annotations

import argparse
import re
import resource
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from . import FAULTS
from .fault import Outcome, copied, failing_without, tried, warm

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Faults that the tests must catch.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="faults whose file or name this is found in")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if re.search(options.only, f"{fault.file}: {fault.name}")]
    outcomes: list[Outcome] = []
    warm()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        package = copied(ROOT, Path(folder))
        for outcome in pool.map(partial(tried, root=ROOT, package=package), chosen):
            outcomes.append(outcome)
            print(f"{outcome.verdict:9} {outcome.seconds:4.0f} s  {outcome.fault.file}: {outcome.fault.name}")
            print(f"{'':17} {outcome.detail}", flush=True)
        caught = [outcome for outcome in outcomes if outcome.verdict == "caught"]
        tests = sorted({one.detail for one in caught if "::" in one.detail})
        void = failing_without(tests, ROOT, package) if tests else []
    for test in void:
        print(f"FAILS WITHOUT A FAULT: {test}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(caught)} of {len(outcomes)} faults caught, {used.ru_utime + used.ru_stime:.0f} s of CPU time")
    return int(len(caught) < len(outcomes) or bool(void))


if __name__ == "__main__":
    sys.exit(main())
