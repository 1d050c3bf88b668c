"""What was found and what is to become of it, for people and for programs: text, rich table, HTML, JSON."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .listing import DIGITS, compact, number, shortened, visible, where_of
from .methods import METHODS
from .pages import brief, document
from .plan import Norm, Plan, Repair, Site, Verdict, as_dict

VERSION = 1
"""Of the JSON: it changes when a key is renamed or removed, not when one is added."""
WIDTH = 100
_BESIDE = 76
"""What a table needs beside the column of the files' names."""
_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_STYLES: dict[str, str] = {"converted": "green", "gated": "cyan", "refused": "dim", "long-skip": "yellow"}
_PLURALS: dict[str, str] = {"long-skip": "long skips", "gated": "already gated", "not-executed": "not executed"}


@dataclass(frozen=True, slots=True)
class Sites:
    """Sites that differ only in the instance: one line of code with one verdict."""

    first: Site
    paths: tuple[str, ...]

    @property
    def alphas(self) -> tuple[str, ...]:
        return tuple(gate.alpha for gate in self.first.gates)


class Record(Protocol):
    """What can be shown beside a report: it is JSON-able."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Report:
    """A plan, readable. `print` it, give it to rich, look at it in a notebook, or take `to_dict()`.

    The values of `alphas` are read when the report is made; it does not change when the model is trained on.
    """

    plan: Plan
    title: str = ""
    notes: tuple[str, ...] = ()
    """Beside those of the plan."""
    converted: bool = False
    """The plan has been carried out; else it says what would be done."""
    alphas: Mapping[str, Any] = field(default_factory=dict)
    """Parameter name to its value: a tensor, a number or numbers; kept as numbers, none if unknown (meta)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", {name: _numbers(value) for name, value in self.alphas.items()})

    @property
    def changes(self) -> bool:
        """Whether there is anything left to convert."""
        return bool(self.plan.converted) and not self.converted

    @property
    def counts(self) -> dict[str, int]:
        """Sites per verdict, zeros included."""
        return {verdict: len(self.plan.of(verdict)) for verdict in _VERDICTS}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able builtins; `"version"` tells the layout."""
        return {
            "version": VERSION,
            "title": self.title,
            "route": self.plan.route,
            "converted": self.converted,
            "changes": self.changes,
            "options": as_dict(self.plan.options),
            "counts": self.counts,
            "scalars": self.plan.scalars,
            "notes": [*self.plan.notes, *self.notes],
            "groups": [_group_dict(one) for one in grouped(self.plan.sites)],
            "sites": as_dict(self.plan.sites),
            "alphas": {name: [_json_number(value) for value in values] for name, values in self.alphas.items()},
        }

    def __repr__(self) -> str:
        return f"<Report on {self.title or 'a plan'}, {totals(self)}>"

    def __str__(self) -> str:
        lines = _wrapped([_heading(self)])
        for group in grouped(self.plan.sites):
            lines += _block(group)
        lines += _wrapped([f"note: {note}" for note in (*self.plan.notes, *self.notes)])
        lines += _wrapped(today(self.alphas))
        return visible("\n".join([*lines, *_wrapped([totals(self)])]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table where the screen is wide enough for the files' names in a column of their own, else a list."""
        groups = grouped(self.plan.sites)
        name = max((len(where_of(group.first.shown)) for group in groups), default=0)
        if name + _BESIDE <= options.max_width:
            yield _table(_heading(self), groups, name)
        else:
            yield _text(_heading(self), style="bold")
            yield from (_listed(group, options.max_width) for group in groups)
        yield from (_text(f"note: {note}") for note in (*self.plan.notes, *self.notes))
        yield from (_text(line) for line in today(self.alphas))
        yield _text(totals(self), style="bold")

    def _repr_html_(self) -> str:
        return brief(self.to_dict(), _heading(self), [*today(self.alphas), totals(self)])

    def to_html(
        self, *, drawing: str = "", diff: str = "", validation: Record | None = None, isometry: Record | None = None
    ) -> str:
        """The report as the text of a self-contained HTML page; `page` also draws the streams and writes the file.

        Args:
            drawing: the residual streams as SVG, from a trusted source: it is put into the page as it is.
            diff: a unified diff of the rewritten source.
            validation: what `validate` returned.
            isometry: what `isometry` returned.
        """
        return document(
            self.to_dict(),
            [totals(self), *today(self.alphas)],
            drawing=drawing,
            diff=diff,
            validation=None if validation is None else validation.to_dict(),
            isometry=None if isometry is None else isometry.to_dict(),
        )


