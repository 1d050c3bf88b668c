"""Questions about the source text behind a finding: how an operand, a call or an attribute is written."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .. import sources
from ..capture.facts import operation
from ..errors import ConversionError
from ..plan import Operand, Place, Span

_SKIP = re.compile(r"#\s*rezero:\s*skip\b")
_ADD_CALLS = frozenset({"add", "sub", "addcmul", "lerp", "scatter_add", "index_add", "index_put"})


class Definition(NamedTuple):
    """The text of a class."""

    file: str
    qualname: str
    hidden: frozenset[str] = frozenset()
    """Its methods that the class in question overrides and never calls."""
    unread: frozenset[str] = frozenset()
    """The names in its methods, where their text cannot be had (`__init__`'s, and what is traced, left out)."""


@sources.cached
def line(span: Span) -> str:
    """The source line of a span, stripped; "" if there is no text."""
    try:
        rows = sources.lines(span.file)
    except ConversionError:
        return ""
    return rows[span.line - 1].strip() if span.line <= len(rows) else ""


@sources.cached
def expression(span: Span) -> ast.AST | None:
    """The syntax at a span; None where there is no text."""
    try:
        return sources.expression(span)
    except ConversionError:
        return None


def skip_comment(span: Span, place: Place) -> int | None:
    """The line of a `# rezero: skip` on an add, or on the head of the function or class that holds it."""
    marked = _skips(span.file)
    if not marked:
        return None
    heads = [sources.function(place), sources.class_of(place.file, place.cls) if place.cls else None]
    lines = set(range(span.line, span.end_line + 1))
    for head in heads:
        if isinstance(head, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines |= set(range(head.lineno, max(head.body[0].lineno, head.lineno + 1)))
    return min(lines & marked, default=None)


@sources.cached
def _skips(file: str) -> frozenset[int]:
    """The lines with a comment `# rezero: skip`."""
    if not sources.has_text(file) or "rezero:" not in sources.text(file):
        return frozenset()
    tokens = tokenize.generate_tokens(io.StringIO(sources.text(file)).readline)
    return frozenset(token.start[0] for token in tokens if token.type == tokenize.COMMENT and _SKIP.match(token.string))


@sources.cached
def operand(at: Operand) -> ast.expr | None:
    """The expression of an operand (see `Operand` for what its index means)."""
    node = expression(at.span)
    if isinstance(node, ast.BinOp):
        return {0: node.left, 1: node.right}.get(at.index) if isinstance(at.index, int) else None
    if isinstance(node, ast.AugAssign):
        return {0: node.target, 1: node.value}.get(at.index) if isinstance(at.index, int) else None
    if isinstance(node, ast.Call):
        return _argument(node, at)
    return None


def _argument(call: ast.Call, at: Operand) -> ast.expr | None:
    index = at.index
    if isinstance(index, str):
        return next((keyword.value for keyword in call.keywords if keyword.arg == index), None)
    places: list[ast.expr] = list(call.args)
    if at.receiver and isinstance(call.func, ast.Attribute):
        places.insert(0, call.func.value)
    if index >= len(places) or any(isinstance(place, ast.Starred) for place in places[: index + 1]):
        return None
    return places[index]


def is_receiver(span: Span, given: int) -> bool:
    """Whether a method call of a tensor with `given` arguments is written as one, `x.add(y)`; not `torch.add(x, y)`."""
    node = expression(span)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return len(node.args) + len(node.keywords) < given


def is_add(span: Span) -> bool:
    """Whether the text at a span is an add whose operands can be edited."""
    node = expression(span)
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        return isinstance(node.op, (ast.Add, ast.Sub))
    if isinstance(node, ast.Call):
        function = node.func
        names = [function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")]
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Attribute):
            names.append(function.value.attr)  # torch.ops.aten.add.Tensor
        return any(operation(name) in _ADD_CALLS for name in names)
    return False


@sources.cached
def is_carried(at: Operand) -> bool:
    """Whether an operand is a variable that a loop's earlier passes have added to: `out = out + f(x)`."""
    variable = operand(at)
    if not isinstance(variable, ast.Name):
        return False
    try:
        definition = sources.function(at.place)
    except ConversionError:
        return False
    around = (
        []
        if definition is None
        else [
            node
            for node in ast.walk(definition)
            if isinstance(node, ast.stmt) and sources.span_of(at.span.file, node).contains(at.span)
        ]
    )
    loops = [node for node in around if isinstance(node, (ast.For, ast.While))]

    def stores(node: ast.AST) -> int:
        return sum(isinstance(n, ast.Name) and n.id == variable.id and _is_store(n) for n in ast.walk(node))

    return bool(loops) and 0 < stores(around[-1]) == stores(loops[-1])


_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)


@sources.cached
def follow(place: Place, spans: tuple[Span, ...]) -> bool:
    """Whether what is put before the statement of the first span is there for all of them.

    That statement begins its line, and the others are in it or behind it in the same suite.
    """
    definition = sources.function(place)
    fields = [value for node in ast.walk(definition) for _, value in ast.iter_fields(node)] if definition else []
    for suite in fields:
        statements = suite if isinstance(suite, list) else []
        for number, statement in enumerate(statements):
            if isinstance(statement, _SIMPLE) and sources.span_of(place.file, statement).contains(spans[0]):
                rest = [sources.span_of(place.file, other) for other in statements[number:]]
                begins = not sources.lines(place.file)[statement.lineno - 1].encode()[: statement.col_offset].strip()
                return begins and all(any(whole.contains(span) for whole in rest) for span in spans)
    return False


def adds_number(span: Span) -> bool:
    """Whether one side of an add is written as a number, a string or a length."""
    node = expression(span)
    sides = (
        (node.left, node.right)
        if isinstance(node, ast.BinOp)
        else (node.value,)
        if isinstance(node, ast.AugAssign)
        else ()
    )
    return any(_is_number(side) for side in sides)


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.BinOp):  # `h * 2` may be a tensor, `n + 1` is taken for a number
        sides = (_is_number(node.left), _is_number(node.right))
        return all(sides) if isinstance(node.op, (ast.Mult, ast.Div, ast.MatMult)) else any(sides)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("len", "int", "float", "round", "str")
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
    return isinstance(node, (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp))


