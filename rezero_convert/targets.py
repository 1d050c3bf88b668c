"""From what is typed on the command line to a model: files imported, expressions evaluated, zoo names looked up.

The user's code runs here. Whatever it raises becomes a `ConversionError` of one line that says what was being done,
what was raised, and on which line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .capture.homes import home
from .errors import ConversionError
from .listing import short
from .options import unknown


@dataclass(frozen=True, slots=True)
class Target:
    """A model to look at."""

    model: nn.Module
    inputs: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Replaced(MetaPathFinder):
    """Imports one module from another file: of a package, rewritten text in place of the original."""

    name: str
    file: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.file) if fullname == self.name else None


def load(file: Path, text_file: Path | None = None) -> ModuleType:
    """Import a Python file under its own name, packages around it included.

    Args:
        file: the file; its folder (that of its outermost package) goes to the front of `sys.path`. The copy of an
            installed file is imported in the place of that.
        text_file: import this text in its place.

    Raises:
        ConversionError: the file raises while it is imported.
    """
    root, name = module_name(Path(home(str(file.resolve()))))
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file.resolve()) and text_file is None:
        return loaded
    while name in sys.modules:
        name += "_"  # taken by another module, say the standard library's
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if name.partition(".")[0] in _ZOOS:
        _declare_operators()
    finder = _Replaced(name, str(text_file or file.resolve()))
    sys.meta_path.insert(0, finder)
    try:
        with quiet_stdout(), told(f"importing {file}", file):
            return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)


def module_name(file: Path) -> tuple[Path, str]:
    """The folder to import a file from, and the name it then has: `pkg.sub.model` below packages."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def evaluate(option: str, expression: str, namespace: Mapping[str, Any]) -> Any:
    """The value of an expression of the command line; `torch` and `nn` are known beside the namespace.

    Raises:
        ConversionError: it does not parse, or raises; the message has type, text and line of what was raised.
    """
    names = {"torch": torch, "nn": nn, **namespace}
    with quiet_stdout(), told(f"{option} {expression!r}"):
        return eval(compile(expression.strip(), f"<{option}>", "eval"), names)


def model_of(option: str, expression: str, namespace: Mapping[str, Any]) -> nn.Module:
    """The model that an expression of the command line makes.

    Raises:
        ConversionError: it raises, or makes no `nn.Module`.
    """
    value = evaluate(option, expression, namespace)
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ConversionError(f"{option} {expression!r} is a class; construct it: '{expression}(...)'")
    raise ConversionError(f"{option} {expression!r} is {_kind(value)}, not a torch.nn.Module")


def target(text: str, inputs: str | None = None) -> Target:
    """A model by name: `timm:resnet50`, `torchvision:vit_b_16`, `transformers:gpt2`, `package.module:expression`.

    Models of the zoos get random weights from their configuration, on the meta device where they can.

    Raises:
        ConversionError: there is no such model, or making it raises.
    """
    source, colon, name = text.partition(":")
    if not (colon and name):
        raise ConversionError(f"{text!r}: a target is a .py file or has the form SOURCE:NAME, such as timm:resnet50")
    zoo = _ZOOS.get(source)
    if zoo is None:
        return _from_module(source, name, inputs)
    made = zoo(name)
    given = None if inputs is None else evaluate("--inputs", inputs, {})
    return Target(made.model, given, made.notes)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """What user code prints goes to stderr: stdout is for the diff."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def told(doing: str, file: Path | None = None) -> Iterator[None]:
    """Whatever the block raises, as one line."""
    try:
        yield
    except ConversionError:
        raise
    except (Exception, SystemExit) as error:
        raise ConversionError(f"{doing}: {one_line(error)}{_line_of(error, file)}") from error


def one_line(error: BaseException) -> str:
    """Type and message of an exception, folded to a line of bearable length."""
    message = " ".join(str(error).split())
    message = f"{message[:300]} ..." if len(message) > 300 else message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _line_of(error: BaseException, file: Path | None) -> str:
    """Where the user's code raised: the last of its lines on the traceback."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" ({short(str(error.filename))}:{error.lineno})"
    own = str(file.resolve()) if file else None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    chosen = [frame for frame in frames if frame.filename == own] or frames
    return f" ({short(chosen[-1].filename)}:{chosen[-1].lineno})" if chosen else ""


