"""Running a model without leaving a trace in it: what a run may change is saved and put back."""

from __future__ import annotations

import contextlib
import gc
import operator
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

Replace = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def untouched(model: nn.Module, *, training: bool = False, gradients: bool = False) -> Iterator[None]:
    """A context in eval (or train) mode, without gradients, backward hooks and the fused attention path.

    It leaves no change. Put back on exit, also after an exception: every module's attributes (with lists, dicts, sets,
    the user's own objects and random generators among them, parameters, buffers, children and hooks, all by identity),
    training flags, random states of torch, Python and NumPy, grad mode, the default device and dtype, the attention
    fast path. Not: globals, class attributes, `__slots__`, files, and what lies deeper than four levels.
    """
    modules = tuple(model.modules())
    seen: set[int] = set()
    saved = [_Saved(module, seen) for module in modules]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_global_state())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of a run that the user did not start, in modes of ours
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", _Unchecked))
        if "torch._dynamo" in sys.modules:  # compiled functions inside the model run as written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modules:
                if isinstance(module, torch.jit.ScriptModule):
                    module.training = training
                else:  # no `train()`: overrides of `train` may do anything
                    attributes = module.__dict__
                    attributes["training"] = training
                    for name in ("_backward_hooks", "_backward_pre_hooks"):
                        if attributes.get(name):  # they insert operations, and are not for gradients of ours
                            attributes[name] = OrderedDict()
            yield
        finally:
            for record in saved:
                record.restore()


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """A context for a run on the model's own parameters: what it writes to them (codebooks, forced norms) is undone."""
    kept = _Kept(model)
    try:
        with kept:
            yield
    finally:
        kept.restore()


def substitute(model: nn.Module, parameter: Replace, buffer: Replace, other: Replace) -> dict[int, str]:
    """Replace the model's tensors; only under `untouched`, which puts them back.

    Parameters and buffers are replaced object by object, so that tied ones stay tied, also where a list, dict or
    tuple among a module's attributes holds them (`nn.LSTM`). `other` is for tensors that are plain attributes.

    Returns:
        The path of each replacement by its `id`; not of those in lists, tuples and dicts.
    """
    new: dict[int, Tensor] = {}  # replacements count as their own
    paths: dict[int, str] = {}
    for named, replace in ((model.named_parameters(), parameter), (model.named_buffers(), buffer)):
        for path, tensor in named:
            made = replace(tensor)
            new[id(tensor)] = new[id(made)] = made
            paths[id(made)] = path

    def swap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in new:
            made = other(value)
            new[id(value)] = new[id(made)] = made
        return new[id(value)]

    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        _swap_attributes(module.__dict__, swap)
        held = {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
        for name, value in held.items():
            paths.setdefault(id(value), f"{path}.{name}" if path else name)
    return paths


def _swap_attributes(attributes: dict[str, Any], swap: Callable[[Any], Any]) -> None:
    for name, value in attributes.items():
        if type(value) in _ATOMS or (type(value) in _CONTAINERS and not value):
            continue
        if isinstance(value, Tensor):
            attributes[name] = swap(value)
        elif not any(isinstance(item, Tensor) for item in _items(value)):
            continue
        elif isinstance(value, tuple):
            attributes[name] = tuple(swap(item) for item in value)
        elif isinstance(value, list):
            value[:] = [swap(item) for item in value]
        else:
            for key, item in value.items():
                value[key] = swap(item)


def _items(value: Any) -> Iterable[Any]:
    if type(value) in (tuple, list):
        return cast(Iterable[Any], value)
    return value.values() if isinstance(value, dict) else ()


@contextlib.contextmanager
def still(model: nn.Module | None) -> Iterator[None]:
    """A context in which reading a parametrized tensor does not change it: spectral norm iterates in train mode."""
    lists = [] if model is None else [one for one in model.modules() if isinstance(one, ParametrizationList)]
    parts = [(part, part.training) for one in lists for part in one.modules()]
    for part, _ in parts:
        part.__dict__["training"] = False
    try:
        yield
    finally:
        for part, training in parts:
            part.__dict__["training"] = training


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection, which walks all objects again and again where many are made that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Kept(TorchFunctionMode):
    """Keeps what a parameter holds, from before the first torch call that may write to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._unwritten: dict[int, list[nn.Parameter]] = {}
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for parameter in model.parameters():
            self._unwritten.setdefault(_memory(parameter), []).append(parameter)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__")):
            self._keep(args[0] if args else kwargs.get("input"))
        self._keep(kwargs.get("out"))
        return func(*args, **kwargs)

    def _keep(self, written: Any) -> None:
        for tensor in written if isinstance(written, (tuple, list)) else (written,):
            for parameter in self._unwritten.pop(_memory(tensor), ()) if isinstance(tensor, Tensor) else ():
                self._before.append((parameter, parameter.data, parameter.data.clone()))

    def restore(self) -> None:
        for parameter, held, values in self._before:
            parameter.data = held
            held.copy_(values)


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse ones, those without values, and wrappers
        return id(tensor)


class _Unchecked:
    """What re-entrant checkpointing calls, without it: `torch.autograd.grad` would be refused."""

    @staticmethod
    def apply(run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return run(*args)


class _Saved:
    """A module's attributes, and the state of what hangs on them."""

    __slots__ = ("attributes", "inside", "module", "training")

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        self.module = module
        self.training = module.training
        self.attributes = dict(module.__dict__)
        self.inside: list[Callable[[], object]] = []
        for value in self.attributes.values():
            if type(value) in _CONTAINERS and not value:
                self.inside.append(value.clear)
            elif type(value) not in _ATOMS:
                self.inside += _saved_state(value, seen, _DEPTH)

    def restore(self) -> None:
        if isinstance(self.module, torch.jit.ScriptModule):
            self.module.training = self.training
            return
        _restore_dict(self.module.__dict__, self.attributes)
        for undo in self.inside:
            undo()


_DEPTH = 4  # how deep containers and objects hang on one another
_PLAIN = (Tensor, nn.Module, str, int, float, type)
_ATOMS = frozenset({type(None), bool, int, float, str})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})  # most of a module's are empty


