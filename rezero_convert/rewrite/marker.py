"""What the configuration of a transformers model says of its conversion, for `from_pretrained`.

`save_pretrained` writes the configuration and the name of the class, not the class itself: whatever loads the files
again builds the original, without gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..listing import compact
from ..plan import Options, as_dict
from .changes import delete, put

MARKER = "rezero_convert"
"""The configuration's entry."""


def marker(model: nn.Module) -> dict[str, Any] | None:
    """What the model's configuration says of a conversion, if anything."""
    config = _config(model)
    found = None if config is None else config.__dict__.get(MARKER)
    return found if isinstance(found, dict) else None


def mark(undo: ExitStack, model: nn.Module, options: Options, gates: Iterable[str], *, again: bool) -> None:
    """Write a conversion into the configurations of a transformers model and of those in it, which may be saved alone.

    Behind earlier conversions if it is done `again`. Models that share a configuration share the entry.
    """
    names = list(gates)
    first: dict[int, dict[str, Any]] = {}
    for path, module in model.named_modules():
        config = _config(module)
        own = _below(path, names) if config is not None else []
        if not own:
            continue
        if id(config) in first:
            first[id(config)].setdefault("inside", {})[path] = shown(own)
            continue
        before = again or (path != "" and "rezero_plan" in module.__dict__)
        done = (marker(module) or {}).get("conversions", []) if before else []
        first[id(config)] = {"conversions": [*done, _asked(options, path)], "gates": shown(own)}
        put(undo, config.__dict__, MARKER, first[id(config)])


def mark_folded(undo: ExitStack, model: nn.Module, gates: Iterable[str]) -> None:
    """Write that these gates are in the weights."""
    names = list(gates)
    for path, module in model.named_modules():
        config, found = _config(module), marker(module)
        if config is None or found is None:
            continue
        if own := _below(path, names):
            put(undo, config.__dict__, MARKER, {**found, "folded": sorted({*found.get("folded", []), *own})})


def _below(path: str, names: list[str]) -> list[str]:
    """The names of what is in the module at `path`, as it has them."""
    prefix = f"{path}." if path else ""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def unmark(undo: ExitStack, model: nn.Module) -> None:
    """Take the entry out."""
    config = _config(model)
    if config is not None and MARKER in config.__dict__:
        delete(undo, config.__dict__, MARKER)


def shown(gates: Iterable[str]) -> str:
    """All gates by name, numbers folded: `h.{0..11}.alpha_attn, h.{0..11}.alpha_mlp`."""
    names = list(gates)
    return compact(names, limit=len(names))


def _asked(options: Options, path: str) -> dict[str, Any]:
    """The options that have another value than the default; patterns of paths from the module at `path`."""
    default = Options()
    names = [field.name for field in dataclasses.fields(Options)]
    asked = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(default, name)}
    if options.preserve:  # it changes the defaults of these
        asked |= {"drop_norm": options.drop_norm or ("none",), "activation": options.activation}
    elif not options.drop_norm:
        asked["drop_norm"] = ("none",)
    for name in {"include", "exclude"} & asked.keys() if path else ():
        asked[name] = tuple(pattern.removeprefix(f"{path}.") for pattern in asked[name])
    return {name: as_dict(value) for name, value in asked.items()}


def _config(model: nn.Module) -> Any:
    """The configuration that the model's own `save_pretrained` writes."""
    config = model.__dict__.get("config")
    if config is None:
        return None
    saved = hasattr(type(model), "save_pretrained") and hasattr(type(config), "to_diff_dict")
    return config if saved else None
