"""The page: everything that is known of a model's adds, in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import dedent
from typing import Any

from .. import sources
from ..codes import CODES
from ..colours import colour
from ..errors import ConversionError
from ..listing import compact, number, short
from .markup import Markup, joined, tag
from .short import ROOT, modules
from .style import SCRIPT, policy, style

_AROUND = 3
"""Source lines that are shown before and after an add's own."""
_LONGEST = 20
"""Source lines of one add that are shown."""

_Dict = Mapping[str, Any]


def document(
    report: _Dict,
    facts: Sequence[str],
    *,
    drawing: str = "",
    diff: str = "",
    validation: _Dict | None = None,
    isometry: _Dict | None = None,
) -> str:
    """The text of an HTML file. It needs no network, and all but the filter of its table works without scripts.

    Args:
        report: `Report.to_dict()`.
        facts: lines of the summary: totals, today's alphas.
        drawing: the residual streams, SVG as `pictures.svg` makes it; it is not escaped.
        diff: a unified diff of the rewritten source.
        validation: `Validation.to_dict()`.
        isometry: `Isometry.to_dict()`.
    """
    title = report["title"] or "model"
    parts = [
        ("summary", "Summary", _summary(report, facts)),
        ("streams", "Residual streams", tag("div", Markup(_element(drawing)), class_="picture") if drawing else ""),
        ("adds", "Adds", _adds(report["groups"])),
        ("diff", "Diff", _diff(diff) if diff else ""),
        ("validation", "Validation", _validation(validation) if validation else ""),
        ("isometry", "Isometry", _isometry(isometry) if isometry else ""),
    ]
    there = [(name, heading, content) for name, heading, content in parts if content]
    body = tag(
        "main",
        tag("header", tag("h1", title), _lead(report), _counts(report["counts"])),
        tag("nav", (tag("a", heading, href=f"#{name}") for name, heading, _ in there)),
        (tag("section", tag("h2", heading), content, id=name) for name, heading, content in there),
        tag("footer", "made by rezero_convert"),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy()),
        tag("title", f"{title}: residual blocks"),
        tag("style", Markup(style())),
    )
    script = tag("script", Markup(SCRIPT)) if report["groups"] else ""
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, script), lang='en')}\n"


# Summary


def _lead(report: _Dict) -> Markup:
    state = "what the conversion did" if report["converted"] else "what the conversion does"
    return tag("p", f"Every add of tensors, and {state}.", class_="soft")


def _counts(counts: Mapping[str, int]) -> Markup:
    shown = [(verdict, count) for verdict, count in counts.items() if count]
    return tag(
        "ul",
        (tag("li", tag("b", str(count)), verdict, class_=f"v-{colour(verdict)}") for verdict, count in shown),
        class_="counts",
    )


def _summary(report: _Dict, facts: Sequence[str]) -> Markup:
    options = report["options"]
    rows = [("captured", report["route"]), ("options", ", ".join(_options(options)))]
    return joined(
        tag("dl", _defined((name, value) for name, value in rows if value)),
        (tag("p", fact) for fact in facts),
        tag("ul", (tag("li", note) for note in report["notes"])) if report["notes"] else "",
    )


def _options(options: _Dict) -> list[str]:
    """The options by name and value; those that are off or empty are left out, but for the norms."""
    shown = {**options, "drop_norm": options["drop_norm"] or ["none"]}
    return [
        f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in shown.items()
        if value is not None and value is not False and value != []
    ]


def _defined(rows: Iterable[tuple[str, str]]) -> Iterable[Markup]:
    return (joined(tag("dt", name), tag("dd", value)) for name, value in rows)


def _element(drawing: str) -> str:
    """An SVG file as an element of a page."""
    return drawing[drawing.index("<svg") :]


# Adds


def _adds(groups: Sequence[_Dict]) -> Markup:
    if not groups:
        return tag("p", "There are none.")
    columns = ("verdict", "source", "modules", "gates", "what and why")
    codes = dict.fromkeys(group["code"] for group in groups)
    return joined(
        _filter(dict.fromkeys(group["verdict"] for group in groups)),
        tag(
            "table",
            tag("thead", tag("tr", (tag("th", name) for name in columns))),
            tag("tbody", map(_row, groups)),
            class_="adds",
        ),
        tag("dl", _defined((code, CODES.get(code, "")) for code in sorted(codes))),
    )


def _filter(verdicts: Iterable[str]) -> Markup:
    """Shown by the script that it works by."""
    words = "filter by words"
    boxes = (
        tag("label", tag("input", type="checkbox", value=verdict, checked=True, autocomplete="off"), f" {verdict}")
        for verdict in verdicts
    )
    search = tag("input", type="search", placeholder=words, aria_label=words, autocomplete="off")
    return tag("form", search, boxes, tag("output", class_="soft"), class_="filter", hidden=True)


def _row(group: _Dict) -> Markup:
    verdict, count = group["verdict"], group["count"]
    every = tag(
        "details", tag("summary", f"all {count}"), (tag("div", tag("code", one or ROOT)) for one in group["paths"])
    )
    about = ", ".join(part for part in (group["class"], group["form"]) if part)
    cells = (
        (tag("span", verdict, class_="mark"), tag("code", group["code"])),
        (tag("span", group["where"], class_="soft"), tag("code", group["text"]), _excerpt(group)),
        (tag("code", modules(group)), tag("span", about, class_="soft"), every if count > 1 else ""),
        tuple(tag("code", alpha) for alpha in group["alphas"]),
        tuple(tag("span", remark) for remark in group["remarks"]),
    )
    row = (tag("td", (joined(part, "\n") for part in cell if part)) for cell in cells)
    return tag("tr", row, class_=f"v-{colour(verdict)}", data_verdict=verdict, data_count=f"{count}")


