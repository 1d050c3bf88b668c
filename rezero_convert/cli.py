"""The command line: arguments in, exit code out. torch is imported when the arguments have proved to be in order."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import gc
import glob
import io
import json
import multiprocessing
import os
import sys
import tokenize
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import ConversionError
from .files import replace
from .listing import number, visible
from .methods import METHODS

if TYPE_CHECKING:
    from .api import SourceResult
    from .fresh import Proof
    from .report import Report

PROGRAM = "rezero-convert"
_HELP = """\
Rewrites the residual blocks of PyTorch models, x + F(x), into ReZero blocks, x + alpha * F(x).

  rezero-convert model.py              what would change: report on stderr, diff on stdout; runs none of your code
  rezero-convert model.py --write      change the file
  rezero-convert src/ --check          exit code 1 if there is anything to rewrite
  rezero-convert model.py --model 'Net()' --inputs 'torch.randn(1, 8),'     by running the model; validates the result
  rezero-convert audit timm:resnet50   report on a model of timm, torchvision, transformers, or package.module:Class

rezero-convert --help lists the options.
"""
_INPUTS = "a tensor, a tuple of arguments, or a dict of keyword arguments"
_SVG = "draw the residual streams, and what becomes of them, as an SVG file"
_PAGE = "write the report, with the drawing and the source lines, as a page of HTML"
_NOTHING = "nothing to rewrite"


@dataclass(frozen=True, slots=True)
class _File:
    """One file on its way through."""

    name: str
    path: Path | None
    """None for standard input."""
    text: str
    bom: bool = False

    def data(self, text: str) -> bytes:
        return (b"\xef\xbb\xbf" if self.bom else b"") + text.encode()


@dataclass(frozen=True, slots=True)
class _Result:
    """What became of a file."""

    file: _File
    text: str
    report: Report
    notes: tuple[str, ...] = ()
    drawing: str | None = None
    """SVG, if asked for, or if a page is."""
    validation: Proof | None = None
    """Exact route: of the rewritten file."""

    @property
    def changed(self) -> bool:
        return self.text != self.file.text


@dataclass(frozen=True, slots=True)
class _Screen:
    """stderr: for people."""

    color: bool
    quiet: bool

    def show(self, report: Report) -> None:
        """A table on a terminal, lines elsewhere."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            from rich.console import Console

            Console(stderr=True, no_color=not self.color).print(report)
        else:
            print(report, file=sys.stderr)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(visible(f"{PROGRAM}: {line}"), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Raises `ConversionError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConversionError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: nothing to do, or done. 1: `--check` found something to rewrite. 2: an error, told on one line of stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments:
            print(_HELP, end="")
            return 0
        if arguments[0] == "audit":
            return _audit(_parsed(_audit_parser(), arguments[1:]))
        return _convert(_parsed(_convert_parser(), arguments))
    except ConversionError as error:
        return _failed(str(error))
    except BrokenPipeError:  # the reader of the diff has gone; nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        return _failed("interrupted")
    except Exception as error:
        return _failed(_crash(error))


def _failed(message: str) -> int:
    print(visible(f"{PROGRAM}: error: {' '.join(message.split())}"), file=sys.stderr)
    return 2


def _crash(error: Exception, what: str = "") -> str:
    """A mistake of ours: one line as well, and not Python's exit code 1, which means something here."""
    if sys.flags.dev_mode:
        raise error
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{what}internal error: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return f"{message}; python -X dev -m rezero_convert shows the traceback"


# Arguments


def _convert_parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="Rewrites the residual blocks of PyTorch models, x + F(x), into ReZero blocks, x + alpha * F(x). "
        "The report goes to stderr, the diff to stdout. Files are changed only with --write or -o, and no code of "
        "theirs is run without --model.",
        epilog=f"'{PROGRAM} audit --help' tells about models of timm, torchvision, transformers and your packages. "
        "Exit codes: 0 nothing to do or done, 1 --check found something to rewrite, 2 an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .py file, a folder of them, a glob, or - for stdin")
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--write", action="store_true", help="change the files in place")
    out.add_argument("-o", "--output", metavar="OUT", help="write the rewritten text here (- for stdout)")
    out.add_argument("--check", action="store_true", help="exit with 1 if there is anything to rewrite; no diff")
    parser.add_argument("--diff", action="store_true", help="the diff on stdout with --write, -o or --check, too")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout, instead of the diff")
    parser.add_argument("-j", "--jobs", metavar="N", type=int, help="processes for many files (default: one a core)")
    _add_views(parser)
    exact = parser.add_argument_group("exact route: run the model, validate the rewritten file in a fresh process")
    exact.add_argument("--model", metavar="EXPR", help="expression in the file's namespace that makes the model")
    exact.add_argument("--inputs", metavar="EXPR", help=_INPUTS)
    _add_options(parser)
    return parser


def _audit_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} audit",
        description="Says for every add of a model what it is and what the conversion would do. Changes nothing.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="timm:NAME, torchvision:NAME, transformers:TYPE-OR-CLASS, package.module:EXPRESSION (a class or function "
        "is called), or a .py file",
    )
    parser.add_argument("--inputs", metavar="EXPR", help=_INPUTS)
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    _add_views(parser)
    _add_options(parser)
    return parser


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--svg", metavar="FILE", help=_SVG)
    parser.add_argument("--html", metavar="FILE", help=_PAGE)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `rezero_convert.convert`, checked there, so that both say the same."""
    group = parser.add_argument_group("conversion")
    group.add_argument("--method", metavar="NAME", help=f"{', '.join(METHODS)} (default: {next(iter(METHODS))})")
    group.add_argument("--alpha-init", metavar="X", help="start value of the gates: a number (default 0), or preserve")
    group.add_argument(
        "--drop-norm",
        metavar="KINDS",
        help="any of layer (default), batch, group, instance, comma-separated; none; all",
    )
    group.add_argument("--activation", metavar="WHERE", help="after the add: branch (move it there; default) or keep")
    group.add_argument("--include", metavar="PATTERN", action="append", help="only modules that match (repeatable)")
    group.add_argument("--exclude", metavar="PATTERN", action="append", help="no modules that match (repeatable)")
    group.add_argument("--share", metavar="HOW", help="one alpha per branch (default) or layer")
    group.add_argument("--granularity", metavar="HOW", help="one number a gate: scalar, or one a channel: channel")
    group.add_argument("--long-skips", action="store_true", default=None, help="gate long skips too")
    group = parser.add_argument_group("talk")
    group.add_argument("--no-color", action="store_true", help="no colors; the variable NO_COLOR does the same")
    group.add_argument("-q", "--quiet", action="store_true", help="errors only on stderr")


def _parsed(parser: _Parser, arguments: Sequence[str]) -> argparse.Namespace:
    known, rest = parser.parse_known_args(arguments)
    for argument in rest:
        name = argument.partition("=")[0]
        near = get_close_matches(name, parser._option_string_actions, n=1)
        raise ConversionError(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return known


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    from .options import options
    from .settings import project_settings

    names = ["method", "alpha_init", "drop_norm", "activation", "include", "exclude", "share", "long_skips"]
    names += ["granularity"]
    given = project_settings(Path.cwd(), names)
    try:
        options(**given)
    except ConversionError as error:
        raise ConversionError(f"pyproject.toml: [tool.rezero-convert]: {error}") from error
    given |= {name: value for name in names if (value := getattr(arguments, name)) is not None}
    options(**given)  # before anything is run
    return given


def _screen(arguments: argparse.Namespace) -> _Screen:
    return _Screen(color=not (arguments.no_color or os.environ.get("NO_COLOR")), quiet=arguments.quiet)


# rezero-convert FILE ...


def _convert(arguments: argparse.Namespace) -> int:
    given, screen = _given(arguments), _screen(arguments)
    named = list(_paths(arguments.files))
    _check_together(arguments, named)
    reports: list[dict[str, Any]] = []
    changed = failed = False
    for name, outcome in _progress(_outcomes(named, arguments, given), len(named), screen):
        try:
            if outcome is None:
                continue
            if isinstance(outcome, ConversionError):
                raise outcome
            _deliver(outcome, arguments, screen)
        except ConversionError as error:
            failed = bool(_failed(str(error)))
            continue
        except Exception as error:
            failed = bool(_failed(_crash(error, f"{name}: ")))
            continue
        changed |= outcome.changed
        reports.append(_json(outcome))
    if arguments.json and reports:
        _print_json(reports, single=len(named) == 1)
    if failed:
        return 2
    return 1 if arguments.check and changed else 0


def _check_together(arguments: argparse.Namespace, named: Sequence[_Named]) -> None:
    """Check the arguments with each other and with the files.

    Raises:
        ConversionError: they do not go together.
    """
    if arguments.inputs is not None and arguments.model is None:
        raise ConversionError("--inputs without --model: which model are they for?")
    for option in ("output", "model", "svg", "html"):
        if getattr(arguments, option) is not None and len(named) != 1:
            raise ConversionError(f"--{option} is for one file, not {len(named)}")
    if arguments.write and None in (path for _, path, _ in named):
        raise ConversionError("--write cannot change standard input; use -o -")
    if arguments.diff and (arguments.json or arguments.output == "-"):
        raise ConversionError(f"--diff and {'--json' if arguments.json else '-o -'} both go to standard output")
    _check_views(arguments, [path for _, path, _ in named if path is not None])
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConversionError(f"--jobs must be at least 1, not {arguments.jobs}")


def _check_views(arguments: argparse.Namespace, sources: Sequence[Path]) -> None:
    """Check that drawing and page are files of their own.

    Raises:
        ConversionError: they are not.
    """
    others = {path.resolve() for path in sources}
    output = getattr(arguments, "output", None)
    if output not in (None, "-"):
        others.add(Path(output).resolve())
    for option in ("svg", "html"):
        name = getattr(arguments, option)
        if name is not None and Path(name).resolve() in others:
            raise ConversionError(f"--{option} {name}: the same file is the source, or another output")
        others |= {Path(name).resolve()} if name is not None else set()


_Named = tuple[str, Path | None, bool]
"""Name, path (None: stdin), and whether it was found in a folder or by a glob."""


def _paths(files: Iterable[str]) -> Iterator[_Named]:
    """The files to work on, each once.

    Raises:
        ConversionError: there is no such file, or no Python file in a folder or by a glob.
    """
    seen: set[Path] = set()
    for name in files:
        if name == "-":
            yield "<stdin>", None, False
            continue
        for shown, path, found in _expanded(name):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield shown, path, found


def _expanded(name: str) -> Iterator[tuple[str, Path, bool]]:
    path = Path(name)
    if path.is_dir():
        members, what = sorted(_members(path)), "no .py files in this folder"
    elif path.exists():
        yield name, path, False
        return
    elif glob.has_magic(name):
        members = sorted(Path(one) for one in glob.glob(name, recursive=True) if one.endswith(".py"))
        what = "no .py file matches"
    else:
        members, what = [], "no such file or folder"
    if not members:
        raise ConversionError(f"{name}: {what}")
    yield from ((str(member), member, True) for member in members)


def _leads_out(path: Path, named: Iterable[str]) -> bool:
    """Whether a file found in a folder is a link to one that is in none of what was named."""
    target = path.resolve()
    return path.is_symlink() and not any(target.is_relative_to(Path(name).resolve()) for name in named)


def _members(folder: Path) -> Iterator[Path]:
    """The .py files below a folder, but for hidden folders, caches and virtual environments."""
    for root, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and not Path(root, name, "pyvenv.cfg").exists()
        ]
        found = (Path(root, name) for name in files if name.endswith(".py"))
        yield from (path for path in found if path.is_file())  # no pipes, no editor's lock


_MANY = 8
"""Files from which on they are worth processes of their own, each of which imports torch."""

_Outcome = tuple[str, "_Result | ConversionError | None"]
"""A file's name and what became of it; None: there is no module class in it, and it was not all that was asked for."""


def _outcomes(named: list[_Named], arguments: argparse.Namespace, given: dict[str, Any]) -> Iterator[_Outcome]:
    """Every file rewritten, in order; nothing is written yet."""
    jobs = min(arguments.jobs or (os.cpu_count() or 1 if len(named) >= _MANY else 1), len(named))
    work = functools.partial(_outcome, arguments=arguments, given=given)
    if jobs == 1 or arguments.model is not None:
        yield from map(work, named)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, named)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _outcome(named: _Named, arguments: argparse.Namespace, given: dict[str, Any]) -> _Outcome:
    name, path, member = named
    _load()
    try:
        if arguments.write and member and path is not None and _leads_out(path, arguments.files):
            raise ConversionError(f"{name}: a link to {path.resolve()}, which was not named: name it to change it")
        file = _read(name, path)
        if _has_model(file):
            return name, _rewrite(file, arguments, given)
    except ConversionError as error:
        return name, error
    except (RecursionError, MemoryError):
        return name, ConversionError(f"{name}: its expressions or statements are nested too deeply")
    except Exception as error:  # its traceback would not come through from another process
        return name, ConversionError(_crash(error, f"{name}: "))
    if member or arguments.check or len(arguments.files) > 1:
        return name, None
    return name, ConversionError(f"{name}: no torch.nn.Module class in this file")


def _load() -> None:
    """Import what conversions need without garbage collection, a third of the time: nearly all that is made stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        from . import api  # noqa: F401
    finally:
        if enabled:
            gc.enable()


def _progress(outcomes: Iterable[_Outcome], total: int, screen: _Screen) -> Iterable[_Outcome]:
    if total < 5 or screen.quiet or not sys.stderr.isatty():
        return outcomes
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, no_color=not screen.color)
    return track(outcomes, "rewriting", total, console=console, transient=True)


def _read(name: str, path: Path | None) -> _File:
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{name}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
        declared, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if not declared.startswith("utf-8") and data.decode(declared, errors="replace") != text:
            raise ConversionError(f"{name}: declared to be {declared}, not UTF-8: Python reads another text in it")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConversionError(f"{name}:{line}: not UTF-8 ({error.reason})") from error
    except SyntaxError as error:
        raise ConversionError(f"{name}: syntax error: {error.msg}") from error
    return _File(name, path, text, bom=data.startswith(b"\xef\xbb\xbf"))


def _has_model(file: _File) -> bool:
    """Whether the text defines a class that is an `nn.Module`.

    Raises:
        ConversionError: it has a syntax error.
    """
    if "class " not in file.text:
        _check_syntax(file)
        return False
    from . import sources
    from .capture import static

    sources.register(file.name, file.text)
    return bool(static.classes(file.name))


def _check_syntax(file: _File) -> None:
    from . import sources

    sources.register(file.name, file.text)
    sources.tree(file.name)


def _rewrite(file: _File, arguments: argparse.Namespace, given: dict[str, Any]) -> _Result:
    """The file's text rewritten; by the exact route if a model is given, and then proved."""
    from . import api

    if arguments.model is None:
        made = api.convert_source(file.text, file=file.name, **given)
        return dataclasses.replace(_result(file, made), drawing=_drawn_text(made.report, file.name, arguments))
    from . import fresh, targets

    if file.path is None:
        raise ConversionError("--model needs a file to import, not standard input")
    path = file.path.resolve()
    namespace = vars(targets.load(file.path))
    model = targets.model_of("--model", arguments.model, namespace)
    inputs = None if arguments.inputs is None else targets.evaluate("--inputs", arguments.inputs, namespace)
    with targets.quiet_stdout(), targets.told(f"{file.name}: --model {arguments.model!r}"):
        made = api.convert_source(file.text, file=str(path), model=model, example_inputs=inputs, **given)
    result = _result(file, made)
    if _is_drawn(arguments):
        from . import drawing

        with targets.quiet_stdout(), targets.told(f"{file.name}: --model {arguments.model!r}"):
            result = dataclasses.replace(result, drawing=drawing.drawn_report(result.report, model, inputs))
    if result.changed:
        proof = fresh.prove(path, result.text, arguments.model, arguments.inputs, given)
        if not proof.ok:
            first, *more = proof.failures
            others = f" (and {len(more)} more)" if more else ""
            raise ConversionError(f"{file.name}: the rewritten file does not hold: {first}{others}")
        count = f"{number(proof.blocks, 'gated block')} {'was' if proof.blocks == 1 else 'were'}"
        what = count if proof.blocks else "the model was"
        note = f"imported in a fresh process, where {what} validated"
        unread = [
            f"{name} gates a branch that the rewritten model has not: what it is added to may be constant there"
            for name in fresh.unread(result.report.plan, proof, model)
        ]
        result = dataclasses.replace(result, notes=(*result.notes, note, *unread), validation=proof)
    return result


def _drawn_text(report: Report, file: str, arguments: argparse.Namespace) -> str | None:
    """The drawing of a report on text alone, if asked for."""
    if not _is_drawn(arguments):
        return None
    from . import drawing

    return drawing.drawn_text(report, file)


def _is_drawn(arguments: argparse.Namespace) -> bool:
    return arguments.svg is not None or arguments.html is not None


def _write_views(
    report: Report,
    drawing: str | None,
    arguments: argparse.Namespace,
    screen: _Screen,
    **more: Any,
) -> None:
    """The drawing, and the page with it and `more`, where they are asked for."""
    for name, text in (
        (arguments.svg, drawing),
        (arguments.html, arguments.html and report.to_html(drawing=drawing or "", **more)),
    ):
        if name is not None and text is not None:
            replace(Path(name), text.encode())
            screen.say(f"wrote {name}")


def _result(file: _File, made: SourceResult) -> _Result:
    return _Result(file, made.text, dataclasses.replace(made.report, title=file.name), tuple(made.notes))


def _json(result: _Result) -> dict[str, Any]:
    found = {"file": result.file.name, **result.report.to_dict(), "notes": _notes(result)}
    return found if result.validation is None else {**found, "validation": result.validation.to_dict()}


def _notes(result: _Result) -> list[str]:
    notes = list(dict.fromkeys((*result.report.plan.notes, *result.report.notes, *result.notes)))
    return notes if result.changed else [*notes, _NOTHING]


def _deliver(result: _Result, arguments: argparse.Namespace, screen: _Screen) -> None:
    """Report to stderr; text to the file, the output or, as a diff, to stdout."""
    name = result.file.name
    screen.show(result.report)
    for note in result.notes:
        screen.say(note if note.startswith(f"{name}:") else f"{name}: {note}")
    if not result.changed:
        screen.say(f"{name}: {_NOTHING}")
    noted = dataclasses.replace(result.report, notes=(*result.report.notes, *result.notes))
    made = diff(name, result.file.text, result.text)
    _write_views(noted, result.drawing, arguments, screen, diff=made, validation=result.validation)
    if arguments.output == "-":
        _emit(result.file.data(result.text))
    elif arguments.output is not None:
        replace(Path(arguments.output), result.file.data(result.text), mode_of=result.file.path)
        screen.say(f"wrote {arguments.output}")
    elif arguments.write:
        if result.changed and result.file.path is not None:
            replace(result.file.path, result.file.data(result.text), mode_of=result.file.path)
            screen.say(f"wrote {name}")
    elif arguments.check and result.changed:
        screen.say(f"would rewrite {name}")
    plain = not (arguments.write or arguments.check or arguments.output or arguments.json)
    if result.changed and (arguments.diff or plain):
        _print_diff(result, screen)


def diff(name: str, before: str, after: str) -> str:
    """The unified diff of two texts, for `git apply` and `patch -p1`; only "\\n" ends a line."""
    sides = (name, name) if os.path.isabs(name) or name.startswith("<") else (f"a/{name}", f"b/{name}")
    made = difflib.unified_diff(_rows(before), _rows(after), _quoted(sides[0]), _quoted(sides[1]))
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in made)


def _quoted(name: str) -> str:
    """A file's name as git writes it in a patch: with control characters in octal."""
    if name.isprintable():
        return name
    data = os.fsencode(name)
    return '"' + "".join(chr(one) if 32 <= one < 127 and one not in b'"\\' else f"\\{one:03o}" for one in data) + '"'


def _rows(text: str) -> list[str]:
    lines = text.split("\n")
    rows = [f"{line}\n" for line in lines[:-1]]
    return rows + ([lines[-1]] if lines[-1] else [])


def _print_diff(result: _Result, screen: _Screen) -> None:
    text = diff(result.file.name, result.file.text, result.text)
    if not (screen.color and sys.stdout.isatty()):
        _emit(text.encode())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in text.splitlines():
        style = "bold" if line.startswith(("+++", "---")) else styles.get(line[:1], "")
        console.print(Text(visible(line), style=style))


def _emit(data: bytes) -> None:
    """To stdout, byte by byte: what is piped into `patch` must not be translated."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _print_json(reports: list[dict[str, Any]], single: bool) -> None:
    whole = reports[0] if single else {"version": reports[0]["version"], "reports": reports}
    _emit(json.dumps(whole, indent=2, allow_nan=False).encode() + b"\n")


# rezero-convert audit TARGET ...


def _audit(arguments: argparse.Namespace) -> int:
    given, screen = _given(arguments), _screen(arguments)
    for option in ("svg", "html"):
        if getattr(arguments, option) is not None and len(arguments.targets) > 1:
            raise ConversionError(f"--{option} is for one target, not {len(arguments.targets)}")
    _check_views(arguments, [Path(name) for name in arguments.targets])
    reports: list[dict[str, Any]] = []
    failed = False
    for name in arguments.targets:
        try:
            report, drawing = _audited(name, arguments, given)
            _write_views(report, drawing, arguments, screen)
        except ConversionError as error:
            failed = bool(_failed(str(error)))
            continue
        if not arguments.json:
            screen.show(report)
        reports.append({"target": name, **report.to_dict()})
    if arguments.json and reports:
        _print_json(reports, single=len(arguments.targets) == 1)
    return 2 if failed else 0


def _audited(name: str, arguments: argparse.Namespace, given: dict[str, Any]) -> tuple[Report, str | None]:
    """The report on a target, and its drawing if asked for."""
    from . import api, targets

    path = Path(name)
    if name == "-" or name.endswith(".py") or path.exists():
        if path.is_dir():
            raise ConversionError(f"{name}: a folder; audit takes files and models, {PROGRAM} {name} takes folders")
        if name != "-" and not path.exists():
            raise ConversionError(f"{name}: no such file")
        file = _read(name if name != "-" else "<stdin>", None if name == "-" else path)
        report = api.audit_source(file.text, file=file.name, **given)
        return report, _drawn_text(report, file.name, arguments)
    found = targets.target(name, arguments.inputs)
    with targets.quiet_stdout(), targets.told(name):
        if _is_drawn(arguments):
            from . import drawing

            report, drawn = drawing.drawn(found.model, found.inputs, title=name, **given)
        else:
            report, drawn = api.audit(found.model, found.inputs, **given), None
    return dataclasses.replace(report, title=name, notes=(*report.notes, *found.notes)), drawn
