"""Drawings of residual streams: traces and a report become a `Picture`, and that an SVG file."""

from __future__ import annotations

from .records import Picture
from .scene import picture
from .svg import svg

__all__ = ["Picture", "picture", "svg"]
