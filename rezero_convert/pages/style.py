"""How the page looks, and the filter of its table. Without scripts all of the page is there, but for the filter."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from ..colours import KINDS

_LIGHT = "--paper:#fff;--face:#f6f8fa;--ink:#1f2328;--soft:#57606a;--line:#d0d7de;--hit:#fff8c5"
_DARK = "--paper:#0d1117;--face:#161b22;--ink:#e6edf3;--soft:#9aa4ae;--line:#30363d;--hit:#3a3000"

_RULES = """
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 40px 0 12px; padding-top: 8px; border-top: 1px solid var(--line) }
p { margin: 6px 0 }
a { color: inherit }
nav { margin-top: 14px }
nav a { display: inline-block; margin-right: 18px }
code, pre { font: 13px/1.5 'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace }
code { overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate }
pre { margin: 6px 0; padding: 8px 0; overflow-x: auto; background: var(--face); border: 1px solid var(--line);
  border-radius: 6px; tab-size: 4; white-space: normal }
pre span { display: block; width: max-content; min-width: 100%; padding: 0 12px; white-space: pre;
  unicode-bidi: isolate }
.soft, summary, dt, th { color: var(--soft) }
summary { cursor: pointer; font-size: 13px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 8px 0 }
dd { margin: 0; overflow-wrap: anywhere }
ul { margin: 6px 0; padding-left: 20px; overflow-wrap: anywhere }
.counts { display: flex; flex-wrap: wrap; gap: 10px; list-style: none; margin: 18px 0 0; padding: 0 }
.counts li { background: var(--face); border: 1px solid var(--line); border-left: 4px solid var(--own);
  border-radius: 6px; padding: 6px 14px }
.counts b { font-size: 20px; margin-right: 6px }
.picture { overflow-x: auto }
.picture svg { display: block; max-width: 100%; height: auto; min-width: 600px; margin: 0 auto }
.filter { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin-bottom: 12px }
.filter[hidden], tr[hidden] { display: none }
.filter input[type=search] { flex: 1 1 220px; max-width: 420px; font: inherit; padding: 5px 10px; color: inherit;
  background: var(--face); border: 1px solid var(--line); border-radius: 6px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; font-size: 13px }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { overflow-wrap: anywhere }
.adds { table-layout: fixed }
.adds th:nth-child(1) { width: 110px }
.adds th:nth-child(2) { width: 36% }
.adds th:nth-child(3) { width: 19% }
.adds th:nth-child(4) { width: 10% }
.adds td > * { display: block }
.adds td > * + * { margin-top: 3px }
.adds .soft { font-size: 13px }
.mark { font-weight: 600 }
.hit { background: var(--hit) }
.line-add { color: var(--converted); background: color-mix(in srgb, var(--converted) 10%, transparent) }
.line-cut { color: var(--refused); background: color-mix(in srgb, var(--refused) 10%, transparent) }
.line-at { color: var(--reads) }
.line-file { font-weight: 600 }
.checks td:not(:first-child) { white-space: nowrap; overflow-wrap: normal }
.checks td:first-child { min-width: 220px }
.ok { color: var(--converted) }
.choice { color: var(--long-skip) }
.failed { color: var(--refused); font-weight: 600 }
.bars { max-width: 720px }
.bars td:last-child { width: 60% }
.bar { display: block; height: 14px; min-width: 1px; border-radius: 2px; background: var(--gated) }
footer { margin-top: 48px; color: var(--soft); font-size: 13px }
@media (max-width: 760px) {
  main { padding: 16px 12px 40px }
  .adds thead { display: none }
  .adds, .adds tbody, .adds tr, .adds td { display: block; width: auto !important }
  .adds tr { padding: 10px 0; border-bottom: 1px solid var(--line) }
  .adds tr[hidden] { display: none }
  .adds td { border: 0; padding: 3px 0 }
  .adds td:empty { display: none }
  dl { grid-template-columns: minmax(0, 1fr) }
  dd { margin-bottom: 6px }
}
@media print { .filter { display: none } }
"""

SCRIPT = """
"use strict";
(() => {
  const form = document.querySelector(".filter");
  const rows = [...document.querySelectorAll(".adds tbody tr")];
  const texts = rows.map(row => {
    const copy = row.cloneNode(true);
    copy.querySelectorAll("pre").forEach(around => around.remove());
    return copy.textContent.toLowerCase();
  });
  const search = form.querySelector("[type=search]");
  const boxes = [...form.querySelectorAll("[type=checkbox]")];
  const shown = form.querySelector("output");
  const adds = some => some.reduce((sum, row) => sum + Number(row.dataset.count), 0);
  function filter() {
    const words = search.value.toLowerCase().split(/\\s+/);
    const kinds = boxes.filter(box => box.checked).map(box => box.value);
    rows.forEach((row, at) => {
      row.hidden = !(kinds.includes(row.dataset.verdict) && words.every(word => texts[at].includes(word)));
    });
    shown.textContent = `${adds(rows.filter(row => !row.hidden))} of ${adds(rows)} adds`;
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  filter();
})();
"""


def style() -> str:
    """The style sheet; the verdicts have the colours that they have in the drawing."""
    light = ";".join([_LIGHT, *_shades((kind, shade) for kind, (_, shade, _) in KINDS.items())])
    dark = ";".join([_DARK, *_shades((kind, shade) for kind, (_, _, shade) in KINDS.items())])
    scheme = (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )
    verdicts = "\n".join(f".v-{kind} {{ --own: var(--{kind}) }}" for kind in KINDS)
    return f"{scheme}{_RULES}{verdicts}\n.mark {{ color: var(--own) }}\n"


def policy() -> str:
    """What a browser may load and run for the page: nothing but the style and the one script in it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def _shades(kinds: Iterable[tuple[str, str]]) -> list[str]:
    return [f"--{kind}:{shade}" for kind, shade in kinds]
