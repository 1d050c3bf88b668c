"""Checkpoints: the original's into a converted model and back, and those that transformers writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import convert, copied
from .errors import ConversionError
from .listing import compact, number
from .plan import as_dict
from .rewrite import modules, restore
from .rewrite.changes import Added, Biased, Dropped, Emptied, Entry, Folded, Overwritten
from .rewrite.marker import marker, shown, unmark


@dataclass(frozen=True, slots=True)
class StateAccount:
    """What became of every key of an original's state dict, and of every key of the converted model. `print` it."""

    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    """In the checkpoint only: the parameters and buffers of norms that were dropped."""
    held: tuple[str, ...]
    """In both, and the model's value stays: gates of the original that were set to a start value, and zeros that were
    undone (alpha and branch would never get a gradient)."""
    new: tuple[str, ...]
    """In the model only: alphas, and biases that stand in for a norm's; they stay as they are."""

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, **as_dict(self)}

    def __str__(self) -> str:
        rows = (
            ("loaded", self.loaded, ""),
            ("dropped", self.dropped, "norms that the conversion dropped: "),
            ("held", self.held, "set by the conversion: "),
            ("new", self.new, "made by the conversion: "),
        )
        return "\n".join(
            f"{name:8}{number(len(keys), 'key')}{f': {why}{shown(keys)}' if why and keys else ''}"
            for name, keys, why in rows
        )


def load_original_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False) -> StateAccount:
    """Load a checkpoint of the original model into a converted one, in place.

    Gates keep their present values. Only in preserve mode, norms kept, the model then computes what the original did.

    Args:
        model: a converted model.
        state: the original's `state_dict()`: parameters and buffers by name, shapes as in the model.
        assign: as for `nn.Module.load_state_dict`: take the given tensors themselves, with their dtypes and devices.

    Returns:
        What was loaded, what was left out, and what is new.

    Raises:
        ConversionError: the model is not converted, or was folded; a key is neither the model's nor that of something
            the conversion dropped; a key is missing that the conversion did not make; a shape differs. Nothing is
            loaded then.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> account = rz.load_original_state_dict(rz.convert(layer, x), layer.state_dict())
        >>> account.dropped
        ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias')
        >>> account.new
        ('alpha_self_attn', 'alpha_linear2')
    """
    _converted(model)
    entries = list(_entries(model))
    if any(isinstance(entry, (Folded, Emptied)) for _, entry in entries):
        raise ConversionError("the model's gates are folded into its weights: load before folding, or unconvert first")
    own = model.state_dict(keep_vars=True)
    gone = tuple(f"{path}{entry.key}." for path, entry in entries if isinstance(entry, Dropped))
    dropped = tuple(key for key in state if key not in own and key.startswith(gone))
    unknown = [key for key in state if key not in own and key not in dropped]
    held = tuple(key for key in state if key in own and _is_held(key, state[key], entries))
    loaded = tuple(key for key in state if key in own and key not in held)
    made = tuple(f"{path}{entry.name}" for path, entry in entries if isinstance(entry, Added))
    made += tuple(f"{path}bias" for path, entry in entries if isinstance(entry, Biased))
    new = tuple(key for key in own if key in made or key.startswith(tuple(f"{name}." for name in made)))
    tied = {id(own[key]) for key in (*loaded, *held)}
    missing = [key for key in own if key not in state and key not in new and id(own[key]) not in tied]
    shapes = [key for key in loaded if isinstance(own[key], Tensor) and own[key].shape != state[key].shape]
    for keys, what in (
        (unknown, "neither the model's nor those of a dropped norm"),
        (missing, "missing, and not made by the conversion"),
        (shapes, "of another shape in the model"),
    ):
        if keys:
            raise ConversionError(f"{type(model).__qualname__}: {number(len(keys), 'key')} {what}: {compact(keys)}")
    model.load_state_dict({key: state[key] for key in loaded}, strict=False, assign=assign)
    return StateAccount(loaded, dropped, held, new)


def original_state_dict(model: nn.Module, *, lossy: bool = False) -> dict[str, Any]:
    """The state of a converted model under the original's keys, in the original's order.

    The original computes the same with it only where gates are 1 and norms and activations were kept. Gates that are
    not 1 can be brought into the weights first: `original_state_dict(fold(model, example_inputs))`.

    Args:
        model: a converted model; it is left as it is, and shares its tensors with the result.
        lossy: give what there is all the same, dropped norms at their start values; a warning says what is lost.

    Raises:
        ConversionError: the original would compute something else, and `lossy` is not asked for; or the model is not
            converted, or cannot be copied.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> model = rz.convert(layer, x, alpha_init="preserve")
        >>> rz.original_state_dict(model).keys() == layer.state_dict().keys()
        True
    """
    _converted(model)
    lost = _lost(model)
    if lost and not lossy:
        raise ConversionError(
            f"{type(model).__qualname__}: the original would not compute the same: {'; '.join(lost)}; "
            "lossy=True gives the state all the same"
        )
    tensors = (*model.parameters(), *model.buffers())
    twin = copied(model, {id(tensor): tensor for tensor in tensors})
    restore.restore(twin)
    if lost:
        warnings.warn(f"the original will not compute the same: {'; '.join(lost)}", UserWarning, stacklevel=2)
    return twin.state_dict()


