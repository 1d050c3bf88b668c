"""Converted classes: made from a recipe, so that instances can be pickled, copied and sent to other processes."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .. import sources
from ..errors import ConversionError
from .changes import restart, starts
from .recompile import codes, compiled, is_at, rebuilt, within


def rezero_gate(alpha: Tensor, branch: Tensor | float) -> Tensor:
    """`alpha * branch` in the branch's dtype; a half-precision branch is scaled in single precision.

    So the residual stream keeps its dtype, whatever alpha's is, and alpha's gradient does not overflow. The proxies of
    `torch.fx` have no dtype to ask for; neither has a number, the weight of `torch.lerp`.
    """
    if isinstance(branch, (int, float)):
        return alpha * branch
    if isinstance(branch, Tensor) and (branch.dtype == torch.float16 or branch.dtype == torch.bfloat16):
        if alpha.dtype == branch.dtype and not torch.is_grad_enabled():
            return alpha * branch  # the same numbers in one pass
        return (alpha.float() * branch).to(branch.dtype)
    return (alpha * branch).to(branch.dtype)


@dataclass(frozen=True, slots=True)
class EditedMethod:
    """One method's new text; enough to make the function again in another process."""

    definer: int
    """Position of the defining class in the method resolution order."""
    attributes: tuple[str, ...]
    """The names under which that class holds the function."""
    qualname: str
    line: int
    """The function's first line."""
    file: str
    text: str
    """All lines of `file`; those before the function are empty but for the class header."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a converted class."""

    original: type[Any]
    """The class as the user wrote it."""
    methods: tuple[EditedMethod, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self


def recipe_of(cls: type) -> Recipe | None:
    """The recipe of a converted class; None for any other, also for one that is derived from it."""
    recipe = cls.__dict__.get("rezero_recipe")
    return recipe if isinstance(recipe, Recipe) else None


def original_of(cls: type) -> type[Any]:
    """The user's class in whose place a class of ours stands, or the class itself."""
    original: type[Any] = cls.__dict__.get("rezero_original", cls)
    return original


def code_changes(before: type, after: type) -> list[tuple[CodeType, CodeType]]:
    """The code of methods in `before` with what `after` has in its place; both are one user's class or made of it.

    So for the functions that a method makes: `__init__` may have left one on the instance.
    """
    old, new = _codes_of(before), _codes_of(after)
    changes: list[tuple[CodeType, CodeType]] = []
    for key in dict.fromkeys([*old, *new]):
        first = old[key][1] if key in old else new[key][0]
        second = new[key][1] if key in new else old[key][0]
        if first is not second:
            changes += within(first, second)
    return changes


def _codes_of(cls: type) -> dict[tuple[int, str, int], tuple[CodeType, CodeType]]:
    """Original and edited code of a converted class's methods."""
    found: dict[tuple[int, str, int], tuple[CodeType, CodeType]] = cls.__dict__.get("rezero_codes", {})
    return found


def revive(
    recipe: Recipe,
    make: Callable[..., nn.Module],
    args: tuple[Any, ...],
    added: dict[str, nn.Parameter | nn.ParameterList],
    records: dict[str, Any],
) -> nn.Module:
    """Make a converted instance again, from a pickle or for a copy; its state is set afterwards."""
    module = make(*args)
    object.__setattr__(module, "__class__", converted_class(recipe))
    for name, value in added.items():
        held: dict[str, Any] = module._modules if isinstance(value, nn.Module) else module._parameters
        held[name] = value
    module.__dict__.update(records)
    return module


@functools.cache
def converted_class(recipe: Recipe) -> type[Any]:
    """The subclass that `recipe` describes; always the same object.

    Raises:
        ConversionError: the class no longer has the methods that were edited.
    """
    base = recipe.original
    by_class: dict[int, dict[str, Any]] = {}
    changed: dict[tuple[int, str, int], tuple[CodeType, CodeType]] = {}
    for method in recipe.methods:
        members = by_class.setdefault(method.definer, {})
        definer = base.__mro__[method.definer]
        sources.register(method.file, method.text)
        for attribute in method.attributes:
            value = members.get(attribute, definer.__dict__.get(attribute))
            old = next((code for code in codes(value) if is_at(code, method.qualname, method.line)), None)
            if old is None:
                raise ConversionError(
                    f"{definer.__module__}.{method.qualname}: the class has changed since the model was converted"
                )
            key = method.definer, method.qualname, method.line
            new = changed[key][1] if key in changed else compiled(method.text, method.file, old)
            members[attribute] = rebuilt(value, old, new, {})
            changed[key] = old, new
    # an edited method that a base class defines stays below the classes that override it
    bases = [_subclass(base.__mro__[index], (), members) for index, members in sorted(by_class.items()) if index]
    namespace = {**by_class.get(0, {}), "rezero_recipe": recipe, "rezero_codes": changed}
    namespace["rezero_gate"] = staticmethod(rezero_gate)
    namespace["__init__"] = _init(base, recipe)
    namespace["_apply"] = _apply(base)
    namespace["reset_parameters"] = _reset_parameters(base)
    namespace["__reduce_ex__"] = _reduce_ex(recipe)
    if hasattr(base, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy(base, recipe)
    return _subclass(base, tuple(bases), namespace)


class _Quiet:
    """Keeps a class's `__init_subclass__` (registries, checks) from hearing of converted classes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _subclass(base: type, others: tuple[type, ...], namespace: dict[str, Any]) -> type[Any]:
    """A class that passes for `base`."""
    hears = any("__init_subclass__" in cls.__dict__ for cls in base.__mro__[:-1])
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace = {**names, "rezero_original": base, **namespace}
    try:
        return type(base.__name__, ((_Quiet,) if hears else ()) + (base, *others), namespace)
    except Exception as error:  # whatever a metaclass may raise
        raise ConversionError(f"{base.__module__}.{base.__qualname__} cannot be derived from: {error}") from error


_copied: ContextVar[nn.Module | None] = ContextVar("_copied", default=None)
"""The converted instance whose own `__deepcopy__` is running."""


def _init(base: Any, recipe: Recipe) -> Callable[..., None]:
    """A constructor that gives an instance of the original class: `type(model)(config)` is an unconverted model.

    Except where the class's own `__deepcopy__` calls it: a copy is converted as its model is.
    """
    construct = base.__init__

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model = _copied.get()
        construct(self, *args, **kwargs)
        if recipe_of(type(self)) is recipe:
            if model is not None and type(model) is type(self):
                _mirror(self, model)
            else:
                object.__setattr__(self, "__class__", recipe.original)

    return __init__


def _apply(base: Any) -> Callable[..., Any]:
    """What `to` and `to_empty` call: gates that had no values, on the meta device, start where they are to start."""
    apply = base._apply

    @functools.wraps(apply)
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        empty = any(self.get_parameter(name).is_meta for name in starts(self))
        result = apply(self, *args, **kwargs)
        if empty:
            restart(self)
        return result

    return _apply


def _reset_parameters(base: Any) -> Callable[..., None]:
    """The class's own, if any, and then the gates: what re-initializes modules one by one leaves them as they start."""
    reset = getattr(base, "reset_parameters", None)

    def reset_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = None if reset is None else reset(self, *args, **kwargs)
        restart(self)
        return result

    return reset_parameters if reset is None else functools.wraps(reset)(reset_parameters)


def _deepcopy(base: Any, recipe: Recipe) -> Callable[..., Any]:
    copy_of = base.__deepcopy__

    @functools.wraps(copy_of)
    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> Any:
        with _copying(self if recipe_of(type(self)) is recipe else None):
            return copy_of(self, memo)

    return __deepcopy__


@contextlib.contextmanager
def _copying(model: nn.Module | None) -> Iterator[None]:
    token = _copied.set(model)
    try:
        yield
    finally:
        _copied.reset(token)


def _mirror(made: nn.Module, model: nn.Module) -> None:
    """Give a newly constructed unconverted model the classes, gates and dropped norms of a converted one."""
    twins = dict(made.named_modules())
    for path, source in list(model.named_modules()):
        twin = twins.get(path)
        if twin is None:
            continue
        if recipe_of(type(source)) is not None:
            object.__setattr__(twin, "__class__", type(source))
        own = {key: value for key, value in source.__dict__.items() if key.startswith("rezero_")}
        if not own:
            continue
        twin.__dict__.update(copy.deepcopy(own))
        for name, parameter in source._parameters.items():
            if twin._parameters.get(name) is None and parameter is not None:
                twin._parameters[name] = copy.deepcopy(parameter)
        for key in [key for key in twin._modules if key not in source._modules]:
            del twin._modules[key]
        for key, child in source._modules.items():
            mine = twin._modules.get(key)
            if mine is None or original_of(type(mine)) is not original_of(type(child)):
                twin._modules[key] = copy.deepcopy(child)


def _reduce_ex(recipe: Recipe) -> Callable[..., Any]:
    """Pickling by recipe: the subclass itself cannot be found by its name."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        cls = type(self)
        if recipe_of(cls) is not recipe:  # somebody's subclass of the converted class
            return super(converted_class(recipe), self).__reduce_ex__(protocol)
        reduced: Any = super(cls, self).__reduce_ex__(max(2, int(protocol)))
        if not isinstance(reduced, tuple):
            return reduced
        make, args, *state = reduced
        added: dict[str, nn.Parameter | nn.ParameterList] = {}
        records: dict[str, Any] = {}
        if getattr(make, "__name__", "") not in ("__newobj__", "__newobj_ex__"):  # a constructor that knows of nothing
            records = {name: value for name, value in self.__dict__.items() if name.startswith("rezero_")}
            for name in dict.fromkeys(gate.partition(".")[0] for gate in records.get("rezero_gates", ())):
                value = self._parameters[name] if name in self._parameters else self._modules.get(name)
                if isinstance(value, (nn.Parameter, nn.ParameterList)):
                    added[name] = value
        original = recipe.original
        args = tuple(original if arg is cls else arg for arg in args)
        return (revive, (recipe, original if make is cls else make, args, added, records), *state)

    return __reduce_ex__
