"""What torch makes of fake tensors depends on what they are like alone: equal calls are computed once.

A network calls few functions on few kinds of tensors, again and again. Nothing is assumed of a function or operator:
what its first call did says whether its later ones may be left out. torch's own fake mode keeps what operators give by
the same criteria (`FakeTensorMode._cached_dispatch_impl`), and needs several times longer to find it.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OperatorBase, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .frames import TORCH

Key = tuple[Any, ...]


class _Result(NamedTuple):
    """What a new tensor is like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _View(NamedTuple):
    """What part of the first argument's storage a tensor shows, as the same type."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Several(NamedTuple):
    """A tuple or list of tensors."""

    kind: type
    items: tuple[_Result | _View, ...]


_FIRST = "the first argument"
_UNKNOWN = "not to be said"
_Recipe = _Result | _View | _Several | str
"""How an operator's result is made again; one of the two words."""

_RESULTS: dict[Key, _Result] = {}
"""Of functions."""
_OTHERS: set[Any] = set()
"""Functions that do more than make a tensor: their operators are called."""
_RECIPES: dict[Key, _Recipe] = {}
"""Of operators."""
_WRITTEN: dict[Any, frozenset[int] | None] = {}
"""The positions of the arguments that an operator writes to; None if its results are not kept."""
_MANY = 20_000
"""Results from which on those that are known are forgotten."""


