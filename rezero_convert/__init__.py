"""Rewrites the residual blocks of a PyTorch model, `x + F(x)`, into ReZero blocks, `x + alpha * F(x)`."""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import SourceResult, audit, audit_source, convert, convert_source, unconvert
    from .checkpoints import StateAccount, from_pretrained, load_original_state_dict, original_state_dict
    from .drawing import draw, page
    from .errors import ConversionError, NoEffectWarning
    from .folding import fold
    from .graph_pass import ReZeroPass
    from .instruments.callbacks import tensorboard
    from .instruments.groups import param_groups
    from .instruments.growing import grow
    from .instruments.isometry import Isometry, isometry
    from .instruments.racing import Race, Run, race
    from .instruments.tracker import AlphaTracker, Reading
    from .plan import Options, Plan
    from .report import Report
    from .rewrite.modules import alphas
    from .tracing import trace
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
    "isometry",
    "AlphaTracker",
    "tensorboard",
    "grow",
    "race",
    "fold",
    "load_original_state_dict",
    "original_state_dict",
    "from_pretrained",
    "convert_source",
    "audit_source",
    "ReZeroPass",
    "trace",
    "Report",
    "Plan",
    "Options",
    "Validation",
    "StateAccount",
    "Isometry",
    "Reading",
    "Race",
    "Run",
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
    "trace": "tracing",
    "draw": "drawing",
    "page": "drawing",
    "validate": "validation",
    "Validation": "validation",
    "alphas": "rewrite.modules",
    "param_groups": "instruments.groups",
    "isometry": "instruments.isometry",
    "Isometry": "instruments.isometry",
    "AlphaTracker": "instruments.tracker",
    "Reading": "instruments.tracker",
    "tensorboard": "instruments.callbacks",
    "grow": "instruments.growing",
    "race": "instruments.racing",
    "Race": "instruments.racing",
    "Run": "instruments.racing",
    "fold": "folding",
    "load_original_state_dict": "checkpoints",
    "original_state_dict": "checkpoints",
    "from_pretrained": "checkpoints",
    "StateAccount": "checkpoints",
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
    state = random.getstate()
    try:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    finally:
        random.setstate(state)  # rich draws a number when it is imported
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
