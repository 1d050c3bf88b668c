"""HTML that is well-formed and escaped by construction: what is not `Markup` is text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ..listing import clean

_VOID = frozenset({"input", "meta"})
_LINES = frozenset(
    "dd details div dl dt h1 h2 head header li main nav p pre section summary table tbody td th thead tr ul".split()
)
"""Elements whose end ends a line."""


class Markup(str):
    """HTML. Any other string is escaped where it is put into this."""

    __slots__ = ()


def tag(name: str, *children: str | Iterable[str], **attributes: str | bool) -> Markup:
    """An element.

    Args:
        name: of the element.
        *children: elements and texts, or iterables of them.
        **attributes: by name; `_` at the end is dropped, within it stands for `-`. True: without a value, "" or False:
            left out.
    """
    start = "".join([name, *(_attribute(key, value) for key, value in attributes.items() if value)])
    end = "" if name in _VOID else f"</{name}>"
    return Markup(f"<{start}>{joined(*children)}{end}" + ("\n" if name in _LINES else ""))


def joined(*children: str | Iterable[str]) -> Markup:
    """Elements and texts one after the other."""
    flat = (one for child in children for one in ((child,) if isinstance(child, str) else child))
    return Markup("".join(one if isinstance(one, Markup) else escape(clean(one)) for one in flat))


def _attribute(name: str, value: str | bool) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(clean(str(value)))}"'