def _excerpt(group: _Dict) -> str:
    """The source around an add; "" if its text is not to be had, or is no longer that of the report."""
    span = group["shown"]
    try:
        rows = sources.lines(span["file"]) if span else ()
    except ConversionError:
        return ""
    if not rows or group["text"] not in "".join(rows[span["line"] - 1 : span["end_line"]]):
        return ""
    first, last = span["line"], min(span["end_line"], span["line"] + _LONGEST)
    start, end = max(1, first - _AROUND), min(len(rows), last + _AROUND)
    shown = dedent("".join(rows[start - 1 : end])).split("\n")
    numbered = zip(range(start, end + 1), shown, strict=False)
    lines = ((f"{line:5}  {row.rstrip()}", "hit" if first <= line <= last else "") for line, row in numbered)
    return tag("details", tag("summary", "source"), _text(lines))


# What else was computed


def _diff(diff: str) -> Markup:
    return _text((line, _side(line)) for line in diff.rstrip("\n").split("\n"))


def _text(lines: Iterable[tuple[str, str]]) -> Markup:
    """Lines of text, each with its class."""
    return tag("pre", (joined(tag("span", line or " ", class_=kind), "\n") for line, kind in lines))


def _side(line: str) -> str:
    if line.startswith(("+++ ", "--- ")):
        return "line-file"
    return {"+": "line-add", "-": "line-cut", "@": "line-at"}.get(line[:1], "")


def _validation(validation: _Dict) -> Markup:
    blocks, failures, asleep = validation["blocks"], validation["failures"], validation["asleep"]
    held = tag("span", "does not hold", class_="failed") if failures else tag("span", "holds", class_="ok")
    checks = (tag("li", _status(check), f" {_told(check)}") for check in validation["checks"])
    notes = [f"asleep until the second step, behind another zero gate: {', '.join(asleep)}"] if asleep else []
    return joined(
        tag("p", "The conversion ", held, f": {number(len(blocks), 'block')} checked."),
        tag("ul", (tag("li", line, class_="failed") for line in failures)) if failures else "",
        _checked(blocks) if blocks else "",
        tag("ul", checks),
        (tag("p", note) for note in (*notes, *validation["notes"])),
    )


def _checked(blocks: Sequence[_Dict]) -> Markup:
    """A row for the blocks of one line with equal results, a column for each check."""
    names = list(dict.fromkeys(check["name"] for block in blocks for check in block["checks"]))
    head = tag("tr", (tag("th", name) for name in ("gates of a block", *names)))
    alike: dict[tuple[str, ...], list[str]] = {}
    for block in blocks:
        found = ([check for check in block["checks"] if check["name"] == name] for name in names)
        alike.setdefault((block["where"], *map(_worst, found)), []).append(", ".join(block["alphas"]))
    body = tag("tbody", (_blocks(gates, *shown) for shown, gates in alike.items()))
    return tag("div", tag("table", tag("thead", head), body, class_="checks"), class_="wide")


def _blocks(gates: Sequence[str], where: str, *results: str) -> Markup:
    times = f" (x {len(gates)})" if len(gates) > 1 else ""
    who = tag("td", tag("code", compact(gates) + times), " ", tag("span", _shown(where), class_="soft"))
    return tag("tr", who, (tag("td", result) for result in results))


def _shown(where: str) -> str:
    file, colon, rest = where.partition(":")
    return f"{short(file)}{colon}{rest}"


def _worst(checks: Sequence[_Dict]) -> str:
    """What the modes of one check come to."""
    for check in sorted(checks, key=lambda check: (check["ok"], check["choice"])):
        return _status(check)
    return ""


def _status(check: _Dict) -> Markup:
    if check["ok"]:
        return tag("span", "ok", class_="ok")
    return tag("span", "by choice", class_="choice") if check["choice"] else tag("span", "FAILED", class_="failed")


def _told(check: _Dict) -> str:
    mode = "" if check["mode"] == "structure" else f" ({check['mode']})"
    return f"{check['name']}{mode}: {check['detail']}".rstrip(": ")


def _isometry(isometry: _Dict) -> Markup:
    """The histogram of log10 of the singular values of the residual stream's Jacobian, as bars."""
    begin, end = (path or ROOT for path in isometry["stream"])
    shares = [("zero", isometry["zero"])] if isometry["zero"] else []
    shares += [(f"{one['low']:g} to {one['high']:g}", one["share"]) for one in isometry["histogram"]]
    most = max((share for _, share in shares), default=0) or 1
    rows = (
        tag("tr", tag("td", name), tag("td", f"{share:.1%}"), tag("td", _bar(share / most))) for name, share in shares
    )
    head = tag("tr", (tag("th", name) for name in ("log10 of the value", "share", "")))
    values = ", ".join(
        f"{name} {isometry[key]:.4g}"
        for name, key in (("mean square", "mean_squared"), ("median", "median"), ("largest", "largest"))
    )
    return joined(
        tag("p", f"Singular values of the Jacobian from {begin} to {end} ({isometry['method']}): {values}."),
        tag("table", tag("thead", head), tag("tbody", rows), class_="bars"),
        (tag("p", note) for note in isometry["notes"]),
    )


def _bar(part: float) -> Markup:
    return tag("span", class_="bar", style=f"width:{part:.1%}")
