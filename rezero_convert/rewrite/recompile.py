"""Edited text becomes a function: recompile one method, execute nothing of its file.

The function keeps the original globals, defaults and closure cells, and decorators are rebuilt around it.
"""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import opcode
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .. import sources
from ..errors import ConversionError
from ..plan import Operand, Place, Site
from . import text

_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


def is_at(code: CodeType, qualname: str | None, line: int) -> bool:
    """Whether a function's code starts at this line of its file, under this name (None for any)."""
    return code.co_firstlineno == line and qualname in (None, code.co_qualname)


def within(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """A function's code and that of the functions in it, each with its edited twin."""
    yield old, new
    inner = [[const for const in code.co_consts if isinstance(const, CodeType)] for code in (old, new)]
    for one, other in zip(*inner, strict=False):
        if one.co_qualname == other.co_qualname:
            yield from within(one, other)


# --- functions inside decorators ---


def _inner(value: Any) -> list[Any]:
    """What a decorated method is made of, one level down."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return [*([value.__dict__["__wrapped__"]] if "__wrapped__" in value.__dict__ else []), *cells]
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, functools.partial):  # as `functools.update_wrapper` leaves it
        return [value.func, *([value.__dict__["__wrapped__"]] if "__wrapped__" in value.__dict__ else [])]
    if isinstance(value, (functools.partialmethod, functools.cached_property)):
        return [value.func]
    wrapped = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
    return [] if wrapped is None else [wrapped]


def parts(value: Any) -> Iterator[Any]:
    """A method and what it wraps, outermost first."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop(0)
        if id(item) in seen or isinstance(item, (nn.Module, Tensor)):
            continue
        seen.add(id(item))
        yield item
        queue += _inner(item)


def closed_over(value: Any) -> Iterator[nn.Module]:
    """The modules in the closures of a method and of what it wraps."""
    cells = (cell for part in parts(value) if isinstance(part, FunctionType) for cell in part.__closure__ or ())
    return (cell.cell_contents for cell in cells if _filled(cell) and isinstance(cell.cell_contents, nn.Module))


def moved(value: FunctionType, twins: Mapping[int, nn.Module]) -> FunctionType:
    """A function with other modules in its closure, by the ids of the old ones; itself if it has none of them.

    Also those that other functions and bound methods in the closure hold.
    """
    return _moved(value, twins, {}) if _holds(value, twins, set()) else value


def _held(value: Any) -> Iterator[Any]:
    """What a function's closure, a bound method or a partial holds."""
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _filled(cell))
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())


def _holds(value: Any, twins: Mapping[int, nn.Module], seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    return id(value) in twins or any(_holds(part, twins, seen) for part in _held(value))


def _moved(value: Any, twins: Mapping[int, nn.Module], memo: dict[int, Any]) -> Any:
    if id(value) in twins:
        return twins[id(value)]
    if id(value) in memo or not _holds(value, twins, set()):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, functools.partial):
        args = [_moved(part, twins, memo) for part in value.args]
        keywords = {name: _moved(part, twins, memo) for name, part in value.keywords.items()}
        return functools.partial(_moved(value.func, twins, memo), *args, **keywords)
    before = value.__closure__ or ()
    cells = [CellType() if _filled(cell) and _holds(cell.cell_contents, twins, set()) else cell for cell in before]
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    memo[id(value)] = made
    for old, new in zip(before, cells, strict=True):
        if new is not old:
            new.cell_contents = _moved(old.cell_contents, twins, memo)
    return _described(made, value)


def codes(value: Any) -> Iterator[CodeType]:
    """The code objects of a method and of what it wraps, outermost first."""
    return (part.__code__ for part in parts(value) if isinstance(part, FunctionType))


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def rebuilt(value: Any, old: CodeType, new: CodeType, memo: dict[int, Any]) -> Any:
    """`value` with the function of code `old` replaced by one of code `new`; what holds it is copied, not changed."""
    if id(value) in memo:
        return memo[id(value)]
    if not any(code is old for code in codes(value)):
        return value
    if isinstance(value, FunctionType):
        return _rebuilt_function(value, old, new, memo)
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(rebuilt(value.__func__, old, new, memo))
    if isinstance(value, MethodType):
        return MethodType(rebuilt(value.__func__, old, new, memo), value.__self__)
    if isinstance(value, property):
        fget, fset, fdel = (rebuilt(part, old, new, memo) for part in (value.fget, value.fset, value.fdel))
        return type(value)(fget, fset, fdel, value.__doc__)
    if isinstance(value, functools.partial):
        part: functools.partial[Any] = type(value)(rebuilt(value.func, old, new, memo), *value.args, **value.keywords)
        part.__dict__.update({name: rebuilt(own, old, new, memo) for name, own in value.__dict__.items()})
        return part
    if isinstance(value, functools.partialmethod):
        return type(value)(rebuilt(value.func, old, new, memo), *value.args, **value.keywords)
    if isinstance(value, functools.cached_property):
        made: functools.cached_property[Any] = functools.cached_property(rebuilt(value.func, old, new, memo))
        made.attrname = value.attrname
        return made
    raise ConversionError(
        f"{old.co_filename}:{old.co_firstlineno}: {old.co_qualname} is wrapped in a {type(value).__qualname__}, "
        "which cannot be made again around the edited method"
    )


