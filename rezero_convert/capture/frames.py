"""Where an operation comes from: the Python stack of model code, as `trace.Frame`s."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .. import sources
from ..errors import ConversionError
from ..plan import Place, Span
from .trace import Frame

TORCH = str(Path(torch.__file__).parent) + "/"
OURS = str(Path(__file__).parents[1]) + "/"
_CALLS = nn.Module.__call__.__code__.co_filename  # a module is called from here, not from its own methods
_PARTS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})
_PASSED_OVER = (contextlib.__file__, functools.__file__)

Key = tuple[str, int, str]


class FrameReader:
    """Reads stacks of one model's run; what it learns of code objects is kept, because it is asked for every operation.

    Code objects are kept by identity: equal ones may come from different files.
    """

    def __init__(self, model: nn.Module, boundary: CodeType) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._boundary = boundary
        self._codes: dict[int, _Code] = {}
        self._methods: dict[tuple[int, type], Place | None] = {}

    def path(self, module: nn.Module) -> str:
        """Path of `module` from the root, or a stand-in that says it is not registered."""
        return self._paths.get(id(module)) or ("" if id(module) in self._paths else f"<unregistered {_name(module)}>")

    def collect(self, frame: FrameType | None, called: nn.Module | None = None) -> tuple[Frame, ...]:
        """Frames of model code from `frame` outwards, up to and including the first that is a module's method.

        Args:
            called: the module whose call site is wanted; its own `__call__` overrides are not its call site.

        Raises:
            ConversionError: Python runs without column information.
        """
        found: list[Frame] = []
        while frame is not None and frame.f_code is not self._boundary:
            code = self._code(frame)
            if not code.passed_over:
                owner, place = self._owner(frame, code)
                if owner is not None and place is not None:
                    if owner is not called or frame.f_code.co_name != "__call__":
                        own = code.frame(frame, place, self.path(owner))
                        callers = self._callers(frame, owner)
                        found.append(own._replace(callers=callers) if callers else own)
                        break
                elif not code.torch:
                    found.append(code.frame(frame, code.place(frame), None))
            frame = frame.f_back
        return tuple(found)

    def _callers(self, frame: FrameType, owner: nn.Module) -> tuple[Frame, ...]:
        """Where the methods of one module were called that `frame` runs in."""
        found: list[Frame] = []
        while frame.f_back is not None and frame.f_back.f_code is not self._boundary:
            is_part = frame.f_code.co_name in _PARTS  # of the text that it is called from
            frame = frame.f_back
            code = self._code(frame)
            if code.passed_over or code.is_call:
                break
            module, place = self._owner(frame, code)
            if module is not owner or place is None:
                break
            if not is_part:
                found.append(code.frame(frame, place, self.path(owner)))
        return tuple(found)

    def _code(self, frame: FrameType) -> _Code:
        code = self._codes.get(id(frame.f_code))
        if code is None:
            code = self._codes[id(frame.f_code)] = _Code(frame.f_code)
        return code

    def _owner(self, frame: FrameType, code: _Code) -> tuple[nn.Module | None, Place | None]:
        if code.candidates:
            values = code.locals(frame)
            for name in code.candidates:
                module = values.get(name)
                if isinstance(module, nn.Module):
                    place = self._method(frame, code, module)
                    if place is not None:
                        return module, place
        return None, None

    def _method(self, frame: FrameType, code: _Code, module: nn.Module) -> Place | None:
        """The method of `module` that `frame` runs or is nested in, if any."""
        key = (id(code.code), type(module))
        if key not in self._methods:
            self._methods[key] = _find_method(code.code, type(module), frame.f_globals)
        return self._methods[key] or _find_override(code.code, module, frame.f_globals)


class _Code:
    """What is known of a code object."""

    __slots__ = (
        "_frames", "_next", "_owner", "_place", "_positions", "candidates", "code", "is_call", "passed_over", "torch",
    )  # fmt: skip

    def __init__(self, code: CodeType) -> None:
        file = code.co_filename
        self.code = code
        self.torch = file.startswith(TORCH)
        self.is_call = file == _CALLS
        self.passed_over = file in _PASSED_OVER or file.startswith(OURS)
        first = code.co_varnames[:1] if code.co_argcount else ()
        self.candidates = (*first, *code.co_freevars)
        self._frames: dict[tuple[int, str | None], Frame] = {}
        self._place: Place | None = None
        self._owner: tuple[FrameType, Any] | None = None
        self._positions = code.co_positions()
        self._next = 0

    def locals(self, frame: FrameType) -> Mapping[str, Any]:
        """The local variables, of generated code with thousands of them the candidates alone, read once a run."""
        if self.code.co_nlocals < _MANY:
            return frame.f_locals
        if self._owner is None or self._owner[0] is not frame:
            values = frame.f_locals
            self._owner = (frame, {name: values[name] for name in self.candidates if name in values})
        found: Mapping[str, Any] = self._owner[1]
        return found

    def frame(self, frame: FrameType, place: Place, owner: str | None) -> Frame:
        key = (frame.f_lasti, owner)
        if key not in self._frames:
            self._frames[key] = Frame(place, self._span(frame.f_lasti), owner)
        return self._frames[key]

    def _span(self, lasti: int) -> Span:
        """The span of an instruction; they mostly come in order, and long code is walked once."""
        index = lasti // 2
        if index < self._next:
            self._positions, self._next = self.code.co_positions(), 0
        position = next(islice(self._positions, index - self._next, None))
        self._next = index + 1
        return _span(self.code, *position)

    def place(self, frame: FrameType) -> Place:
        """The outermost function that holds this code (for code that is no module's method)."""
        if self._place is None:
            self._place = _place(_outermost(self.code, frame.f_globals), frame.f_globals)
        return self._place


def _name(module: nn.Module) -> str:
    return type(module).__name__


_MANY = 1000
"""Local variables from which on they are not read for every operation."""


def _span(code: CodeType, line: int | None, end_line: int | None, col: int | None, end_col: int | None) -> Span:
    if line is None or end_line is None or col is None or end_col is None:
        raise ConversionError(
            f"{code.co_filename}:{line or code.co_firstlineno}: the code has no column information: "
            "run Python without PYTHONNODEBUGRANGES and -X no_debug_ranges"
        )
    return Span(code.co_filename, line, col, end_line, end_col)


def _place(outermost: tuple[str, str, int], scope: Mapping[str, Any]) -> Place:
    file, qualname, line = outermost
    return Place(str(scope.get("__name__", "")), qualname, file, line)


def place_of(function: FunctionType) -> Place:
    """Where a function is written: the outermost one that holds it."""
    return _place(_outermost(function.__code__, function.__globals__), function.__globals__)


def _key(code: CodeType) -> Key:
    return code.co_filename, code.co_firstlineno, code.co_qualname


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _holds(outer: CodeType, key: Key) -> bool:
    """Whether `outer` or code nested in it is the code at `key`. By place: torch.fx runs copies of code objects."""
    return any(_key(code) == key for code in _nested(outer))


def _find_method(code: CodeType, cls: type, scope: Mapping[str, Any]) -> Place | None:
    key = _key(code)
    names = set(code.co_qualname.split("."))
    for likely in (True, False):
        for base in cls.__mro__:
            if base in (nn.Module, object):
                continue
            for name, value in vars(base).items():
                method = _method_code(value, base) if (name in names) is likely else None
                if method is not None and _holds(method, key):
                    return _place((method.co_filename, method.co_qualname, method.co_firstlineno), scope)
    return None


def _find_override(code: CodeType, module: nn.Module, scope: Mapping[str, Any]) -> Place | None:
    """As `_find_method`, among functions that the instance itself holds (`module.forward = function`)."""
    key = _key(code)
    for value in module.__dict__.values():
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            method = _method_code(value, type(module))
            if method is not None and _holds(method, key):
                return _place((method.co_filename, method.co_qualname, method.co_firstlineno), scope)
    return None


def _method_code(value: object, cls: type) -> CodeType | None:
    found = method_function(value, cls)
    return found.__code__ if found is not None else None


def method_function(value: object, cls: type) -> FunctionType | None:
    """The method that a class attribute holds, inside whatever decorators made of it."""
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, (functools.cached_property, functools.partialmethod, functools.partial)):
        value = value.func
    if not isinstance(value, FunctionType):
        return None
    functions = list(_wrapped(value))
    own = [function for function in functions if function.__code__.co_qualname.startswith(f"{cls.__qualname__}.")]
    if own:
        return own[0]
    innermost = value
    while isinstance(inner := getattr(innermost, "__wrapped__", None), FunctionType) and inner in functions:
        innermost = inner
        functions.remove(inner)
    return innermost


