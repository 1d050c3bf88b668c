"""Changes of a live model that can be taken back, and what a converted module remembers of them for `unconvert`.

A module's records are in its `__dict__` (`rezero_gates`, `rezero_undo`, and the root's `rezero_plan`): they travel with
copies and pickles, and no parameter, state-dict entry or submodule shows them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .recompile import closed_over, moved, parts, rebuilt

RECORDS = ("rezero_gates", "rezero_undo", "rezero_plan")
CALLABLES = (FunctionType, MethodType, functools.partial)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Added:
    """A new gate, a parameter or a list of them; or a new bias beside its weight in a flat graph."""

    name: str
    start: float = 0.0


@dataclass(frozen=True, slots=True)
class Overwritten:
    """A parameter whose value was set, and stays as it is: a gate that was there, or an undone zero initialization."""

    name: str
    why: str
    """"gate" or "repair"."""
    start: float = 0.0
    """What a gate was set to."""


@dataclass(frozen=True, slots=True)
class Biased:
    """A layer was given a bias."""

    present: bool
    """It had a place for one."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A child that went: a norm."""

    key: str
    order: tuple[str, ...]
    """The holder's children before."""
    blank: nn.Module
    """A copy whose parameters have no values (on the meta device)."""
    dtype: torch.dtype
    """The holder's: a norm of the same dtype follows the model to another."""
    constants: tuple[tuple[str, float], ...]
    """Start values of parameters that no `reset_parameters` sets."""
    kept: tuple[str, ...] = ()
    """Children that stayed in its place."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A parameter or buffer that only a norm written out in a graph had read: it went with the norm."""

    name: str
    order: tuple[str, ...]
    """The module's parameters or buffers before."""
    blank: Tensor
    """Without values (on the meta device) if a parameter."""
    start: float
    """What a parameter started from, as far as can be told."""


@dataclass(frozen=True, slots=True)
class Held:
    """An attribute that the instance holds itself got another value."""

    name: str
    before: Any


@dataclass(frozen=True, slots=True)
class Regraphed:
    """A graph module got another graph."""

    before: fx.Graph | None
    """None in a model that was pickled: torch.fx pickles the code of a graph, not the graph."""

    def __reduce__(self) -> tuple[type[Regraphed], tuple[None]]:
        return Regraphed, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Regraphed:
        return Regraphed(copy.deepcopy(self.before))


@dataclass(frozen=True, slots=True)
class Folded:
    """A gate that went into the weights of its branch."""

    name: str
    value: Tensor
    """What it was, and what the weights are scaled by."""
    weights: tuple[str, ...]
    """From the root."""
    own: bool
    """It was a parameter of the original, whose place is empty now."""


@dataclass(frozen=True, slots=True)
class Emptied:
    """A child that only scaled by a gate, in whose place an identity is."""

    key: str
    blank: nn.Module
    """The child with a gate of ones."""


Entry = Added | Overwritten | Biased | Dropped | Unread | Held | Regraphed | Folded | Emptied


def note(undo: ExitStack, module: nn.Module, entry: Entry) -> None:
    """Have `module` remember a change."""
    put(undo, module.__dict__, "rezero_undo", (*module.__dict__.get("rezero_undo", ()), entry))


def put(undo: ExitStack, mapping: dict[str, Any], key: str, value: Any) -> None:
    """`mapping[key] = value`."""
    if key in mapping:
        undo.callback(mapping.__setitem__, key, mapping[key])
    else:
        undo.callback(mapping.pop, key)
    mapping[key] = value