def _rebuilt_function(value: FunctionType, old: CodeType, new: CodeType, memo: dict[int, Any]) -> FunctionType:
    cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
    own = value.__code__ is old
    code = new if own else value.__code__
    missing = [name for name in code.co_freevars if name not in cells]
    if missing:
        raise ConversionError(
            f"{old.co_filename}:{old.co_firstlineno}: no value for {missing[0]!r} in {old.co_qualname}"
        )
    changed: list[tuple[CellType, CellType]] = []
    for name, cell in cells.items():
        if not own and _filled(cell) and any(inner is old for inner in codes(cell.cell_contents)):
            cells[name] = CellType()
            changed.append((cells[name], cell))
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, value.__globals__, value.__name__, value.__defaults__, closure)
    memo[id(value)] = made
    for target, cell in changed:
        target.cell_contents = rebuilt(cell.cell_contents, old, new, memo)
    _described(made, value)
    if "__wrapped__" in made.__dict__:
        made.__dict__["__wrapped__"] = rebuilt(made.__dict__["__wrapped__"], old, new, memo)
    return made


def _described(made: FunctionType, like: FunctionType) -> FunctionType:
    """`made`, with all that describes the function it stands for."""
    made.__kwdefaults__ = like.__kwdefaults__
    made.__annotations__ = dict(like.__annotations__)
    made.__qualname__, made.__module__, made.__doc__ = like.__qualname__, like.__module__, like.__doc__
    made.__dict__.update(like.__dict__)
    return made


# --- text and code ---


def edited(
    place: Place, code: CodeType, sites: tuple[Site, ...], replacement: tuple[str, str] | None
) -> tuple[str, str]:
    """File name and text of the method with its edits."""
    header, body, first = _method(place, code)
    if sources.stands_for(place.file) is None:
        _check(place, code, _padded(header + body, first))
    made = text.edit(header + body, sites, text.call, file=place.file, first_line=first)
    if replacement is not None:
        if replacement[0] not in made:
            raise ConversionError(f"{place.file}:{place.line}: no {replacement[0]} in {place.qualname} of this version")
        made = made.replace(*replacement)
    return _filed(place, code, _padded(made, first))


def bypassed(place: Place, code: CodeType, operands: tuple[Operand, ...]) -> tuple[str, str]:
    """File name and text of a method with an operand in the place of each operation or call."""
    header, body, first = _method(place, code)
    if sources.stands_for(place.file) is None:
        _check(place, code, _padded(header + body, first))
    made = text.bypassed(header + body, operands, file=place.file, first_line=first)
    return _filed(place, code, _padded(made, first))


def _filed(place: Place, code: CodeType, made: str) -> tuple[str, str]:
    digest = hashlib.sha256(f"{place.file}\n{made}".encode()).hexdigest()[:10]
    return f"<rezero {place.module}.{code.co_qualname} {digest}>", made


def _method(place: Place, code: CodeType) -> tuple[str, str, int]:
    """A header for the method's indentation ("" if it has none), its lines, and the first line of both."""
    node = sources.function(place)
    if node is None:
        raise ConversionError(f"{place.file}:{place.line}: no {place.qualname} is there (has the file changed?)")
    first, last = place.line, node.end_lineno or place.line
    if isinstance(node, ast.Lambda):
        around = [n for n in ast.walk(sources.tree(place.file)) if isinstance(n, (ast.Assign, ast.AnnAssign, ast.Expr))]
        around = [n for n in around if n.lineno <= node.lineno and (n.end_lineno or 0) >= last]
        if not around:
            raise ConversionError(f"{place.file}:{place.line}: this lambda is not in a statement that can be edited")
        first, last = around[-1].lineno, around[-1].end_lineno or last
    body = "".join(sources.lines(place.file)[first - 1 : last])
    if not body[:1].isspace():
        return "", body, first
    cls = code.co_qualname.split(".")[-2:-1]
    header = f"class {cls[0]}:\n" if cls and cls[0] != "<locals>" else "if 1:\n"
    return header, body, first - 1