def _table(heading: str, groups: Iterable[Sites], name: int) -> Table:
    """The groups as rows; `name` is the width of the first column."""
    table = Table(title=_text(heading), title_justify="left", title_style="bold", pad_edge=False, expand=True)
    table.add_column("where", width=max(name, len("where")), ratio=5, overflow="fold")
    for column, share in (("verdict", 3), ("block", 4), ("gate", 3), ("norms and reasons", 5)):
        table.add_column(column, ratio=share, overflow="fold")
    for group in groups:
        site = group.first
        where = _text(where_of(site.shown), style="bold")
        where.append(f"\n{site.text.strip()}", style="not bold")
        paths = _text(_paths(group))
        kind = ", ".join(part for part in (site.cls, site.form) if part)
        paths.append(f"\n{kind}" if paths else kind, style="italic")
        table.add_row(
            where,
            _text(f"{site.code}\n{site.verdict}", style=_STYLES.get(site.verdict, "")),
            paths.append(f"\nx {len(group.paths)}" if len(group.paths) > 1 else ""),
            _text("\n".join(group.alphas)),
            _text("\n".join(_remarks(group))),
        )
    return table


def _listed(group: Sites, width: int) -> Group:
    """A group as lines: the place, then what there is to say of it, indented."""
    site = group.first
    times = f" (x {len(group.paths)})" if len(group.paths) > 1 else ""
    who = ", ".join(part for part in (_paths(group) + times, site.cls, *group.alphas) if part)
    verdict = _text(f"{site.code} {site.verdict}", style=_STYLES.get(site.verdict, ""))
    verdict.append(f"  {site.form}" if site.form else "", style="italic")
    room = width - 4
    code = site.text.strip()
    code = code if len(code) <= room else f"{code[: room - 4]} ..."
    rows = [verdict, *(_text(_parted(line, room)) for line in (who, code, *_remarks(group)) if line)]
    place = _text(_parted(where_of(site.shown), width), style="bold")
    return Group(place, *(Padding(row, (0, 0, 0, 4), expand=False) for row in rows))


def _paths(group: Sites) -> str:
    """The modules' paths; nothing for what has none but a class, as in a file that is only read."""
    return compact(group.paths) if any(group.paths) or not group.first.cls else ""


def _parted(text: str, width: int) -> str:
    """A text, with line breaks after the separators of words that are wider than a line."""
    words = []
    for word in text.split(" "):
        rows = [""]
        for part in re.findall(r"[^/\\,]*[/\\,]*", word) if len(word) > width else [word]:
            rows += [part] if rows[-1] and len(rows[-1]) + len(part) > width else [rows.pop() + part]
        words.append("\n".join(rows))
    return " ".join(words)


def _text(text: str, style: str = "", **how: Any) -> Text:
    return Text(visible(text), style, **how)


def grouped(sites: Iterable[Site]) -> tuple[Sites, ...]:
    """Equal sites of different instances as one, those that change first, otherwise in the order of the code."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(_key(site), []).append(site)
    found = [Sites(members[0], tuple(site.path for site in members)) for members in groups.values()]
    return tuple(sorted(found, key=lambda group: _VERDICTS.index(group.first.verdict)))


def totals(report: Report) -> str:
    """One line: adds per verdict, gates, norms, adds that were only counted."""
    done = report.plan.converted
    norms = {
        (site.cls, norm.path) if norm.path else (norm.at.span if norm.at else site.span)
        for site in done
        for norm in site.norms
        if norm.action != "keep"
    }
    gates = {
        (site.path, site.cls, name)
        for site in done
        for gate in site.gates
        for name in gate.parameters() or (gate.alpha,)
    }
    # A verdict without a plural of its own reads as a number of adds.
    parts = [f"{count} {_PLURALS.get(verdict, verdict)}" for verdict, count in report.counts.items() if count]
    line = ", ".join(parts) if parts else "no adds of tensors"
    if done:
        moved = sum(site.move is not None for site in done)
        changes = [f"{number(len(gates), 'gate')}, {number(len(norms), 'norm')} dropped"] if gates or not moved else []
        changes += [f"{number(moved, 'norm')} moved"] if moved else []
        line += f"; {', '.join(changes)}"
    if report.plan.scalars:
        line += f"; {number(report.plan.scalars, 'integer or scalar add')}"
    return f"{'done' if report.converted else 'total'}: {line}"


def today(alphas: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Today's alphas: names under their value; of a gate with channels mean|alpha| and range."""
    values: dict[str, list[str]] = {}
    for name, numbers in alphas.items():
        values.setdefault(_value(numbers), []).append(name)
    return [f"alpha {value}: {compact(names)}" for value, names in values.items()]


def _key(site: Site) -> tuple[object, ...]:
    """What equal sites have in common. Numbers in reasons are those of module paths and shapes: not compared."""
    gates = tuple((gate.alpha, gate.existing, gate.shape, gate.init) for gate in site.gates)
    norms = tuple(
        (_local(norm.path, site.path), norm.type, norm.action, DIGITS.sub("#", norm.reason)) for norm in site.norms
    )
    repairs = tuple((_local(repair.parameter, site.path), repair.how) for repair in site.repairs)
    activation = site.activation and (site.activation.type, site.activation.action)
    place = site.shown or (site.path, site.place)
    reason = DIGITS.sub("#", site.reason.replace(f"{site.path}.", "") if site.path else site.reason)
    return (place, site.verdict, site.code, site.cls, site.form, reason, gates, norms, repairs, activation)


def _local(path: str, owner: str) -> str:
    return path.removeprefix(f"{owner}.") if owner else path