def from_pretrained(
    cls: Any, path: Any, *args: Any, example_inputs: Any = None, norm_types: Any = None, **kwargs: Any
) -> Any:
    """Load a converted model that transformers' `save_pretrained` wrote, sharded or not, as a converted model.

    The files name the original class; `cls.from_pretrained` would build it without gates, with fresh norms, and say so
    in transformers' own report of unexpected and missing keys only. Here the model is built on the meta device,
    converted again with the options that the configuration keeps, and must have the gates that it had.

    Args:
        cls: the model's class, or an Auto class.
        path: a directory, or a repository's name.
        *args: for `cls.from_pretrained`.
        example_inputs: for `convert`, where they cannot be inferred.
        norm_types: as given to `convert`: classes are not kept in a configuration.
        **kwargs: for `cls.from_pretrained`: `dtype`, `device_map`, `revision`, `output_loading_info`, ...

    Returns:
        What `cls.from_pretrained` returns. Of a model that was folded, the folded gates are at 1.

    Raises:
        ConversionError: the configuration says nothing of a conversion; the conversion gives other gates than the saved
            model had (another version, other options); a gate is not in the files.
    """
    config = kwargs.pop("config", None)
    if config is None:
        from transformers import AutoConfig

        names = ("revision", "cache_dir", "token", "trust_remote_code", "subfolder", "local_files_only")
        config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in names if name in kwargs})
    noted = getattr(config, "rezero_convert", None)
    if not isinstance(noted, dict):
        raise ConversionError(f"{path}: its configuration says of no conversion; load it with {cls.__name__} itself")
    if hasattr(cls, "from_config"):  # an Auto class
        with torch.device("meta"):
            cls = type(cls.from_config(config))
    wants_info = kwargs.pop("output_loading_info", False)
    loader = _loader(cls, noted, example_inputs, norm_types)
    model, info = loader.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
    _without_values(path, model, info, noted.get("folded", ()))
    return (model, info) if wants_info else model


def _loader(cls: Any, noted: Mapping[str, Any], example_inputs: Any, norm_types: Any) -> Any:
    """A class whose constructor gives a converted model of `cls`: its gates are then loaded as any key."""

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        object.__setattr__(self, "__class__", cls)
        for module in self.modules():
            unmark(ExitStack(), module)
        with torch.device("cpu"):  # transformers constructs under meta; example inputs are real
            for options in noted["conversions"]:
                convert(self, example_inputs, inplace=True, verify=False, norm_types=norm_types, **options)
        found = (marker(self) or {}).get("gates")
        if found not in (noted["gates"], *noted.get("inside", {}).values()):
            raise ConversionError(
                f"{cls.__name__}: the saved model had the gates {noted['gates']}, converting it now gives {found}"
            )

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _without_values(path: Any, model: nn.Module, info: Mapping[str, Any], folded: Any) -> None:
    """Gates that are not in the files: 1 if they were folded into the weights."""
    missing = set(info["missing_keys"])
    absent = [(name, gate) for name, gate in modules.alphas(model) if name in missing]
    lacking = [name for name, _ in absent if name not in folded]
    if lacking:
        raise ConversionError(f"{path}: {number(len(lacking), 'gate')} not in the files: {compact(lacking)}")
    with torch.no_grad():
        for _, gate in absent:
            gate.fill_(1.0)


def _converted(model: nn.Module) -> None:
    if not restore.is_converted(model):
        raise ConversionError(f"{type(model).__qualname__} is not a converted model")


def _entries(model: nn.Module) -> Iterator[tuple[str, Entry]]:
    """All records of the conversion, with the prefix of their modules' keys."""
    for path, module in model.named_modules(remove_duplicate=False):
        for entry in module.__dict__.get("rezero_undo", ()):
            yield f"{path}." if path else "", entry


def _is_held(key: str, value: Tensor, entries: list[tuple[str, Entry]]) -> bool:
    whys = [entry.why for path, entry in entries if isinstance(entry, Overwritten) and f"{path}{entry.name}" == key]
    return "gate" in whys or ("repair" in whys and not value.count_nonzero())


def _lost(model: nn.Module) -> list[str]:
    """Why the original would compute something else, one phrase each."""
    entries = list(_entries(model))
    made = [f"{path}{entry.name}" for path, entry in entries if isinstance(entry, Added)]
    named = dict(model.named_parameters(remove_duplicate=False))
    gates = [key for key in named if key in made or key.startswith(tuple(f"{name}." for name in made))]
    norms = [f"{path}{entry.key}" for path, entry in entries if isinstance(entry, Dropped)]
    biases = [f"{path}bias" for path, entry in entries if isinstance(entry, Biased)]
    plans = [(path, plan) for path, module in model.named_modules() if (plan := modules.record(module)) is not None]
    edited = [(f"{path}.{site.path}".strip(".") or "the model", site) for path, plan in plans for site in plan.edited]
    moved = [at for at, site in edited if site.activation is not None and site.activation.action == "move"]
    placed = [at for at, site in edited if site.move is not None]
    lost: list[tuple[list[str], Callable[[int], str]]] = [
        ([key for key in gates if not bool((named[key] == 1).all())], lambda n: f"{number(n, 'gate')} not at 1"),
        (norms, lambda n: f"{number(n, 'norm')} dropped"),
        (moved, lambda n: f"{number(n, 'activation')} moved into the branch of"),
        (placed, lambda n: f"{number(n, 'norm')} moved in"),
        ([key for key in biases if named[key].count_nonzero()], lambda n: "what was trained in a norm's place:"),
    ]
    return [f"{phrase(len(keys))} ({compact(dict.fromkeys(keys))})" for keys, phrase in lost if keys]