def _padded(body: str, first: int) -> str:
    """The text with its first line at line `first`."""
    return "\n" * (first - 1) + body


def compiled(body: str, file: str, like: CodeType) -> CodeType:
    """The code of the function in `body` that stands where `like` stood: same names around it, same free variables."""
    return _dig(_scaffold(ast.parse(body, file), like), file, like)


def _scaffold(tree: ast.Module, like: CodeType) -> ast.Module:
    """The functions and classes around `like`, for its qualified name, private names and free variables."""
    outer = like.co_qualname.split(".")[:-1]
    body: list[ast.stmt] = tree.body
    if outer and outer[-1] != "<locals>" and body and isinstance(body[0], ast.ClassDef):
        outer.pop()
    free = [name for name in like.co_freevars if name != "__class__"]
    while outer:
        name = outer.pop()
        made: ast.ClassDef | ast.FunctionDef
        if name != "<locals>":
            made = ast.ClassDef(name=name, bases=[], keywords=[], body=body, decorator_list=[])
        else:
            values = [ast.arg(arg=name) for name in free]
            args = ast.arguments(posonlyargs=[], args=values, kwonlyargs=[], kw_defaults=[], defaults=[])
            made = ast.FunctionDef(name=outer.pop(), args=args, body=body, decorator_list=[])
            free = []
        body = [made]
    return ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))


def _dig(tree: ast.Module, file: str, like: CodeType) -> CodeType:
    queue: list[CodeType] = [compile(tree, file, "exec", flags=like.co_flags & _FUTURE, dont_inherit=True)]
    for code in queue:
        if code.co_name == like.co_name and is_at(code, like.co_qualname, like.co_firstlineno):
            return code
        queue += [const for const in code.co_consts if isinstance(const, CodeType)]
    raise ConversionError(
        f"{like.co_filename}:{like.co_firstlineno}: {like.co_qualname} is not there (has the file changed?)"
    )


def _check(place: Place, code: CodeType, body: str) -> None:
    """Raise unless `body` is the text that `code` was made of."""
    stale = f"{place.file}:{place.line}: the text of {place.qualname} is not what was imported; restart Python"
    try:
        now = compiled(body, place.file, code)
    except SyntaxError as error:
        raise ConversionError(f"{place.file}:{error.lineno}: syntax error: {error.msg}") from error
    if same(now, code):
        return
    # import hooks (pytest's) rewrite assertions; all else must be there, at its place
    tree = _scaffold(_WithoutAssertions().visit(ast.parse(body, place.file)), code)
    if not _within(_dig(tree, place.file, code), code):
        raise ConversionError(stale)


class _WithoutAssertions(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node)


def same(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same; file and line numbers do not count."""
    if (one.co_code, one.co_names, one.co_varnames, one.co_freevars, one.co_cellvars) != (
        (other.co_code, other.co_names, other.co_varnames, other.co_freevars, other.co_cellvars)
    ):
        return False
    return len(one.co_consts) == len(other.co_consts) and all(map(_same_constant, one.co_consts, other.co_consts))


def _same_constant(one: object, other: object) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return same(one, other)
    return type(one) is type(other) and repr(one) == repr(other)


def _within(part: CodeType, whole: CodeType) -> bool:
    """Whether all names, constants and operations of `part` are in `whole`, at the same positions."""
    return all(mine <= others for mine, others in zip(_marks(part), _marks(whole), strict=True)) and (
        part.co_varnames[: part.co_argcount] == whole.co_varnames[: whole.co_argcount]
    )


def _marks(code: CodeType) -> tuple[set[object], set[object], set[object]]:
    """Names, constants, and operations with their positions, nested functions' included."""
    names: set[object] = {*code.co_names, *code.co_freevars}
    constants: set[object] = {repr(const) for const in code.co_consts if not isinstance(const, CodeType)}
    places = zip(code.co_code[::2], code.co_code[1::2], code.co_positions(), strict=True)
    spots: set[object] = {
        (op, which if op in _KINDS else 0, position)
        for op, which, position in places
        if op in _OPERATIONS and None not in position
    }
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _marks(inner)
            names, constants, spots = names | more[0], constants | more[1], spots | more[2]
    return names, constants, spots


_OPERATIONS = frozenset(
    opcode.opmap[name]
    for name in ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "STORE_ATTR")
    if name in opcode.opmap
)
_KINDS = frozenset(opcode.opmap[name] for name in ("BINARY_OP", "COMPARE_OP"))
"""Operations whose argument says which it is: `+` or `-`."""
