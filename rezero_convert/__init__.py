"""Rewrites the residual blocks of a PyTorch model, `x + F(x)`, into ReZero blocks, `x + alpha * F(x)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import SourceResult, audit, audit_source, convert, convert_source, unconvert
    from .drawing import draw, page
    from .errors import ConversionError, NoEffectWarning
    from .folding import fold
    from .graph_pass import ReZeroPass
    from .instruments.groups import param_groups
    from .plan import Options, Plan
    from .report import Report
    from .rewrite.modules import alphas
    from .validation import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "audit",
    "convert",
    "unconvert",
    "validate",
    "draw",
    "page",
    "alphas",
    "param_groups",
    "fold",
    "convert_source",
    "audit_source",
    "ReZeroPass",
    "Report",
    "Plan",
    "Options",
    "Validation",
    "SourceResult",
    "ConversionError",
    "NoEffectWarning",
]

_HOMES = {
    "audit": "api",
    "convert": "api",
    "unconvert": "api",
    "convert_source": "api",
    "audit_source": "api",
    "SourceResult": "api",
    "ReZeroPass": "graph_pass",
    "draw": "drawing",
    "page": "drawing",
    "validate": "validation",
    "Validation": "validation",
    "alphas": "rewrite.modules",
    "param_groups": "instruments.groups",
    "fold": "folding",
    "Report": "report",
    "Plan": "plan",
    "Options": "plan",
    "ConversionError": "errors",
    "NoEffectWarning": "errors",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `--help` and `--version` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
