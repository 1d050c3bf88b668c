"""The way back: the original classes, adds and names of a converted model."""

from __future__ import annotations

import copy
import itertools
from contextlib import ExitStack
from types import CodeType

import torch
from torch import fx, nn

from ..errors import ConversionError
from .changes import (
    RECORDS,
    Added,
    Biased,
    Dropped,
    Emptied,
    Entry,
    Folded,
    Held,
    Overwritten,
    Regraphed,
    Unread,
    delete,
    floats,
    put,
    rebind,
    regrown,
    replace,
    set_class,
    set_graph,
)
from .marker import unmark
from .subclass import code_changes, recipe_of


def is_converted(model: nn.Module) -> bool:
    """Whether any module of `model` was converted."""
    return any(
        recipe_of(type(one)) is not None or any(key in one.__dict__ for key in RECORDS) for one in model.modules()
    )


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo the conversion of `model`, in place; after an error it is as it was.

    Returns:
        What is not as it was before the conversion, one phrase each.

    Raises:
        ConversionError: a class was derived from a converted one.
    """
    counts: dict[str, int] = {}
    with ExitStack() as undo:
        changed: dict[int, list[tuple[CodeType, CodeType]]] = {}
        for path, module in list(model.named_modules()):
            recipe = recipe_of(type(module))
            if recipe is not None:
                changed[id(module)] = code_changes(type(module), recipe.original)
                set_class(undo, module, recipe.original)
            elif hasattr(type(module), "rezero_recipe"):
                raise ConversionError(
                    f"{path or 'the model'}: {type(module).__qualname__} is derived from a converted class"
                )
        rebind(undo, model, changed)
        made: dict[int, nn.Module] = {}
        for module in list(model.modules()):
            for entry in reversed(_records(module)):
                what = _undone(undo, model, module, entry, made)
                if what is not None:
                    counts[what] = counts.get(what, 0) + 1
            unmark(undo, module)
            for name in RECORDS:
                if name in module.__dict__:
                    delete(undo, module.__dict__, name)
        undo.pop_all()
    return tuple(_phrase(what, count) for what, count in counts.items())


def _records(module: nn.Module) -> tuple[Entry, ...]:
    entries: tuple[Entry, ...] = module.__dict__.get("rezero_undo", ())
    return entries


_PHRASES = {
    "norm": ("dropped norm was made anew at its start values", "dropped norms were made anew at their start values"),
    "parameter": ("parameter of a dropped norm was made anew", "parameters of dropped norms were made anew"),
    "bias": ("trained bias that a norm had provided stays", "trained biases that norms had provided stay"),
    "gate": ("gate of the original keeps its present value", "gates of the original keep their present values"),
    "fold": ("folded gate stays in its branch's weights", "folded gates stay in their branches' weights"),
    "start": ("start value that the method set stays", "start values that the method set stay"),
    "repair": ("undone zero initialization stays undone", "undone zero initializations stay undone"),
}


def _phrase(what: str, count: int) -> str:
    return f"{count} {_PHRASES[what][count > 1]}"


def _undone(
    undo: ExitStack, model: nn.Module, module: nn.Module, entry: Entry, made: dict[int, nn.Module]
) -> str | None:
    """Take one change back, or say what stays."""
    match entry:
        case Added(name):
            for mapping in (module._parameters, module._modules):
                if name in mapping:
                    delete(undo, mapping, name)
        case Held(name, before):
            put(undo, module.__dict__, name, before)
        case Regraphed(before):
            assert isinstance(module, fx.GraphModule)
            if before is None:
                raise ConversionError("the graph before the conversion is gone: the model was pickled since")
            set_graph(undo, module, before)
        case Overwritten(_, why):
            return why
        case Biased(present):
            return _unbiased(undo, module, present)
        case Folded() | Emptied():
            return _unfolded(undo, model, module, entry)
        case Unread():
            return _reread(undo, model, module, entry)
        case Dropped():
            return _regrown(undo, model, module, entry, made)
    return None


def _unfolded(undo: ExitStack, model: nn.Module, module: nn.Module, entry: Folded | Emptied) -> str | None:
    """Put a gate of the original back, at 1; one of ours is not missed."""
    like = next(itertools.chain(floats(module), floats(model), [torch.empty(0)]))
    if isinstance(entry, Emptied):
        child = copy.deepcopy(entry.blank).train(module.training)
        put(undo, module._modules, entry.key, child.to(like.device, like.dtype))
        return None
    if entry.own:
        ones = torch.ones_like(entry.value, device=like.device, dtype=like.dtype)
        put(undo, module._parameters, entry.name, nn.Parameter(ones))
    return "fold"


def _reread(undo: ExitStack, model: nn.Module, module: nn.Module, entry: Unread) -> str | None:
    """Put back what a norm written out in a graph reads: parameters at their start values."""
    like = next(itertools.chain(floats(module), floats(model), [entry.blank]))
    tensor, mapping = entry.blank, module._buffers
    value: torch.Tensor = tensor.to(like.device) if not tensor.is_meta else tensor
    if isinstance(tensor, nn.Parameter):
        mapping = module._parameters  # type: ignore[assignment]  # both are dictionaries of tensors
        full = torch.full_like(tensor, entry.start, device=like.device, dtype=like.dtype)
        value = nn.Parameter(full, tensor.requires_grad)
    now = {**mapping, entry.name: value}
    order = [name for name in entry.order if name in now]
    replace(undo, mapping, {name: now[name] for name in dict.fromkeys([*order, *now])})
    return "parameter" if isinstance(tensor, nn.Parameter) else None


def _unbiased(undo: ExitStack, layer: nn.Module, present: bool) -> str | None:
    bias = layer._parameters.get("bias")
    if bias is not None and not bias.is_meta and bias.detach().count_nonzero():
        return "bias"
    if present:
        put(undo, layer._parameters, "bias", None)
    else:
        delete(undo, layer._parameters, "bias")
    return None


def _regrown(
    undo: ExitStack, model: nn.Module, holder: nn.Module, entry: Dropped, made: dict[int, nn.Module]
) -> str | None:
    """Put a norm back; one that was held in two places is one module again."""
    first = id(entry.blank) not in made
    if first:
        made[id(entry.blank)] = regrown(entry, holder, model)
    norm, rest = made[id(entry.blank)], holder._modules.get(entry.key)
    for name in entry.kept:
        if rest is not None and name in rest._modules:
            norm._modules[name] = rest._modules[name]
    now = {**holder._modules, entry.key: norm}
    order = [key for key in entry.order if key in now]
    replace(undo, holder._modules, {key: now[key] for key in dict.fromkeys([*order, *now])})
    return "norm" if first else None
