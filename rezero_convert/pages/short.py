"""Short forms for notebooks: tables without a style of their own, so that they look like the notebook's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from .markup import Markup, joined, tag

ROOT = "(the model)"
"""The root module, whose path is empty."""
MOST = 12
"""Rows that are shown; the rest is counted."""


def brief(report: Mapping[str, Any], heading: str, facts: Sequence[str]) -> str:
    """A report: its first groups and its totals.

    Args:
        report: `Report.to_dict()`.
        heading: one line that says what it is.
        facts: lines that go below the table.
    """
    groups = report["groups"]
    rows = (
        (
            f"{one['code']} {one['verdict']}",
            one["where"],
            tag("code", one["text"]),
            modules(one),
            one["form"] or one["reason"],
            ", ".join(one["alphas"]),
        )
        for one in groups
    )
    columns = ("verdict", "where", "line", "modules", "form or reason", "gates")
    return joined(_table(heading, columns, rows, len(groups)), _paragraphs(facts))


def outcome(validation: Mapping[str, Any]) -> str:
    """A validation: whether it holds, and what does not.

    Args:
        validation: `Validation.to_dict()`.
    """
    failures = validation["failures"]
    heading = f"{validation['title']}: {'holds' if validation['ok'] else 'DOES NOT HOLD'}"
    made = {one["name"]: None for block in validation["blocks"] for one in block["checks"]}
    blocks = f"blocks checked: {len(validation['blocks'])}; of each: {', '.join(made)}"
    if not failures:
        return joined(tag("p", tag("b", heading)), _paragraphs([blocks, *validation["notes"]]))
    table = _table(heading, ("failed",), ((one,) for one in failures), len(failures))
    return joined(table, _paragraphs([blocks, *validation["notes"]]))


def _table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: int) -> Markup:
    head = tag("tr", (tag("th", name) for name in columns))
    body = [tag("tr", (tag("td", text) for text in row)) for row in islice(rows, MOST)]
    more = [f"and {total - MOST} more"] if total > MOST else []
    return joined(
        tag("p", tag("b", heading)),
        tag("table", tag("thead", head), tag("tbody", body)) if body else "",
        _paragraphs(more),
    )


def modules(group: Mapping[str, Any]) -> str:
    """The modules of a group, and how many they are."""
    return f"{group['pattern']} (x {group['count']})" if group["count"] > 1 else str(group["pattern"])


def _paragraphs(lines: Iterable[str]) -> Markup:
    return joined(tag("p", line) for line in lines)
