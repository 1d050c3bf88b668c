"""The colours of verdicts, in drawings and pages."""

from __future__ import annotations

KINDS = {
    "converted": ("gated by the conversion", "#1a7f4b", "#4cc38a"),
    "gated": ("gated already", "#2563ab", "#6ea8fe"),
    "refused": ("refused", "#b3362b", "#ff8a7a"),
    "long-skip": ("long skip", "#9a6a00", "#e3b341"),
    "shortcut": ("projection shortcut", "#7a3fb0", "#c297ff"),
    "reads": ("reads another stream", "#0b7285", "#56c7d6"),
    "other": ("interior, not executed, hidden", "#6b6b6b", "#a5a5a5"),
    "plain": ("other operations, concatenation", "#57606a", "#9aa4ae"),
}
"""What the colours stand for, in light and in dark mode."""

_OWN = ("converted", "gated", "refused", "long-skip")
"""Verdicts with a colour of their own."""


def colour(verdict: str) -> str:
    """Which of `KINDS` a verdict is shown as; that of "" is plain."""
    return verdict if verdict in _OWN else "other" if verdict else "plain"
