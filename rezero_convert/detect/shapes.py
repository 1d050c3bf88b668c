"""What the construction of layers says of shapes, where no run does: whether a path keeps its input's shape."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from .flow import Flow

_KEEPING = frozenset({"norm", "activation", "dropout"})
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def keeps_shape(flow: Flow, node: int) -> bool:
    """Whether a step's output surely has its input's shape: a linear layer or convolution made for that."""
    if flow.facts[node].kind in _KEEPING:
        return True
    target = flow.nodes[node]
    if flow.facts[node].kind != "linear" or target.op != "call_module":
        return False
    module = flow.module(str(target.target))
    return _of_text(target.meta.get("constructor", "")) if module is None else _of_layer(module)


def _of_layer(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    padding = tuple(reach * (size - 1) / 2 for size, reach in sizes)
    same = layer.padding == "same" or tuple(layer.padding) == padding
    return layer.in_channels == layer.out_channels and set(layer.stride) == {1} and same


def _of_text(constructor: str) -> bool:
    """The same of a call as written: `nn.Linear(width, width)`, `nn.Conv2d(width, width, 3, padding=1)`."""
    try:
        call = ast.parse(constructor.strip(), mode="eval").body
    except SyntaxError:
        return False
    if not isinstance(call, ast.Call) or len(call.args) < 2 or ast.dump(call.args[0]) != ast.dump(call.args[1]):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "Linear":
        return True
    given = dict(zip(("kernel_size", "stride", "padding", "dilation"), call.args[2:], strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    if name not in _CONVOLUTIONS or any(keyword.arg is None for keyword in call.keywords):
        return False
    try:
        known = {key: ast.literal_eval(given[key]) for key in ("kernel_size", "stride", "padding") if key in given}
    except ValueError:
        return False
    sizes, padding = _each(known.get("kernel_size")), _each(known.get("padding", 0))
    same = all(size == 2 * pad + 1 for size, pad in zip(sizes, padding * len(sizes), strict=False))
    return set(_each(known.get("stride", 1))) == {1} and "dilation" not in given and bool(sizes) and same


def _each(value: Any) -> tuple[int, ...]:
    """A size for each dimension."""
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, (tuple, list)) and all(isinstance(one, int) for one in value) else ()
