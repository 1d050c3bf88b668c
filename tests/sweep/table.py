"""The results as Markdown, and as one line a model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from .record import Record

_KINDS = {"structure": "structure (full size)", "numbers": "numbers (all oracles)"}


def markdown(records: Iterable[Record]) -> str:
    """Per zoo and kind of run how many of how many hold, every failure, what does not run unconverted."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    listed = sorted(records, key=lambda one: one.key)
    for record in listed:
        groups[record.zoo, record.kind].append(record)
    lines = ["| zoo | checked | hold | share | gates | s per model | does not run |", "|---|---|---|---|---|---|---|"]
    for (zoo, kind), members in sorted(groups.items()):
        counted = [one for one in members if one.status != "does not run"]
        held = [one for one in counted if one.status == "ok"]
        share = f"{100 * len(held) / len(counted):.1f} %" if counted else "-"
        seconds = f"{statistics.mean(one.seconds for one in counted):.1f}" if counted else "-"
        gates = sum(one.gates for one in held)
        lines.append(
            f"| {zoo} | {_KINDS[kind]} | {len(held)}/{len(counted)} | {share} | {gates} | {seconds} | "
            f"{len(members) - len(counted)} |"
        )
    versions = {f"{name} {version}" for one in listed for name, version in one.versions.items()}
    lines += ["", ", ".join(sorted(versions)) + "."]
    for title, status in (("Failures", "failed"), ("Not counted: does not run unconverted", "does not run")):
        chosen = [one for one in listed if one.status == status]
        if chosen:
            lines += ["", f"### {title}", "", "| model | run | reason |", "|---|---|---|"]
            lines += [f"| {one.zoo} {one.name} | {one.kind} | {_cell(one)} |" for one in chosen]
    return "\n".join(lines) + "\n"


def counts(records: Iterable[Record]) -> str:
    """A line a model: gates, and how many adds got which verdict."""
    lines = []
    for one in sorted(records, key=lambda one: one.key):
        said = ", ".join(f"{verdict} {number}" for verdict, number in one.sites.items())
        lines.append(f"{one.zoo:12} {one.kind:9} {one.name:50} {one.status:12} gates {one.gates:4}  {said}")
    return "\n".join(lines) + "\n"


def _cell(record: Record) -> str:
    more = f" (and {len(record.reasons) - 1} more)" if len(record.reasons) > 1 else ""
    reason = record.reasons[0] if record.reasons else ""
    return (reason[:240] + (" ..." if len(reason) > 240 else "") + more).replace("|", "\\|")