class Fakes:
    """Makes fake tensors of one mode as `FakeTensor(mode, value, device)` does: what they share is worked out once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._states: dict[torch.device, tuple[torch.device, dict[str, Any]]] = {}
        unsafe = mode._allow_unsafe_data_ptr_access
        self._guard = (
            torch._C._set_warn_deprecated_on_mutable_data_ptr if unsafe else torch._C._set_throw_on_mutable_data_ptr
        )

    def __call__(self, value: Tensor, device: torch.device) -> FakeTensor:
        """The fake tensor on `device` that a tensor on the meta device stands for."""
        if device not in self._states:
            first = FakeTensor(self.mode, value, device)
            self._states[device] = first.fake_device, dict(vars(first))
            return first
        full, state = self._states[device]
        made: FakeTensor = Tensor._make_subclass(
            FakeTensor, value, False, dispatch_device=True, device_for_backend_keys=full
        )
        self._guard(made)
        made.__dict__.update(state)
        return made


class Memo:
    """Calls torch functions on the tensors of one fake mode; made inside of it.

    A result is made again without the call if the first call of the function on such arguments had no effect but one
    new tensor: none of its arguments, no view of one, none of them changed, no gradient, no known value. Other
    functions are called, and their operators are treated so. Not where another mode, autocast or a transform of
    `torch.func` is to see the call, nor for functions that are not torch's.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._fakes = Fakes(mode)
        self._modes = torch._C._len_torch_dispatch_stack()
        self._operators = _Operators(self._fakes)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._alone():
            return func(*args, **kwargs)
        if func in _OTHERS:
            return self._called(func, args, kwargs)
        tensors: list[FakeTensor] = []
        key = _key(self._mode, func, args, kwargs, tensors)
        if key is None or not tensors or any(tensor.constant is not None for tensor in tensors):
            return self._called(func, args, kwargs)
        known = _RESULTS.get(key)
        if known is not None:
            return _made(self._fakes, known)
        versions = [tensor._version for tensor in tensors]
        result = self._called(func, args, kwargs)
        if _is_torchs(func) and _is_new(result, tensors) and versions == [tensor._version for tensor in tensors]:
            _keep(_RESULTS, key, _like(result))
        else:
            _OTHERS.add(func)
        return result

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _is_torchs(func):
            return func(*args, **kwargs)
        torch._C._push_on_torch_dispatch_stack(self._operators)  # `with` takes as long as a call
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._pop_torch_dispatch_stack(None)

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


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Answers for operators whose result is known; the others go on to the fake mode.

    Known are results that are new tensors, views of the first argument or that argument itself, of `aten` operators
    whose results do not depend on values and that leave shapes as they are. And a number that was made a tensor is a
    fake tensor that knows its value, as in `FakeTensorMode._dispatch_impl`.
    """

    supports_higher_order_operators = True  # which are passed on

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # the wrapper that says so costs more than the call
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func is _LIFT and self._is_number(args[0]):
            return self._lifted(args[0])
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        key = self._key(func, args, kwargs, tensors)
        known = None if key is None else _RECIPES.get(key)
        if known is None or known is _UNKNOWN:
            result = func(*args, **kwargs)
            if known is None and key is not None:
                _keep(_RECIPES, key, _recipe(result, args, tensors))
            return result
        if known is _FIRST:
            return args[0]
        if isinstance(known, _Several):
            return known.kind([_made(self._fakes, item, args[0]) for item in known.items])
        return _made(self._fakes, known, args[0])

    def _key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]) -> Key | None:
        written = _WRITTEN[func] if func in _WRITTEN else _WRITTEN.setdefault(func, _written(func))
        if written is None or not args:
            return None
        key = _key(self._fakes.mode, func, args, kwargs, tensors)
        if key is None or (not tensors and kwargs.get("device") is None):
            return None
        if tensors and all(tensor.constant is not None for tensor in tensors):  # torch computes with known values
            return None
        if func is _INDEX and any(tensor.dtype in _MASKS for tensor in tensors[1:]):
            return None
        for position in written:  # they are then known no more
            if position < len(args) and getattr(args[position], "constant", None) is not None:
                return None
        return key

    def _is_number(self, value: Any) -> bool:
        plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
        return plain and value.device.type == "cpu" and self._fakes.mode.may_turn_const(value)

    def _lifted(self, number: Tensor) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            value = number.clone()
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            made = self._fakes(meta, value.device)
        made.constant = value
        self._fakes.mode.fake_tensor_converter.add_constant_storage_mapping(made)
        return made


_DEVICE = torch.ops.prim.device.default
_LIFT = torch.ops.aten.lift_fresh.default
_INDEX = torch.ops.aten.index.Tensor
_MASKS = (torch.bool, torch.uint8, torch.int8)
"""Types of an index whose values decide on the shape."""


def _written(func: Any) -> frozenset[int] | None:
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return None
    if func is not _INDEX and not _DEPENDS.isdisjoint(func.tags):
        return None
    arguments = enumerate(func._schema.arguments)
    return frozenset(i for i, one in arguments if one.alias_info is not None and one.alias_info.is_write)


_DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


def _keep(known: dict[Key, Any], key: Key, value: Any) -> None:
    if len(known) >= _MANY:
        known.clear()
    known[key] = value


def _key(
    mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]
) -> Key | None:
    """All that a result may depend on; None where that cannot be said. Collects the tensors."""
    parts: list[Any] = [func, torch.get_default_dtype()]
    for value in args:
        part = _part(mode, value, tensors)
        if part is None:
            return None
        parts.append(part)
    for name, value in kwargs.items():
        part = _part(mode, value, tensors)
        if part is None:
            return None
        parts += (name, part)
    return tuple(parts)


def _part(mode: FakeTensorMode, value: Any, tensors: list[FakeTensor]) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.fake_mode is not mode or not _is_plain(value):
            return None
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset()
    if kind in _PLAIN:
        return kind, value  # 1, 1.0 and True are equal
    if kind in (tuple, list, torch.Size):
        items = [_part(mode, item, tensors) for item in value]
        return None if None in items else (kind, *items)
    return None


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format})


def _made(fakes: Fakes, known: Any, first: Any = None) -> FakeTensor:
    """A tensor of which it is known what it is like."""
    with torch._C._DisableTorchDispatch():
        if isinstance(known, _View):
            return fakes(torch.as_strided(first, known.shape, known.stride, known.offset), first.fake_device)
        value = torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        return fakes(value, known.device)


def _recipe(result: Any, args: tuple[Any, ...], tensors: list[FakeTensor]) -> _Recipe:
    """How a result that an operator gave can be made again."""
    if result is args[0]:
        return _FIRST
    if type(result) is FakeTensor:
        return _single(result, args[0], tensors) or _UNKNOWN
    if type(result) not in (tuple, list) or not all(type(item) is FakeTensor for item in result):
        return _UNKNOWN
    items = [_single(item, args[0], tensors) for item in result]
    new = [_storage(item) for item, one in zip(result, items, strict=True) if isinstance(one, _Result)]
    if None in items or len(set(new)) < len(new):
        return _UNKNOWN
    return _Several(type(result), tuple(item for item in items if item is not None))


def _single(result: FakeTensor, first: Any, tensors: list[FakeTensor]) -> _Result | _View | None:
    if _is_new(result, tensors):
        return _like(result)
    if type(first) is not FakeTensor or result.constant is not None or not _is_plain(result) or result.requires_grad:
        return None
    same = _storage(result) == _storage(first) and result.dtype == first.dtype
    own = not any(result is tensor for tensor in tensors) and result.fake_device == first.fake_device
    return _View(result.shape, result.stride(), int(result.storage_offset())) if same and own else None


def _like(result: FakeTensor) -> _Result:
    return _Result(result.shape, result.stride(), result.dtype, result.fake_device)


def _is_torchs(func: Any) -> bool:
    """Whether a function is torch's own and computes something: operators may be anybody's, attributes are there."""
    if isinstance(func, FunctionType):
        return func.__code__.co_filename.startswith(TORCH)
    return not isinstance(func, (OperatorBase, OpOverloadPacket)) and getattr(func, "__name__", "") != "__get__"


def _is_new(result: Any, tensors: list[FakeTensor]) -> bool:
    """Whether a result is one tensor that has nothing to do with these."""
    if type(result) is not FakeTensor or result.constant is not None or not _is_plain(result):
        return False
    if result.requires_grad or result._base is not None or result.storage_offset():
        return False
    own = _storage(result)
    return all(own != _storage(tensor) for tensor in tensors)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.dtype.is_complex and not tensor.is_neg()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