def _is_users(file: str) -> bool:
    ours = os.path.dirname(os.path.abspath(__file__)) + os.sep
    return not file.startswith((ours, "<")) and f"{os.sep}site-packages{os.sep}" not in file and os.path.exists(file)


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _from_module(source: str, name: str, inputs: str | None) -> Target:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with quiet_stdout(), told(f"importing {source}"):
        _declare_operators()
        namespace = vars(importlib.import_module(source))
    value = evaluate(f"{source}:", name, namespace)
    if callable(value) and not isinstance(value, nn.Module):
        with quiet_stdout(), told(f"{source}:{name}()"):
            value = value()
    if not isinstance(value, nn.Module):
        raise ConversionError(f"{source}:{name} is {_kind(value)}, not a torch.nn.Module")
    return Target(value, None if inputs is None else evaluate("--inputs", inputs, namespace))


def _timm(name: str) -> Target:
    timm = _package("timm")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ConversionError(_unknown("timm", name, known))
    return _on_meta(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))


def _torchvision(name: str) -> Target:
    models = importlib.import_module("torchvision.models") if _package("torchvision") else None
    assert models is not None
    known = models.list_models()
    if name not in known:
        raise ConversionError(_unknown("torchvision", name, known))
    return _on_meta(f"torchvision:{name}", lambda: models.get_model(name, weights=None))


def _transformers(name: str) -> Target:
    """By model type (`gpt2`: the bare model with its default configuration) or by class (`GPT2LMHeadModel`)."""
    transformers = _package("transformers")
    if name[:1].isupper():
        cls = getattr(transformers, name, None)
        if cls is None or not hasattr(cls, "config_class"):
            raise ConversionError(f"transformers has no model class {name!r}")
        return _on_meta(f"transformers:{name}", lambda: cls(cls.config_class()))
    configs = transformers.CONFIG_MAPPING
    if name not in configs:
        raise ConversionError(_unknown("transformers", name, sorted(configs.keys())))
    return _on_meta(f"transformers:{name}", lambda: transformers.AutoModel.from_config(configs[name]()))


def _on_meta(what: str, make: Callable[[], nn.Module]) -> Target:
    """A model without memory for its weights, if its constructor bears that, else a real one."""
    try:
        with quiet_stdout(), torch.device("meta"):
            return Target(make().eval())
    except Exception as error:
        with quiet_stdout(), told(what):
            model = make().eval()
        return Target(model, notes=(f"built with real weights: on the meta device {one_line(error)}",))


def _declare_operators() -> None:
    """Let a torchvision be imported whose operators cannot be loaded.

    torchvision from PyPI beside a CPU build of torch fails at import, for lack of two operators that no backbone runs.
    """
    found = find_spec("torchvision") if "torchvision" not in sys.modules else None
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(found.origin).parent.glob("_C*"):
            ctypes.CDLL(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _package(name: str) -> Any:
    try:
        _declare_operators()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ConversionError(f"importing {name}: {one_line(error)}") from error
        raise ConversionError(f"{name} is not installed: pip install 'rezero-convert[zoo]'") from error
    except Exception as error:
        raise ConversionError(f"importing {name}: {one_line(error)}") from error


def _unknown(zoo: str, name: str, known: Sequence[str]) -> str:
    """`options.unknown` without its list of everything: a zoo has hundreds of names."""
    _, question, hint = unknown("model", name, known).rpartition("; did you mean")
    return f"{zoo} has no model {name!r}" + (f"; did you mean{hint}" if question else "")


_ZOOS: dict[str, Callable[[str], Target]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
