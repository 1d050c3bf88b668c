"""What can go wrong, as types."""

from __future__ import annotations


class ConversionError(Exception):
    """A model or file could not be converted; the message says what and where, on one line."""


class NoEffectWarning(UserWarning):
    """A conversion found nothing to rewrite."""