def _saved_state(value: Any, seen: set[int], depth: int) -> Iterator[Callable[[], object]]:
    """What puts the state of a container, a random generator or an object of the user's back, and of what is in it."""
    if depth == 0 or value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        yield partial(_restore_dict, value, dict(value.items()))
        inside = list(value.values())
    elif isinstance(value, (list, set, deque)):
        yield partial(_restore_items, value, list(value))
        inside = list(value)
    elif isinstance(value, (tuple, frozenset)):
        inside = value
    elif (generator := _saved_generator(value)) is not None:
        yield generator
    elif is_users_object(value):
        yield partial(_restore_dict, vars(value), dict(vars(value)))
        inside = list(vars(value).values())
    for item in inside:
        yield from _saved_state(item, seen, depth - 1)


def _saved_generator(value: Any) -> Callable[[], object] | None:
    """What puts the state of a random generator of torch, Python or NumPy back; None for anything else."""
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator) or type(value).__qualname__ == "RandomState":
        return partial(value.set_state, value.get_state())
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def is_users_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of no class of torch or Python: its locks are left alone."""
    top = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not callable(value) and top != "torch" and top not in sys.stdlib_module_names


def _restore_items(container: Any, contents: list[Any]) -> None:
    if len(container) != len(contents) or not all(map(operator.is_, container, contents)):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(contents)


def _restore_dict(container: dict[Any, Any], contents: dict[Any, Any]) -> None:
    same = (
        len(container) == len(contents)
        and all(map(operator.is_, container, contents))
        and all(map(operator.is_, container.values(), contents.values()))
    )
    if not same:
        container.clear()
        container.update(contents)


@contextlib.contextmanager
def _global_state() -> Iterator[None]:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    device, dtype = _default_device(), torch.get_default_dtype()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_default_dtype(dtype)
        if _default_device() is not device:
            torch.set_default_device(None if device is None else device.device)
            if device is None:  # torch 2.8 takes a context that is None for one
                vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _default_device() -> Any:
    """The mode that `torch.set_default_device` installed. Not just the device: one for "cpu" must go as well."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
