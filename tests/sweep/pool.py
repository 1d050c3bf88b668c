"""Models one at a time in processes that may crash or hang: a timeout kills the process, not the sweep."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .record import Kind, Record

_SPAWN = multiprocessing.get_context("spawn")
_LARGE = 3 * 2**30
"""Bytes; a process that holds more between two models (its allocator gives little back) is replaced by a new one."""
Task = tuple[str, str, Kind]


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task
    started: float


def _nothing() -> None:
    pass


def run(
    tasks: Iterable[Task],
    work: Callable[..., Record],
    jobs: int,
    timeout: float,
    memory_gb: float,
    log: Path,
    prepare: Callable[[], object] = _nothing,
) -> Iterator[Record]:
    """What `work` makes of each task, as it comes; one that crashes or hangs comes as a failure.

    Args:
        tasks: read one by one, as processes become free: they may depend on the records that came before.
        prepare: called in every new process before its first task, outside of that task's time: imports.
    """
    waiting = iter(tasks)
    idle: list[tuple[Any, Connection]] = []
    busy: list[_Worker] = []
    try:
        while True:
            while len(busy) < jobs and (task := next(waiting, None)) is not None:
                process, pipe = idle.pop() if idle else _start(work, prepare, memory_gb, log)
                pipe.send(task)
                busy.append(_Worker(process, pipe, task, time.monotonic()))
            if not busy:
                return
            left = min(worker.started for worker in busy) + timeout - time.monotonic()
            wait([worker.pipe for worker in busy], timeout=max(left, 0.0))
            for worker in list(busy):
                record = _result(worker, timeout)
                if record is None:
                    continue
                busy.remove(worker)
                if _resident(worker.process.pid) > _LARGE:
                    worker.process.kill()
                elif worker.process.is_alive():
                    idle.append((worker.process, worker.pipe))
                yield record
    finally:
        for process in [worker.process for worker in busy] + [process for process, _ in idle]:
            process.kill()


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def _start(
    work: Callable[..., Record], prepare: Callable[[], object], memory_gb: float, log: Path
) -> tuple[Any, Connection]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, work, prepare, memory_gb, str(log)), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # ready: the time of a model does not hold that of the imports
    return process, ours


def _result(worker: _Worker, timeout: float) -> Record | None:
    """The worker's record, or that it crashed or was killed; None if it is still at it."""
    took = time.monotonic() - worker.started
    if worker.pipe.poll():
        try:
            record = worker.pipe.recv()
            assert isinstance(record, Record)
            return record
        except (EOFError, OSError):
            worker.process.join()
            return Record(*worker.task, "failed", (f"crash: exit code {worker.process.exitcode}",), seconds=took)
    if took < timeout:
        return None
    worker.process.kill()
    worker.process.join()
    return Record(*worker.task, "failed", (f"timeout: {timeout:.0f} s",), seconds=took)


def _serve(
    pipe: Connection, work: Callable[..., Record], prepare: Callable[[], object], memory_gb: float, log: str
) -> None:
    with open(log, "a") as stream:
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(stream.fileno(), number)
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    prepare()
    pipe.send(None)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        pipe.send(work(*task))