def replace(undo: ExitStack, mapping: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Give `mapping` another content, in its order."""
    before = dict(mapping)
    undo.callback(mapping.update, before)  # in the old order
    undo.callback(mapping.clear)
    content = dict(content)
    mapping.clear()
    mapping.update(content)


def delete(undo: ExitStack, mapping: dict[str, Any], key: str) -> None:
    """`del mapping[key]`."""
    replace(undo, mapping, {name: value for name, value in mapping.items() if name != key})


def fill(undo: ExitStack, parameter: Tensor, value: float) -> None:
    """Set all of a parameter."""
    if not parameter.is_meta:
        undo.callback(overwrite, parameter, parameter.detach().clone())
    with torch.no_grad():
        parameter.fill_(value)


def overwrite(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter's values."""
    with torch.no_grad():
        parameter.copy_(value)


def set_class(undo: ExitStack, instance: nn.Module, cls: type[Any]) -> None:
    """Give an instance another class."""
    undo.callback(object.__setattr__, instance, "__class__", type(instance))
    object.__setattr__(instance, "__class__", cls)


def set_graph(undo: ExitStack, module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a graph module another graph, and the code for it."""
    undo.callback(setattr, module, "graph", module.graph)
    module.graph = graph


def rebind(undo: ExitStack, model: nn.Module, changed: Mapping[int, Sequence[tuple[CodeType, CodeType]]]) -> None:
    """Renew the methods that instances hold themselves (`self.run = self._run`): they would bypass a class.

    Args:
        model: all of its modules are searched; one may hold another's bound method.
        changed: by the id of an instance, old and new code of its methods.
    """
    for holder in list(model.modules()):
        for name, value in list(holder.__dict__.items()):
            if isinstance(value, CALLABLES) or type(value) in (list, tuple, dict):
                renewed = _rebound(value, holder, changed)
                if renewed is not value:
                    put(undo, holder.__dict__, name, renewed)


def _rebound(value: Any, holder: nn.Module, changed: Mapping[int, Sequence[tuple[CodeType, CodeType]]]) -> Any:
    if type(value) is dict:
        if not any(isinstance(item, CALLABLES) for item in value.values()):
            return value
        items = {key: _rebound(item, holder, changed) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        if not any(isinstance(item, CALLABLES) for item in value):
            return value
        row = [_rebound(item, holder, changed) for item in value]
        return type(value)(row) if any(new is not old for new, old in zip(row, value, strict=True)) else value
    if not isinstance(value, CALLABLES):
        return value
    owners = [id(part.__self__) for part in parts(value) if isinstance(part, MethodType)]
    owners += map(id, closed_over(value))
    for owner in dict.fromkeys([id(holder), *owners]):
        for old, new in changed.get(owner, ()):
            value = rebuilt(value, old, new, {})
    return value


def rejoined(made: nn.Module, model: nn.Module) -> nn.Module:
    """`made`, a deep copy of `model`, with its own modules in the closures of the functions that it holds."""
    named = dict(made.named_modules())
    twins = {id(module): named[path] for path, module in model.named_modules() if path in named}
    for module in made.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, FunctionType):
                module.__dict__[name] = moved(value, twins)
    return made


def starts(owner: nn.Module) -> dict[str, float]:
    """The start values of a converted module's gates, by the parameters' names from it."""
    found: dict[str, float] = {}
    names: tuple[str, ...] = owner.__dict__.get("rezero_gates", ())
    for entry in owner.__dict__.get("rezero_undo", ()):
        if isinstance(entry, Added) or (isinstance(entry, Overwritten) and entry.why == "gate"):
            found |= {name: entry.start for name in names if name == entry.name or name.startswith(f"{entry.name}.")}
    return found


def restart(owner: nn.Module) -> None:
    """Set a converted module's gates to their start values."""
    with torch.no_grad():
        for name, value in starts(owner).items():
            owner.get_parameter(name).fill_(value)


def floats(module: nn.Module) -> Iterator[Tensor]:
    """The floating-point parameters of a module."""
    return (parameter for parameter in module.parameters() if parameter.dtype in _DTYPES)


def blank(module: nn.Module) -> nn.Module:
    """A copy of a norm with parameters on the meta device; buffers keep their values where nothing can reset them."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        tensors: list[Tensor] = list(part.parameters(recurse=False))
        if hasattr(part, "reset_parameters"):
            tensors += part.buffers(recurse=False)
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            made = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            memo[id(tensor)] = made
    return copy.deepcopy(module, memo)


def constants(module: nn.Module) -> tuple[tuple[str, float], ...]:
    """What parameters that no `reset_parameters` sets started from: 0 or 1, whichever is nearer to their mean now."""
    found = []
    for path, part in module.named_modules():
        if not hasattr(part, "reset_parameters"):
            for name, parameter in part.named_parameters(path, recurse=False):
                found.append((name, start(parameter)))
    return tuple(found)


def start(parameter: Tensor) -> float:
    """0 or 1, whichever is nearer to a parameter's mean; 1 where it has no values."""
    mean = 1.0 if parameter.is_meta else float(parameter.detach().float().mean())
    return 0.0 if abs(mean) < 0.5 else 1.0


def regrown(entry: Dropped, holder: nn.Module, model: nn.Module) -> nn.Module:
    """The dropped module at its start values, on the holder's device."""
    like = next(floats(holder), None)
    like = like if like is not None else next(floats(model), torch.empty(0, dtype=entry.dtype))
    module = copy.deepcopy(entry.blank)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_storage(parameter, entry, like), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _storage(buffer, entry, like) if buffer.is_meta else buffer.to(like.device)
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    for path, value in entry.constants:
        nn.init.constant_(module.get_parameter(path), value)
    return module.train(holder.training)


def _storage(tensor: Tensor, entry: Dropped, like: Tensor) -> Tensor:
    dtype = like.dtype if tensor.dtype == entry.dtype else tensor.dtype
    return torch.empty_like(tensor, device=like.device, dtype=dtype, requires_grad=False)
