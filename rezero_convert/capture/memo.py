"""What a torch call makes of fake tensors depends on what they are like alone: equal calls are computed once.

A network calls few functions on few kinds of tensors, again and again. Nothing is assumed of a function: what its first
call did says whether its later ones may be left out.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .frames import TORCH

Key = tuple[Any, ...]


class _Result(NamedTuple):
    """What a call's result is like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_RESULTS: dict[Key, _Result] = {}
_OTHERS: set[Any] = set()
"""Functions whose calls are all made."""
_MANY = 20_000
"""Results from which on those that are known are forgotten."""


class Memo:
    """Calls torch functions on the tensors of one fake mode; made inside of it.

    A result is made again without the call if the first call of the function on such arguments had no effect but one
    new tensor: none of its arguments, no view of one, none of them changed, no gradient, no known value. Not where
    another mode, autocast or a transform of `torch.func` is to see the call, nor for functions that are not torch's.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._modes = torch._C._len_torch_dispatch_stack()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _OTHERS or not self._alone():
            return func(*args, **kwargs)
        tensors: list[FakeTensor] = []
        key = self._key(func, args, kwargs, tensors)
        if key is None or not tensors:
            return func(*args, **kwargs)
        known = _RESULTS.get(key)
        if known is not None:
            with torch._C._DisableTorchDispatch():
                value = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
                return FakeTensor(self._mode, value, known.device)
        versions = [tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        if _is_torchs(func) and _is_new(result, tensors) and versions == [tensor._version for tensor in tensors]:
            if len(_RESULTS) >= _MANY:
                _RESULTS.clear()
            _RESULTS[key] = _Result(result.shape, result.stride(), result.dtype, result.fake_device)
        else:
            _OTHERS.add(func)
        return result

    def _alone(self) -> bool:
        """Whether nothing but the fake mode has a say in what a call does."""
        return not (
            torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or torch._C._is_any_autocast_enabled()
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack() != self._modes
            or torch._C._functorch.maybe_current_level() is not None
        )

    def _key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]) -> Key | None:
        """All that a result may depend on; None where that cannot be said. Collects the tensors."""
        parts: list[Any] = [func, torch.get_default_dtype()]
        for value in args:
            part = self._part(value, tensors)
            if part is None:
                return None
            parts.append(part)
        for name, value in kwargs.items():
            part = self._part(value, tensors)
            if part is None:
                return None
            parts += (name, part)
        return tuple(parts)

    def _part(self, value: Any, tensors: list[FakeTensor]) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not self._mode or value.constant is not None or not _is_plain(value):
                return None
            tensors.append(value)
            return value.shape, value.stride(), value.dtype, value.fake_device
        if kind in _PLAIN:
            return kind, value  # 1, 1.0 and True are equal
        if kind in (tuple, list, torch.Size):
            items = [self._part(item, tensors) for item in value]
            return None if None in items else (kind, *items)
        return None


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


def _is_torchs(func: Any) -> bool:
    """Whether a function is torch's own and computes something: operators may be anybody's, attributes are there."""
    if isinstance(func, FunctionType):
        return func.__code__.co_filename.startswith(TORCH)
    return not isinstance(func, (OpOverload, OpOverloadPacket)) and getattr(func, "__name__", "") != "__get__"


def _is_new(result: Any, tensors: list[FakeTensor]) -> bool:
    """Whether a result is one tensor that has nothing to do with these."""
    if type(result) is not FakeTensor or result.constant is not None or not _is_plain(result):
        return False
    if result.requires_grad or result._base is not None or result.storage_offset():
        return False
    own = _storage(result)
    return all(own != _storage(tensor) for tensor in tensors)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.dtype.is_complex


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