def target(span: Span) -> str:
    """The name that the statement around a span gives its value; "" if it gives none."""
    return _targets(span.file).get(span.line, "")


def element(file: str, variable: str, key: Any) -> str:
    """The variable of generated code that holds one result of a call of several, `first = both[0]`; "" if none does."""
    return _elements(file).get((variable, key), "")


@sources.cached
def _elements(file: str) -> dict[tuple[str, Any], str]:
    found: dict[tuple[str, Any], str] = {}
    for node in sources.nodes(file):
        match node:
            case ast.Assign([ast.Name(name)], ast.Subscript(ast.Name(variable), ast.Constant(key))):
                found[variable, key] = name
    return found


@sources.cached
def _targets(file: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for node in sources.nodes(file):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            name = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(name, ast.Name):
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    found.setdefault(line, name.id)
    return found


@sources.cached
def text(at: Operand) -> str:
    """An operand as written, on one line."""
    node = operand(at)
    if node is None:
        return ""
    return " ".join(sources.segment(sources.span_of(at.span.file, node)).split())


@sources.cached
def callee(place: Place, span: Span) -> str | None:
    """What a call calls as a path on `self`: `self.mlp.norm(x)` gives "mlp.norm"; None for other callees."""
    node = expression(span)
    if not isinstance(node, ast.Call) or not node.args:
        return None
    names = []
    target = node.func
    while isinstance(target, ast.Attribute):
        names.append(target.attr)
        target = target.value
    own = isinstance(target, ast.Name) and target.id == self_name(place)
    return ".".join(reversed(names)) if own and names else None


@sources.cached
def self_name(place: Place) -> str:
    """What a method calls its module: the name of its first argument."""
    try:
        definition = sources.function(place)
    except ConversionError:
        return ""
    return first_argument(definition) if definition is not None else ""


def first_argument(definition: sources.FunctionNode) -> str:
    args = [*definition.args.posonlyargs, *definition.args.args]
    return args[0].arg if args else ""


@sources.cached
def uses(
    file: str, qualname: str, attribute: str, hidden: frozenset[str] = frozenset()
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Where a class's methods, except `hidden` ones, call `self.<attribute>(...)`, and where they read it otherwise.

    What only construction runs does not count: `__init__` and methods that nothing else calls, and arguments of
    initialisers (`nn.init.constant_(self.norm1.weight, 0)`).

    Returns:
        The spans of the calls and of the other reads.
    """
    definition = sources.class_of(file, qualname) if sources.has_text(file) else None
    if definition is None:
        return (), ()
    calls, reads = [], []
    methods = [node for node in definition.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    construction = _construction(methods)
    for method in methods:
        if method.name in construction or method.name in hidden:
            continue
        called = set()
        me = first_argument(method)
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and _initialises(node) and method.name != "forward":
                called |= {id(part) for argument in node.args for part in ast.walk(argument)}
            if isinstance(node, ast.Call) and is_path(node.func, me, attribute):
                calls.append(sources.span_of(file, node))
                called.add(id(node.func))
        for node in ast.walk(method):
            if id(node) not in called and is_path(node, me, attribute):
                assert isinstance(node, ast.Attribute)
                if isinstance(node.ctx, ast.Load):
                    reads.append(sources.span_of(file, node))
    return tuple(calls), tuple(reads)


def _construction(methods: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> set[str]:
    """The methods that only `__init__` comes to, itself included."""
    callers: dict[str, set[str]] = {}
    for method in methods:
        me = first_argument(method)
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
                callers.setdefault(node.attr, set()).add(method.name)
    found = {"__init__"}
    while more := {m.name for m in methods if m.name not in found and callers.get(m.name, {""}) <= found}:
        found |= more
    return found


def _initialises(call: ast.Call) -> bool:
    """Whether a call is an initialiser by the convention of `torch.nn.init`: a function whose name ends in one "_"."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name.endswith("_") and not name.endswith("__")


def is_path(node: ast.AST, root: str, path: str) -> bool:
    """Whether an expression is `root.<path>`."""
    for name in reversed(path.split(".")):
        if not isinstance(node, ast.Attribute) or node.attr != name:
            return False
        node = node.value
    return isinstance(node, ast.Name) and node.id == root


@sources.cached
def definitions(cls: Any) -> tuple[Definition, ...]:
    """A class and those of its bases that are written outside `torch.nn.Module`."""
    found = []
    above: dict[str, list[Any]] = {}
    for base in cls.__mro__:
        hidden = frozenset(name for name, methods in above.items() if not any(map(_asks_bases, methods)))
        for name, value in vars(base).items():
            if inspect.isfunction(value):
                above.setdefault(name, []).append(value)
        if base.__module__ in ("builtins", "torch.nn.modules.module", "abc", "typing"):
            continue
        functions = [inspect.unwrap(value) for value in vars(base).values() if inspect.isfunction(value)]
        files = [one.__code__.co_filename for one in functions if one.__qualname__.startswith(f"{base.__qualname__}.")]
        if files and sources.has_text(files[0]):
            found.append(Definition(files[0], base.__qualname__, hidden))
        elif files:
            others = [one.__code__.co_names for one in functions if one.__name__ not in ("__init__", "forward")]
            unread = frozenset(name for names in others for name in names)
            found.append(Definition(files[0], base.__qualname__, hidden, unread))
    return tuple(found)


def _asks_bases(method: Any) -> bool:
    """Whether a method may call the one that it overrides: by `super()`, or by the name of a class."""
    compiled = inspect.unwrap(method).__code__
    return "super" in compiled.co_names or "__class__" in compiled.co_freevars or method.__name__ in compiled.co_names


@sources.cached
def assigned(file: str, qualname: str) -> frozenset[str]:
    """The attributes that a class's own code sets on `self`, and the names in its body."""
    definition = sources.class_of(file, qualname)
    if definition is None:
        return frozenset()
    names = {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute) and _is_store(node)}
    names |= {name for node in ast.walk(definition) if isinstance(node, ast.Call) for name in _registered(node)}
    for statement in definition.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _registered(call: ast.Call) -> Iterator[str]:
    """The names that `register_parameter("alpha", ...)` and its like, or `setattr(self, "alpha", ...)`, make."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function == "setattr" or function.startswith("register_") or function == "add_module":
        values = (arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant))
        yield from (value for value in values if isinstance(value, str))


def _is_store(node: ast.Attribute | ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


@sources.cached_by_file
def zeroed(file: str) -> frozenset[str]:
    """What initialisers in a file fill with zeros, as paths on some module.

    "norm.weight" for `m.norm.weight`, "gate.1.bias" for `m.gate[1].bias`, "gate.*.bias" for `m.gate[-1].bias`.
    """
    return frozenset(path for path, zero in filled(file) if zero)


@sources.cached_by_file
def filled(file: str) -> frozenset[tuple[str, bool]]:
    """What initialisers in a file fill, as paths on some module (`zeroed`), each with whether by zeros."""
    found = set()
    for node in sources.nodes(file):
        if isinstance(node, ast.Call) and _initialises(node):
            target: ast.AST | None = node.args[0] if node.args else None
            if not isinstance(_attached(target), ast.Attribute):
                target = node.func.value if isinstance(node.func, ast.Attribute) else None
            names = _segments(target)
            if names:
                found.add((".".join(name for name in names if name != "data"), _fills_zero(node)))
    return frozenset(found)


def _segments(target: ast.AST | None) -> list[str]:
    """The path that an expression reads from a variable, without the variable; empty if it reads none."""
    names: list[str] = []
    while isinstance(target := _attached(target), (ast.Attribute, ast.Subscript)):
        if isinstance(target, ast.Attribute):
            names.append(target.attr)
        else:
            index = target.slice.value if isinstance(target.slice, ast.Constant) else None
            names.append(str(index) if isinstance(index, int) else "*")
        target = target.value
    return names[::-1] if isinstance(target, ast.Name) else []


def _attached(node: ast.AST | None) -> ast.AST | None:
    """What `x.detach()` is of."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        return node.func.value
    return node


def zeroes(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function fills all parameters of its argument with zeros, in a loop over `module.parameters()`."""
    for loop in (node for node in ast.walk(function) if isinstance(node, ast.For)):
        walked = loop.iter.func if isinstance(loop.iter, ast.Call) else None
        if (
            not isinstance(walked, ast.Attribute)
            or walked.attr != "parameters"
            or not isinstance(loop.target, ast.Name)
        ):
            continue
        for call in (node for node in ast.walk(loop) if isinstance(node, ast.Call) and _fills_zero(node)):
            read = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            if loop.target.id in read:
                return True
    return False


def has_no_bias(constructor: str) -> bool:
    """Whether a layer is made without a bias, as written: `nn.Linear(a, b, bias=False)`."""
    try:
        call = ast.parse(constructor, mode="eval").body
    except SyntaxError:
        return False
    if not isinstance(call, ast.Call):
        return False
    last = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [keyword.value for keyword in call.keywords if keyword.arg == "bias"]
    given += call.args[2:3] if last == "Linear" else []
    return any(isinstance(value, ast.Constant) and value.value is False for value in given)


def is_zeroed(file: str, path: str) -> bool:
    """Whether an initialiser in a file fills what has this path on its module with zeros."""
    return any(fnmatchcase(path, pattern) for pattern in zeroed(file))


@sources.cached
def is_zeroed_by(file: str, qualname: str, path: str) -> bool:
    """Whether a class's constructor, whatever its arguments, fills what has this path on `self` with zeros."""
    definition = sources.class_of(file, qualname)
    for method in definition.body if definition is not None else ():
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for statement in method.body:
                call = statement.value if isinstance(statement, ast.Expr) else None
                zero = isinstance(call, ast.Call) and call.args and _initialises(call) and _fills_zero(call)
                if zero and isinstance(call, ast.Call) and is_path(call.args[0], first_argument(method), path):
                    return True
    return False


def _fills_zero(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("zeros_", "zero_"):
        return True
    values = [*call.args[-1:], *(keyword.value for keyword in call.keywords if keyword.arg == "val")]
    return name in ("constant_", "fill_") and any(isinstance(v, ast.Constant) and v.value == 0 for v in values)
