"""A text for what has none: `forward` of a class made by `exec` or typed at a prompt, as torch.fx traces it."""

from __future__ import annotations

import ast
import contextlib
import dis
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import sources
from ..errors import ConversionError
from .facts import operation
from .guard import untouched
from .recorded import is_leaf, one_line
from .symbolic import is_required


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """A context in which every module that adds in a `forward` without source text runs a text made for it.

    The text is what torch.fx traces of that one module with its children as leaves; `sources.stands_for` knows what it
    stands for. An argument that is `self.training` is so still. The modules are as they were afterwards.

    Yields:
        The names of the classes that were read so, and a note per class: how it was read, or why it cannot be.
    """
    notes: dict[str, None] = {}
    held: list[nn.Module] = []
    try:
        for module in list(model.modules()):
            function = _without_text(module)
            if function is None:
                continue
            name = type(module).__qualname__
            try:
                module.__dict__["forward"] = MethodType(_stand_in(module, function), module)
            except ConversionError as error:
                notes[f"{name} has no source text, and cannot be traced by torch.fx: {error}"] = None
                continue
            held.append(module)
            notes[
                f"{name} has no source text: what torch.fx traces of its forward, with its children as leaves, is "
                "rewritten in its place; its conditions are settled as they are now"
            ] = None
        yield tuple(dict.fromkeys(type(module).__qualname__ for module in held)), tuple(notes)
    finally:
        for module in held:
            del module.__dict__["forward"]


def _without_text(module: nn.Module) -> FunctionType | None:
    """A module's `forward`, if it adds and its text cannot be had."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or is_leaf(module) or "forward" in module.__dict__:
        return None
    function = inspect.unwrap(type(module).forward)
    if not isinstance(function, FunctionType) or not _adds(function.__code__) or _has_text(function.__code__):
        return None
    return function


@lru_cache(maxsize=4096)
def _adds(code: CodeType) -> bool:
    return not {operation(name) for name in code.co_names}.isdisjoint(("add", "sub", "addcmul", "lerp", "sum")) or any(
        instruction.opname == "BINARY_OP" and instruction.argrepr in ("+", "-", "+=", "-=")
        for instruction in dis.get_instructions(code)
    )


def _has_text(code: CodeType) -> bool:
    return (code.co_name, code.co_firstlineno) in _definitions(code.co_filename)


@sources.cached
def _definitions(file: str) -> frozenset[tuple[str, int]]:
    """Names and first lines of the functions in a file; none if its text cannot be had."""
    nodes = list(ast.walk(sources.tree(file))) if sources.has_text(file) else []
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    named = {(node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])) for node in functions}
    return frozenset(named | {("<lambda>", node.lineno) for node in nodes if isinstance(node, ast.Lambda)})


class _Tracer(fx.Tracer):
    """Children are leaves; optional arguments keep their defaults."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())
        required = [parameter for parameter in parameters[1:] if is_required(parameter)]
        proxies = [self.create_proxy("placeholder", parameter.name, (), {}) for parameter in required]
        keywords = [parameter.name for parameter in required if parameter.kind is parameter.KEYWORD_ONLY]

        def call(module: nn.Module, *values: Any) -> Any:
            plain = len(values) - len(keywords)
            return root_fn(module, *values[:plain], **dict(zip(keywords, values[plain:], strict=True)))

        return call, [self.root, *proxies]


