"""What was checked and what came out, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..listing import compact, number, plain, short
from ..pages import outcome
from ..plan import as_dict


@dataclass(frozen=True, slots=True)
class Check:
    """One property of one block, or of the whole model."""

    name: str
    """Of a block: "gated", "identity", "finite", "nonzero", "vjp", "alive", "branch-alive". Of the model:
    "registered", "trainable", "read", "norm-gone", "sealed", "placed", "carried"; "outputs", "gradients" (equality),
    "idempotence"."""
    mode: str
    """"eval", "train" or "structure"."""
    ok: bool
    detail: str = ""
    """What was found; of a block's check, what is wrong ("" if nothing)."""
    choice: bool = False
    """Does not hold, but by the plan: a post-norm, an activation or a zero init that was kept."""

    @property
    def status(self) -> str:
        return "ok" if self.ok else "by choice" if self.choice else "FAILED"

    def __str__(self) -> str:
        mode = "" if self.mode == "structure" else f" ({self.mode})"
        return f"{self.status:9} {self.name}{mode}: {self.detail}".rstrip(": ")

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, **as_dict(self)}


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The checks of one block."""

    path: str
    alphas: tuple[str, ...]
    where: str
    """`file:line:col` of the sum in the user's own file, where that is known."""
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok or check.choice for check in self.checks)


@dataclass(frozen=True, slots=True)
class Validation:
    """What was checked and what came out. `print` it for a table."""

    title: str
    blocks: tuple[BlockResult, ...]
    checks: tuple[Check, ...]
    """Of the model as a whole."""
    asleep: tuple[str, ...] = ()
    """Gates whose gradient from the model's output is zero at the start because it has to pass another zero gate;
    they wake at the second step."""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for everything that does not hold and was not chosen."""
        own = [f"{c.name} ({c.mode}): {c.detail}" for c in self.checks if not (c.ok or c.choice)]
        blocks = [
            f"{block.path or 'the model'} ({', '.join(block.alphas)}, {block.where}): "
            f"{check.name} ({check.mode}): {check.detail}"
            for block in self.blocks
            for check in block.checks
            if not (check.ok or check.choice)
        ]
        return (*own, *blocks)

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "ok": self.ok, "failures": list(self.failures), **as_dict(self)}

    def _repr_html_(self) -> str:
        return outcome(self.to_dict())

    def __repr__(self) -> str:
        wrong = f"{number(len(self.failures), 'failure')} in " if self.failures else "holds, "
        return f"<Validation of {self.title}: {wrong}{number(len(self.blocks), 'block')}>"

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        verdict = "holds" if self.ok else "DOES NOT HOLD"
        title = Text(f"{self.title}: {verdict}", style="bold green" if self.ok else "bold red")
        table = Table(title=title, title_justify="left", pad_edge=False)
        for name, share in (("block", 5), ("gate", 3), ("where", 6), ("result", 4)):
            table.add_column(name, ratio=share, overflow="fold")
        for members in _grouped(self.blocks):
            first = members[0]
            times = f"\nx {len(members)}" if len(members) > 1 else ""
            gate = "\n".join(_local(name, first.path) for name in first.alphas)
            table.add_row(
                Text(compact(block.path for block in members) + times),
                Text(gate),
                Text(_shown(first.where)),
                _result(first.checks),
            )
        yield table
        names = dict.fromkeys(check.name for block in self.blocks for check in block.checks)
        yield Text(f"{number(len(self.blocks), 'block')}, each checked: {', '.join(names)}")
        for check in _by_mode(self.checks):
            yield _line(check.status, f" {check.name}{check.mode}: {check.detail}")
        for members in _grouped(self.blocks):
            for check in _by_mode(members[0].checks):
                if not check.ok:
                    who = compact(block.path for block in members)
                    yield _line(check.status, f" {check.name}{check.mode}: {who}: {check.detail}")
        if self.asleep:
            yield _line("asleep", f" until the second step, behind another zero gate: {compact(self.asleep)}")
        yield from (Text(f"note: {note}") for note in self.notes)


_STYLES = {"ok": "green", "by choice": "yellow", "FAILED": "bold red", "asleep": "yellow"}


def _line(status: str, text: str) -> Text:
    return Text(status, style=_STYLES[status]).append(text, style="not bold default")


def _result(checks: tuple[Check, ...]) -> Text:
    """ "ok", or what does not hold, worst first."""
    lines = []
    for status in ("FAILED", "by choice"):
        names = dict.fromkeys(check.name for check in checks if check.status == status)
        if names:
            lines.append(Text(f"{status}: {', '.join(names)}", style=_STYLES[status]))
    return Text("\n").join(lines) if lines else Text("ok", style=_STYLES["ok"])


def _by_mode(checks: Iterable[Check]) -> list[Check]:
    """Equal checks of several modes as one; its `mode` is as shown: "", " (train)", " (eval, train)"."""
    found: dict[tuple[object, ...], list[Check]] = {}
    for check in checks:
        found.setdefault((check.name, check.ok, check.choice, check.detail), []).append(check)
    return [replace(some[0], mode=_modes(some)) for some in found.values()]


def _modes(checks: list[Check]) -> str:
    names = [check.mode for check in checks if check.mode != "structure"]
    return f" ({', '.join(names)})" if names else ""


def _grouped(blocks: Iterable[BlockResult]) -> list[list[BlockResult]]:
    """Blocks with the same code, gates and results; those that fail first."""
    groups: dict[tuple[object, ...], list[BlockResult]] = {}
    for block in blocks:
        alphas = tuple(_local(name, block.path) for name in block.alphas)
        marks = tuple((check.name, check.mode, check.status) for check in block.checks)
        groups.setdefault((block.where, alphas, marks), []).append(block)
    return sorted(groups.values(), key=lambda members: members[0].ok)


def _local(name: str, path: str) -> str:
    return name.removeprefix(f"{path}.") if path else name


def _shown(where: str) -> str:
    file, colon, rest = where.partition(":")
    return f"{short(file)}{colon}{rest}"
