"""What is certain of abstract values where objects exist: truth, comparisons, and Python's own pure functions.

Used where `State.exact` holds. Nothing of the model's is executed: only values of Python's plain types are computed
with.
"""

from __future__ import annotations

import ast
import builtins
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._jit_internal
import torch.jit._trace
from torch import Tensor, fx, nn

from . import facts
from .static_core import Arguments
from .static_names import External, Known
from .static_values import (
    DATA,
    Attribute,
    Builtin,
    Const,
    Either,
    LiveInstance,
    Real,
    RealFunction,
    Table,
    Tup,
    Unknown,
    Value,
)
from .trace import origin

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, range, slice)
"""Types whose values are computed with."""

MAX_RANGE = 4096
_MISSING = object()

_PURE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (int, float, bool, str, abs, min, max, sum, round, divmod, len, all, any, pow, sorted, ord, chr)
}
_QUESTIONS: tuple[Callable[[], Any], ...] = (
    torch._jit_internal.is_scripting,
    torch.jit._trace.is_tracing,
    torch.compiler.is_compiling,
    torch.compiler.is_dynamo_compiling,
    torch.is_autocast_enabled,
    torch.are_deterministic_algorithms_enabled,
    torch.backends.mha.get_fastpath_enabled,
)
"""What torch answers about the process by itself, without `torch.onnx`, which is loaded when it is asked for."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def optional(node: fx.Node) -> bool:
    """Whether a tensor may be None instead."""
    return bool(node.meta.get("optional"))


def plain_value(value: Value) -> Any:
    """The Python object of plain type that a value is; `_MISSING` if it is not certain."""
    if isinstance(value, Const):
        return value.value
    if isinstance(value, (Known, Real)) and isinstance(value.obj, PLAIN):
        return value.obj
    if isinstance(value, Tup) and value.exact:
        items = [plain_value(item) for item in value.items]
        return _MISSING if any(item is _MISSING for item in items) else value.builtin(items)
    return _MISSING


def existing(value: Value) -> Any:
    """The object that a value stands for, also one that is not computed with; `_MISSING` if there is none."""
    if isinstance(value, (Known, Real)):
        return value.obj
    if isinstance(value, LiveInstance):
        return value.live
    if isinstance(value, Builtin):
        return getattr(builtins, value.name, _MISSING)
    return plain_value(value)


def is_missing(found: Any) -> bool:
    return found is _MISSING


def constant(found: Any) -> Value:
    """A computed plain object as a value."""
    if isinstance(found, (tuple, list)):
        return Tup(tuple(constant(item) for item in found), True, type(found) if type(found) is list else tuple)
    if isinstance(found, PLAIN) and not isinstance(found, (torch.dtype, torch.device, type)):
        return Const(found)
    return Known(found)


def holds(value: Value) -> bool | None:
    """The truth of a value, None if it is not certain."""
    found = plain_value(value)
    if found is not _MISSING:
        return bool(found)
    if isinstance(value, (Unknown, External, fx.Node, Attribute, Either)):
        return None
    if isinstance(value, Tup):
        return None if not value.exact else bool(value.items)
    if isinstance(value, Table):
        return None if "*" in value.items else bool(value.items)
    if isinstance(value, LiveInstance):
        return bool(len(value.live._modules)) if _is_container(value.live) else True
    if isinstance(value, Real):
        if isinstance(value.obj, (dict, list, tuple, set, frozenset)):
            return bool(value.obj)
        return None if hasattr(type(value.obj), "__bool__") or hasattr(type(value.obj), "__len__") else True
    return True


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def compare(op: ast.cmpop, left: Value, right: Value) -> Value:
    """The outcome of a comparison of values of which none is a tensor, or by identity."""
    found: bool | None = None
    if isinstance(op, (ast.Is, ast.IsNot)):
        found = _is(left, right)
        negated = isinstance(op, ast.IsNot)
    elif isinstance(op, (ast.In, ast.NotIn)):
        found = _is_in(left, right)
        negated = isinstance(op, ast.NotIn)
    else:
        found, negated = _computed(_COMPARISONS[type(op)], left, right), False
    return DATA if found is None else Const(found is not negated)


def _computed(function: Callable[[Any, Any], Any], left: Value, right: Value) -> bool | None:
    a, b = plain_value(left), plain_value(right)
    if a is _MISSING or b is _MISSING:
        return None
    try:
        return bool(function(a, b))
    except (TypeError, ValueError, ArithmeticError):
        return None


def _is(left: Value, right: Value) -> bool | None:
    a, b = existing(left), existing(right)
    if a is not _MISSING and b is not _MISSING:
        return a is b or (isinstance(a, (int, str)) and type(a) is type(b) and a == b)
    if a is not None and b is not None:
        return None
    other = right if a is None else left
    if isinstance(other, fx.Node):
        return None if optional(other) or _is_opaque(other) else False
    return None if isinstance(other, (Unknown, External, Either, Attribute)) else False


def _is_opaque(node: fx.Node) -> bool:
    """Whether a value is what some call of unknown kind returned, or a part of it: it may be anything."""
    while origin(node).facts.type == "getitem" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return origin(node).facts.type == "opaque" or node.op == "call_module"


def _is_in(left: Value, right: Value) -> bool | None:
    key = plain_value(left)
    if key is _MISSING:
        return None
    container = existing(right)
    if isinstance(right, Table):
        container = None if "*" in right.items else right.items
    elif isinstance(right, LiveInstance):
        container = right.live._modules if isinstance(right.live, nn.ModuleDict) else None
    if type(container).__name__ not in ("tuple", "list", "dict", "set", "frozenset", "str", "range", "OrderedDict"):
        return None
    try:
        return bool(key in container)
    except TypeError:
        return None


def known_of_tensor(node: fx.Node, name: str) -> Value:
    """The shape or dtype of a parameter or buffer."""
    known = origin(node)
    if known.shape is not None and name == "shape":
        return constant(known.shape)
    if known.shape is not None and name == "ndim":
        return Const(len(known.shape))
    return Known(known.dtype) if known.dtype is not None and name == "dtype" else DATA


def answer(target: Any, arguments: Arguments) -> Value | None:
    """What a function of torch or of the standard library returns, if it is a question or arithmetic on numbers."""
    onnx = getattr(sys.modules.get("torch.onnx"), "is_in_onnx_export", None)
    if any(target is question for question in (*_QUESTIONS, onnx)) and not arguments.args:
        return Const(target())
    if getattr(target, "__module__", None) in ("math", "_operator") and not arguments.kwargs:
        return _applied(target, arguments)
    return arguments.args[0] if arguments.args and _is_idle_dropout(target, arguments) else None


def _is_idle_dropout(target: Any, arguments: Arguments) -> bool:
    """Whether a function of the dropout kind returns its operand as it is."""
    if facts.of_function(target).kind != "dropout":
        return False
    given = dict(zip(("input", "p", "training"), arguments.args, strict=False)) | arguments.kwargs
    return Const(0.0) in (given.get("p"),) or Const(False) in (given.get("training"), given.get("train"))


def builtin(name: str, arguments: Arguments) -> Value | None:
    """What a builtin function returns, None if that is not certain or depends on more than plain values."""
    args = arguments.args
    if arguments.open:
        return None
    if name == "isinstance" and len(args) == 2:
        found = _is_instance(args[0], args[1])
        return None if found is None else Const(found)
    if name == "callable" and args and isinstance(args[0], (RealFunction, LiveInstance, Builtin)):
        return Const(True)
    if name == "len" and args:
        return _length(args[0])
    if name == "bool" and args:
        truth = holds(args[0])
        return None if truth is None else Const(truth)
    if name == "type" and len(args) == 1:
        return _type_of(args[0])
    if name == "range":
        bounds = [plain_value(arg) for arg in args]
        if all(isinstance(bound, int) for bound in bounds) and len(range(*bounds)) <= MAX_RANGE:
            return Tup(tuple(Const(i) for i in range(*bounds)))
        return None
    return _applied(_PURE[name], arguments) if name in _PURE else None


def _type_of(value: Value) -> Value | None:
    if isinstance(value, Tup):
        return Known(value.builtin)
    if isinstance(value, fx.Node):
        return None if _is_opaque(value) or optional(value) else Known(Tensor)
    found = existing(value)
    return None if found is _MISSING else Known(type(found))


def _length(value: Value) -> Value | None:
    if isinstance(value, Tup):
        return Const(len(value.items)) if value.exact else None
    if isinstance(value, Table):
        return None if "*" in value.items else Const(len(value.items))
    if isinstance(value, LiveInstance) and _is_container(value.live):
        return Const(len(value.live._modules))
    found = existing(value)
    return Const(len(found)) if isinstance(found, (str, bytes, dict, list, tuple, set, range)) else None


def changed(value: Tup | Table, name: str, args: tuple[Value, ...]) -> tuple[Value, Value] | None:
    """A list or dictionary after a method that takes something out or moves it, and what that returns."""
    given = [plain_value(arg) for arg in args]
    if isinstance(value, Table):
        if name != "pop" or not given or type(given[0]) not in (str, int) or given[0] not in value.items:
            return None
        return Table({key: item for key, item in value.items.items() if key != given[0]}), value.items[given[0]]
    items = list(value.items)
    if name not in ("pop", "insert", "reverse", "clear", "remove", "sort"):
        return None
    result: Value = Const(None)
    if value.exact and name == "pop" and items and (not given or isinstance(given[0], int)):
        if not -len(items) <= (given[0] if given else -1) < len(items):
            return None
        result = items.pop(*given)
    elif value.exact and name == "insert" and isinstance(given[0], int):
        items.insert(given[0], args[1])
    elif name == "reverse":
        items.reverse()
    elif name == "clear":
        return Tup((), True, value.builtin), result
    else:
        return Tup(value.items, False, value.builtin), items[-1] if name == "pop" and items else result
    return Tup(tuple(items), value.exact, value.builtin), result


def method_of_constant(value: Const, name: str, arguments: Arguments) -> Value | None:
    """What a method of a string or number returns."""
    if not isinstance(value.value, (str, int, float)):
        return None
    return _applied(getattr(value.value, name, None), arguments)


def _applied(function: Any, arguments: Arguments) -> Value | None:
    args = [plain_value(arg) for arg in arguments.args]
    kwargs = {key: plain_value(value) for key, value in arguments.kwargs.items()}
    if function is None or any(value is _MISSING for value in (*args, *kwargs.values())):
        return None
    try:
        result = function(*args, **kwargs)
    except Exception:  # the model's own mistake on a path that may never run
        return None
    return constant(result) if isinstance(result, (*PLAIN, tuple, list)) else None


def _is_instance(value: Value, classes: Value) -> bool | None:
    wanted = existing(classes)
    given = wanted if isinstance(wanted, (tuple, list)) else (wanted,)
    if isinstance(classes, Tup):
        given = tuple(existing(item) for item in classes.items)
    if not all(isinstance(one, type) for one in given):
        return None
    kinds = tuple(given)
    if isinstance(value, fx.Node):
        if _is_opaque(value) or optional(value):
            return None
        return any(issubclass(Tensor, kind) for kind in kinds)
    if isinstance(value, Tup):
        return issubclass(value.builtin, kinds)
    if isinstance(value, Table):
        return issubclass(dict, kinds)
    found = existing(value)
    return isinstance(found, kinds) if found is not _MISSING else None