def _stand_in(module: nn.Module, function: FunctionType) -> FunctionType:
    """`function` again, from a text that does for `module` what it does."""
    code = function.__code__
    if type(module).__dict__.get("forward") is not function:
        raise ConversionError(f"{code.co_qualname} is inherited or decorated")
    traced = _for_both_modes(_traced(module, False), _traced(module, True))
    statements = "\n".join(map(ast.unparse, traced.definition.body))
    head = [f"def {code.co_name}{_signature(function)}:", *_guards(function), *_imports(traced, function)]
    body = "\n".join([*head, textwrap.indent(statements, "    ")])
    cls = code.co_qualname.split(".")[-2]
    text = "\n" * (code.co_firstlineno - 2) + f"class {cls}:\n" + textwrap.indent(body, "    ") + "\n"
    file = f"<torch.fx trace of {code.co_qualname} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    sources.stand_in(file, text, code.co_filename)
    outer = compile(text, file, "exec", dont_inherit=True)
    inner = _nested(_nested(outer, cls), code.co_name).replace(co_qualname=code.co_qualname)
    made = FunctionType(inner, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


def _nested(code: CodeType, name: str) -> CodeType:
    return next(item for item in code.co_consts if isinstance(item, CodeType) and item.co_name == name)


class _Traced(NamedTuple):
    """The function that torch.fx generates, and what its global names are."""

    definition: ast.FunctionDef
    names: dict[str, Any]


def _traced(module: nn.Module, training: bool) -> _Traced:
    before = {*module.__dict__, *module._buffers, *module._parameters}
    with untouched(module, training=training):
        try:
            made = _Tracer().trace(module).python_code("self")
        except Exception as error:  # whatever a forward may raise on proxies
            raise ConversionError(one_line(error)) from error
        added = {*module.__dict__, *module._buffers, *module._parameters} - before
    if added:
        raise ConversionError("its forward makes tensors that depend on no argument")
    definition = ast.parse(made.src).body[-1]
    assert isinstance(definition, ast.FunctionDef)
    return _Traced(definition, made.globals)


def _for_both_modes(evaluation: _Traced, train: _Traced) -> _Traced:
    """One function for eval and train mode: a constant that tells the mode in both becomes `self.training`."""
    for one, other in zip(ast.walk(evaluation.definition), ast.walk(train.definition), strict=False):
        if not isinstance(one, ast.Constant) or not isinstance(other, ast.Constant):
            continue
        if isinstance(one.value, bool) and isinstance(other.value, bool) and one.value is not other.value:
            one.value = other.value = _Code("self.training" if other.value else "not self.training")
    if ast.dump(evaluation.definition) != ast.dump(train.definition):
        raise ConversionError("its forward does something else in train mode than in eval mode")
    return _Traced(evaluation.definition, {**evaluation.names, **train.names})


class _Code(str):
    """Text that is written as it is where a constant stood."""

    def __repr__(self) -> str:
        return f"({self})"


def _signature(function: FunctionType) -> str:
    """The arguments as in the original, which gives their defaults their values."""
    signature = inspect.signature(function)
    return str(
        signature.replace(
            parameters=[
                parameter.replace(
                    annotation=parameter.empty,
                    default=parameter.default if parameter.default is parameter.empty else None,
                )
                for parameter in signature.parameters.values()
            ],
            return_annotation=signature.empty,
        )
    )


def _guards(function: FunctionType) -> list[str]:
    """What refuses other values of optional arguments than those that were traced with."""
    lines = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if is_required(parameter):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            given, traced = parameter.name, "nothing"
        elif parameter.default is None or isinstance(parameter.default, (bool, int, float, str)):
            traced = repr(parameter.default)
            given = f"{parameter.name} is not None" if traced == "None" else f"{parameter.name} != {traced}"
        else:
            raise ConversionError(f"the default of its argument {parameter.name} cannot be written as a literal")
        problem = f"{function.__qualname__} has no source text and was traced with {traced} for {parameter.name}"
        lines += [f"    if {given}:", f"        raise NotImplementedError({problem!r})"]
    return lines


def _imports(traced: _Traced, function: FunctionType) -> list[str]:
    """Statements that give the global names of the generated code their values."""
    body = ast.Module(traced.definition.body, [])
    used = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    lines = []
    for name in sorted(used & set(traced.names)):
        value = traced.names[name]
        if isinstance(value, ModuleType):
            lines.append(f"    import {value.__name__} as {name}")
        elif isinstance(value, float):
            lines.append(f"    {name} = float({str(value)!r})")
        elif _importable(value):
            lines.append(f"    from {value.__module__} import {value.__name__} as {name}")
        elif function.__globals__.get(name) is not value:
            raise ConversionError(f"its forward calls {name}, which cannot be imported")
    return lines


def _importable(value: Any) -> bool:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return isinstance(name, str) and getattr(sys.modules.get(str(module)), name, None) is value