def _wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """The function and those it wraps, by `__wrapped__` or in its closure."""
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        current = waiting.pop(0)
        if isinstance(current, MethodType):
            current = current.__func__
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.append(getattr(current, "__wrapped__", None))
        for cell in current.__closure__ or ():
            try:
                waiting.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue


def _outermost(code: CodeType, scope: Mapping[str, Any]) -> tuple[str, str, int]:
    """File, qualified name and first line of the outermost function that holds `code`."""
    head, nested, _ = code.co_qualname.partition(".<locals>")
    if not nested:
        return code.co_filename, code.co_qualname, code.co_firstlineno
    found = _resolve(head, scope)
    if found is not None and _holds(found, _key(code)):
        return found.co_filename, head, found.co_firstlineno
    return code.co_filename, head, _first_line(code, head) or code.co_firstlineno


def _resolve(qualname: str, scope: Mapping[str, Any]) -> CodeType | None:
    names = qualname.split(".")
    value: Any = scope.get(names[0])
    for name in names[1:]:
        value = vars(value).get(name) if isinstance(value, type) else None
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType):
        return None
    codes = (function.__code__ for function in _wrapped(value))
    return next((code for code in codes if code.co_qualname == qualname), None)


def _first_line(code: CodeType, qualname: str) -> int | None:
    """First line of the function `qualname` around `code`, from the source text; None where there is none."""
    try:
        tree = sources.tree(code.co_filename)
    except ConversionError:
        return None
    name = qualname.rpartition(".")[2]
    for node in ast.walk(tree):  # breadth first: the outermost comes first
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= code.co_firstlineno <= (node.end_lineno or first):
                return first
    return None
