"""Reports as HTML: one self-contained page, and short forms for notebooks."""

from __future__ import annotations

from .document import document
from .short import brief, outcome

__all__ = ["brief", "document", "outcome"]
