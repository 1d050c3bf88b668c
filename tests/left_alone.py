"""What a call must not change, written down so that two states can be compared."""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


def process_state() -> dict[str, Any]:
    """Random states, modes and settings of torch and Python."""
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": repr(numpy.random.get_state()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "module call": nn.Module.__call__,
        "trace": sys.gettrace(),
        "path": tuple(sys.path),
        "thread": threading.active_count(),
    }


def object_state(value: Any) -> dict[str, Any]:
    """Everything that hangs on an object: identity, type and content of whatever can be reached from it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(at: str, item: Any) -> None:
        found[at] = (type(item), item if isinstance(item, _PLAIN) else id(item))
        if isinstance(item, _PLAIN) or id(item) in seen:
            return
        seen.add(id(item))
        found[f"{at}!"] = _content(item)
        for name, part in _parts(item):
            walk(f"{at}{name}", part)

    walk("", value)
    return found


def _content(item: Any) -> Any:
    if isinstance(item, Tensor) and not is_lazy(item):
        gradient = id(item.grad) if item.is_leaf else None
        flags = (item.requires_grad, item.device, item.dtype, tuple(item.shape), item.is_leaf, gradient)
        dense = item.to_dense() if item.layout is not torch.strided else item
        return flags if item.is_meta else (*flags, dense.detach().double().tolist())
    if isinstance(item, torch.Generator):
        return item.get_state().tolist()
    if isinstance(item, random.Random):
        return item.getstate()
    if isinstance(item, numpy.random.Generator):
        return repr(item.bit_generator.state)
    return len(item) if isinstance(item, (list, tuple, dict, set, frozenset, deque)) else None


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict):
        yield from ((f"[{key!r}]", part) for key, part in item.items())
    elif isinstance(item, (list, tuple, deque)):
        yield from ((f"[{index}]", part) for index, part in enumerate(item))
    elif isinstance(item, (set, frozenset)):
        yield from ((f"{{{part!r}}}", part) for part in item)
    elif not callable(item) or isinstance(item, nn.Module):
        yield from ((f".{name}", part) for name, part in getattr(item, "__dict__", {}).items())


@contextmanager
def left_alone(*values: Any) -> Iterator[None]:
    """Fails where the block changed one of the values, or the process."""
    before = [process_state(), *map(object_state, values)]
    try:
        yield
    finally:
        after = [process_state(), *map(object_state, values)]
        changed = [
            f"{key}: {str(old.get(key))[:200]} -> {str(new.get(key))[:200]}"
            for old, new in zip(before, after, strict=True)
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        assert not changed, "\n".join(changed)[:3000]