def _group_dict(group: Sites) -> dict[str, Any]:
    site = group.first
    return {
        "verdict": site.verdict,
        "code": site.code,
        "form": site.form,
        "reason": site.reason,
        "span": as_dict(site.span),
        "shown": as_dict(site.shown),
        "where": where_of(site.shown),
        "text": site.text.strip(),
        "class": site.cls,
        "paths": list(group.paths),
        "pattern": compact(group.paths),
        "count": len(group.paths),
        "alphas": list(group.alphas),
        "norms": [as_dict(norm) for norm in site.norms],
        "activation": as_dict(site.activation),
        "repairs": as_dict(site.repairs),
        "remarks": _remarks(group),
    }


def _heading(report: Report) -> str:
    options = report.plan.options
    start = "by depth" if options.alpha_init is None else options.alpha_init
    method = "" if options.method == "rezero" else f"{options.method}, "
    if METHODS[options.method].placement:
        asked = f"{options.method}, {METHODS[options.method].form}"
        return f"{report.title or 'model'}: {_state(report)}; {asked}"
    asked = f"{method}alpha {start}, norms dropped: {', '.join(options.drop_norm) or 'none'}"
    return f"{report.title or 'model'}: {_state(report)}; {asked}, activation: {options.activation}"


def _state(report: Report) -> str:
    route = f" ({report.plan.route})" if report.plan.route else ""
    return f"{'converted' if report.converted else 'audit'}{route}"


def _block(group: Sites) -> list[str]:
    """A group as text: the line to grep for, the source, the remarks."""
    site = group.first
    times = f" (x {len(group.paths)})" if len(group.paths) > 1 else ""
    kind = " ".join(part for part in (where_of(site.shown), site.code, site.verdict, site.form) if part)
    who = ", ".join(part for part in (_paths(group) + times, site.cls, *group.alphas) if part)
    head = f"{kind}: {who}"
    code = textwrap.shorten(site.text.strip(), WIDTH - 4, placeholder=" ...") if site.text.strip() else ""
    lines = _wrapped([head], indent="    ")
    lines += [f"    {code}"] if code else []
    return lines + _wrapped([f"    {remark}" for remark in _remarks(group)], indent="      ")


def _remarks(group: Sites) -> list[str]:
    return [shortened(remark) for remark in _said(group.first)]


def _said(site: Site) -> list[str]:
    found = [site.reason] if site.reason else []
    for gate in site.gates:
        if gate.existing:
            found.append(f"gate {gate.alpha} was there{'' if gate.init is None else f', set to {gate.init:g}'}")
    found += [f"biases of one number: {compact(shift.alpha for shift in site.shifts)}"] if site.shifts else []
    found += [_norm_remark(norm, site) for norm in site.norms]
    if site.activation is not None:
        moved = site.activation.action == "move"
        action = "moved into the branch" if moved else f"kept{_because(site.activation.reason)}"
        found.append(f"{site.activation.type} after the add {action}")
    return found + [_repair_remark(repair, site) for repair in site.repairs]


def _norm_remark(norm: Norm, site: Site) -> str:
    name = _local(norm.path, site.path) or "functional norm"
    if site.move is not None and norm.at == site.move.at:
        return f"{name} ({norm.type}, {norm.position}) {norm.reason}"
    if norm.action == "keep":
        return f"kept {name} ({norm.type}, {norm.position}){_because(norm.reason)}"
    bias = f", bias given to {_local(norm.bias, site.path)}" if norm.bias else ""
    return f"dropped {name} ({norm.type}, {norm.position}){bias}"


def _repair_remark(repair: Repair, site: Site) -> str:
    if repair.how in ("zeros", "scaled"):
        change = "set to 0" if repair.how == "zeros" else f"multiplied by {repair.factor:.4g}"
        return f"{_local(repair.parameter, site.path)} {change}"
    how = "filled with ones" if repair.how == "ones" else "initialized anew"
    return f"zero init of {_local(repair.parameter, site.path)} undone: {how}"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _wrapped(lines: Iterable[str], indent: str = "  ") -> list[str]:
    found: list[str] = []
    for line in lines:
        lead = line[: len(line) - len(line.lstrip())]
        wrapped = textwrap.wrap(
            line.strip(),
            WIDTH,
            initial_indent=lead,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        found += wrapped or [""]
    return found


def _numbers(value: Any) -> tuple[float, ...]:
    """A gate's value as numbers; () where it has none (meta tensors)."""
    if getattr(value, "is_meta", False):
        return ()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded parameters
    value = value.detach().flatten().tolist() if hasattr(value, "detach") else value
    return tuple(float(number) for number in (value if isinstance(value, (list, tuple)) else (value,)))


def _value(numbers: tuple[float, ...]) -> str:
    if not numbers:
        return "without a value (meta)"
    if len(numbers) == 1:
        return f"{numbers[0]:.4g}"
    mean = math.fsum(abs(number) for number in numbers) / len(numbers)
    return f"mean|alpha| {mean:.4g}, {min(numbers):.4g} to {max(numbers):.4g} ({len(numbers)} channels)"


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
