"""The command: which models, how, where to write; a progress bar, then the table."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import pool, record, table
from .checks import examine
from .record import Record
from .zoos import ZOOS


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    if options.zoo and not options.resume and not options.again:
        done: dict[tuple[str, str, str], Record] = {}
    else:
        done = record.load(file)
    for zoo in options.zoo:
        names = [name for name in ZOOS[zoo].names() if _wanted(name, options.only)]
        whole = options.numbers == "all" or len(ZOOS[zoo].kinds) == 1
        kinds = [kind for kind in ZOOS[zoo].kinds if whole or (kind == "numbers") == (options.numbers == "only")]
        tasks = [(zoo, name, kind) for kind in kinds for name in names]
        _sweep(tasks, done, file, options)
        if options.numbers == "distinct" and not whole:
            chosen = distinct(one for one in record.load(file).values() if one.zoo == zoo and one.name in set(names))
            _sweep([(zoo, name, "numbers") for name in chosen], done, file, options)
    text = table.markdown(record.load(file).values())
    (out / "coverage.md").write_text(text)
    (out / "counts.txt").write_text(table.counts(record.load(file).values()))
    Console(stderr=True).print(f"{file}, {out / 'coverage.md'}")
    return int(any(one.status == "failed" for one in record.load(file).values()))


def distinct(records: Iterable[Record]) -> list[str]:
    """One model a signature, that with the fewest parameters: its blocks run the code of all the others."""
    key = lambda one: one.signature  # noqa: E731
    found = sorted((one for one in records if one.kind == "structure" and one.signature and one.gates), key=key)
    return sorted(
        min(group, key=lambda one: (one.parameters, one.name)).name for _, group in itertools.groupby(found, key)
    )


def _sweep(
    tasks: list[pool.Task], done: dict[tuple[str, str, str], Record], file: Path, options: argparse.Namespace
) -> None:
    left = [
        task
        for task in tasks
        if task not in done or (options.again and fnmatch.fnmatch(done[task].status, options.again))
    ]
    columns = (
        TextColumn("{task.description:40.40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("[red]{task.fields[failed]} failed"),
    )  # fmt: skip
    failed = 0
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("", total=len(left), failed=0)
        for one in pool.run(left, examine, options.jobs, options.timeout, options.memory, file.parent / "workers.log"):
            record.append(file, one)
            failed += one.status == "failed"
            progress.update(bar, advance=1, description=f"{one.zoo} {one.name} ({one.kind})", failed=failed)


def _wanted(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--zoo", action="append", default=[], choices=("nn", "torchvision", "timm", "transformers"),
                        help="repeatable; without it the table is written anew from the results there are")  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="for results.jsonl, coverage.md, counts.txt, workers.log"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds a model may take (default 300)"
    )
    parser.add_argument(
        "--memory", type=float, default=16, metavar="GB", help="address space of a process (default 16)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names that match (repeatable)")
    parser.add_argument("--numbers", choices=("distinct", "all", "none", "only"), default="distinct",
                        help="which models are also run small with real weights: one per distinct residual code "
                        "(default), all, none; only: no structural run")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="leave out what has a result")
    parser.add_argument("--again", metavar="STATUS", help="with --resume, but models of this status once more: failed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
