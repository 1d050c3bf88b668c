"""Static capture: graphs from the text of a file. Nothing of the file is imported or executed.

Every `nn.Module` class of the file gives one trace for each forward-like method. Submodules whose classes can be read
(in the file or in installed packages) are entered to a fixed depth, the others are opaque.

`ast` instead of libcst, which only the rewriter needs: ten times faster, and its positions are those of the
interpreter, so that spans agree with the recorded capture.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator

from torch import fx

from .. import sources
from ..errors import ConversionError
from ..plan import Place, Span
from ..sources import FunctionNode
from . import static_calls, static_expressions, static_statements
from .facts import Facts
from .static_core import evaluate, execute
from .static_modules import attributes, class_facts
from .static_names import ClassRef, FunctionRef, Known, Method, dotted, index, is_module, lineage, members, method
from .static_values import (
    UNKNOWN,
    Instance,
    Module,
    Scope,
    State,
    Table,
    Value,
    choice,
    emit,
    join_all,
    nodes_of,
    opaque,
    rearrange,
)
from .trace import Call, Trace, origin

__all__ = ["adds", "choice", "classes", "exclusive", "loose", "opaque", "rearrange", "traces"]

_HANDLERS = (static_calls, static_expressions, static_statements)
"""Importing them makes the interpreter's generic functions know their kinds of nodes and values."""

_PLAIN_TYPES = frozenset(
    "int float bool str bytes dict Callable Module ModuleList Sequential device dtype Size".split()
)
_ADDING_METHODS = frozenset("add add_ sub sub_ subtract subtract_".split())
_ADDING_FUNCTIONS = frozenset("add iadd sub isub subtract addcmul lerp".split())


def classes(file: str) -> tuple[str, ...]:
    """Qualified names of the `nn.Module` classes in a file, in order, also those within functions and classes.

    Raises:
        ConversionError: the file cannot be read, has a syntax error, or is nested too deeply.
    """
    try:
        sources.tree(file)
    except RecursionError as error:
        raise ConversionError(f"{file}: an expression is nested too deeply to be parsed") from error
    found = index(file)
    if found is None:
        return ()
    return tuple(name for name, node in found.classes.items() if is_module(ClassRef(file, name, node)))


def traces(file: str, only: frozenset[str] | None = None) -> tuple[Trace, ...]:
    """One trace per class and forward-like method: `forward`, and methods that the class itself never uses.

    Args:
        file: a file that `sources` knows.
        only: qualified names of the classes to analyse; all if None.

    Raises:
        ConversionError: the file cannot be read, has a syntax error, or is nested too deeply.
    """
    found = index(file)
    return tuple(
        trace
        for name in classes(file)
        if found is not None and (only is None or name in only)
        for trace in _class_traces(ClassRef(file, name, found.classes[name]))
    )


def loose(file: str, seen: Iterable[Trace]) -> Iterator[Trace]:
    """Traces of the functions with adds, methods of modules aside, that no method of a module is seen to call.

    Args:
        file: a file that `sources` knows.
        seen: the traces of its classes.
    """
    reached = {span for trace in seen for span in _reached(trace, file)}
    functions = [node for node in sources.nodes(file) if isinstance(node, FunctionNode)]
    spans = {node: sources.span_of(file, node.body if isinstance(node, ast.Lambda) else node) for node in functions}
    own = adds(file, sources.tree(file))
    for node in functions:
        added = any(spans[node].contains(span) for span in own)
        if not added or _is_of_module(file, node) or any(spans[node].contains(span) for span in reached):
            continue
        outer = next((one for one in functions if spans[one].contains(spans[node])), node)
        trace = _loose_trace(file, node, outer)
        reached.update(_reached(trace, file))
        yield trace


def _reached(trace: Trace, file: str) -> Iterator[Span]:
    for node in trace.graph.nodes:
        if node.op != "output":
            yield from (frame.span for frame in origin(node).frames if frame.span.file == file)


def _is_of_module(file: str, node: FunctionNode) -> bool:
    """Whether a function is a method of a module, or makes an object: one that is not seen adds sizes for that."""
    if getattr(node, "name", "") == "__init__":
        return True
    found = index(file)
    held = (
        [ClassRef(file, *item) for item in found.classes.items() if node in item[1].body] if found is not None else []
    )
    return any(is_module(cls) for cls in held)


def _loose_trace(file: str, node: FunctionNode, outer: FunctionNode) -> Trace:
    graph = fx.Graph()
    state = State(graph)
    qualname = _qualname(file, outer)
    root = Call("", qualname.rpartition(".")[0], Facts(), None)
    state.calls.append(root)
    first = min([outer.lineno, *(decorator.lineno for decorator in getattr(outer, "decorator_list", ()))])
    place = Place("", qualname, file, first)
    scope = Scope(state, file, {}, place, None, None, root, active=((node, ""),))
    if isinstance(node, ast.Lambda):
        _placeholders(node.args, scope)
        evaluate(node.body, scope)
    else:
        _placeholders(node.args, scope)
        execute(node.body, scope)
    graph.output(())
    return Trace(graph, root, tuple(state.calls), "static", None, tuple(state.notes), state.scalars)


def _qualname(file: str, node: FunctionNode) -> str:
    name = getattr(node, "name", "<lambda>")
    found = index(file)
    for qualname, cls in found.classes.items() if found is not None else ():
        if node in cls.body:
            return f"{qualname}.{name}"
    return name


@sources.cached
def adds(file: str, where: Place | ast.AST) -> tuple[Span, ...]:
    """Every addition and subtraction in the text of a function, nested functions included, in source order."""
    node = sources.function(where) if isinstance(where, Place) else where
    if node is None:
        return ()
    spans = [
        sources.span_of(file, part)
        for part in (sources.walked(node) if isinstance(node, ast.Module) else ast.walk(node))
        if isinstance(part, (ast.BinOp, ast.AugAssign, ast.Call)) and _adds(part, file)
    ]
    return tuple(sorted(spans))


def exclusive(a: Span, b: Span) -> bool:
    """Whether no single pass through a function reaches both spans.

    They lie in different arms of a condition, in methods that are called in such arms, or one in an arm that leaves the
    function (or the loop pass) before the other.
    """
    if a.file != b.file:
        return False
    above_a, above_b = _above(a), _above(b)
    for position, (left, right) in enumerate(zip(above_a, above_b, strict=False)):
        if left is right:
            continue
        parent = above_a[position - 1]
        if _parted(parent, left, right):
            return True
        if isinstance(parent, ast.ClassDef):
            return _called_apart(a.file, parent, left, right)
        first, second = (above_a, above_b) if a < b else (above_b, above_a)
        return _left_before(first[position:], second[position])
    return False


def _class_traces(cls: ClassRef) -> Iterator[Trace]:
    own = members(cls)
    for name in ("forward", *(name for name in own if name != "forward")):
        found = method(cls, name)
        if not isinstance(found, Method):
            continue
        if name == "forward":
            if found.cls != cls and found.cls.file != cls.file:
                continue  # another file's text
        elif not _is_entry(cls, found):
            continue
        trace = _trace(cls, found)
        if name == "forward" or any(node.op == "call_module" for node in trace.graph.nodes) or len(trace.calls) > 1:
            yield trace


def _is_entry(cls: ClassRef, found: Method) -> bool:
    """Whether a method other than `forward` may be called from outside with tensors."""
    name = found.node.name
    if found.cls != cls or (name.startswith("__") and name.endswith("__")):
        return False
    if {"staticmethod", "classmethod", "property", "cached_property"} & set(found.decorators):
        return False
    if len(found.node.args.posonlyargs) + len(found.node.args.args) < 2:
        return False
    return not any(name in _used(ref) for ref in lineage(cls) if isinstance(ref, ClassRef))


@sources.cached
def _used(cls: ClassRef) -> frozenset[str]:
    """Attributes of `self` that the class's text mentions."""
    return frozenset(
        node.attr
        for node in ast.walk(cls.node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    )


def _trace(cls: ClassRef, found: Method) -> Trace:
    graph = fx.Graph()
    state = State(graph)
    module = Module("class", class_facts(cls), cls=cls)
    instance = Instance("", module)
    root = Call("", cls.qualname, module.facts, None)
    state.calls.append(root)
    line = min([found.node.lineno, *(decorator.lineno for decorator in found.node.decorator_list)])
    place = Place("", f"{found.cls.qualname}.{found.node.name}", found.cls.file, line)
    scope = Scope(state, found.cls.file, {}, place, instance, found.cls, root, active=((found.node, ""),))
    try:
        attributes(module)
        _placeholders(found.node.args, scope)
        execute(found.node.body, scope)
        result = join_all(scope.returns, scope, found.node.body[-1]) if scope.returns else UNKNOWN
        root.outputs = list(nodes_of(result))
    except RecursionError:
        state.notes[f"{place.qualname}: nested too deeply, analysed in part"] = None
    graph.output(tuple(root.outputs))
    return Trace(graph, root, tuple(state.calls), "static", None, tuple(state.notes), state.scalars)


def _placeholders(signature: ast.arguments, scope: Scope) -> None:
    """Bind the arguments of an analysed function: tensors, but for those that are plainly something else."""
    positional = [*signature.posonlyargs, *signature.args]
    defaults: dict[str, ast.expr] = {
        arg.arg: value for arg, value in zip(reversed(positional), reversed(signature.defaults), strict=False)
    }
    for arg, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True):
        if default is not None:
            defaults[arg.arg] = default
    assert scope.call is not None
    if scope.instance is not None:
        scope.env[positional[0].arg if positional else "self"] = scope.instance
        positional = positional[1:]
    for arg in (*positional, *signature.kwonlyargs, *([signature.vararg] if signature.vararg else [])):
        if is_plain(arg, defaults.get(arg.arg)):
            scope.env[arg.arg] = UNKNOWN
            continue
        at = ast.copy_location(ast.Name(arg.arg, ast.Load()), arg)
        node = emit(scope, "placeholder", arg.arg, (), {}, Facts("input", "input"), at)
        default = defaults.get(arg.arg)
        node.meta["left out"] = isinstance(default, ast.Constant) and default.value is None
        scope.env[arg.arg] = node
        scope.call.inputs.append(node)
    if signature.kwarg is not None:
        unknown: dict[object, Value] = {"*": UNKNOWN}
        scope.env[signature.kwarg.arg] = Table(unknown)


def is_plain(arg: ast.arg, default: ast.expr | None) -> bool:
    """Whether an argument is a number, a flag, a string, a function by its annotation or default."""
    if isinstance(default, ast.Constant) and default.value is not None:
        return True
    if arg.annotation is None:
        return False
    names = {part.id for part in ast.walk(arg.annotation) if isinstance(part, ast.Name)}
    names |= {part.attr for part in ast.walk(arg.annotation) if isinstance(part, ast.Attribute)}
    if isinstance(arg.annotation, ast.Constant) and isinstance(arg.annotation.value, str):
        return False
    return bool(names & _PLAIN_TYPES) and not any("Tensor" in name for name in names)


def _adds(node: ast.BinOp | ast.AugAssign | ast.Call, file: str) -> bool:
    if not isinstance(node, ast.Call):
        return isinstance(node.op, (ast.Add, ast.Sub))
    func = node.func
    ref = dotted(file, func) if isinstance(func, (ast.Name, ast.Attribute)) else None
    if isinstance(ref, Known):
        return getattr(ref.obj, "__name__", "") in _ADDING_FUNCTIONS
    if isinstance(ref, (ClassRef, FunctionRef)):
        return False
    return isinstance(func, ast.Attribute) and func.attr in _ADDING_METHODS and bool(node.args or node.keywords)


def _above(span: Span) -> list[ast.AST]:
    """The nodes that contain a span, outermost first, and the node at it."""
    chain: list[ast.AST] = [sources.tree(span.file)]
    while True:
        inner = [child for child in _children(chain[-1]) if _covers(child, span)]
        if not inner:
            return chain
        chain.append(inner[0])


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Statements, expressions and what holds them (handlers, cases, keywords), which have positions or children."""
    for part in ast.iter_child_nodes(node):
        if hasattr(part, "lineno"):
            yield part
        else:
            yield from _children(part) if not isinstance(part, ast.match_case) else (part,)


def _covers(node: ast.AST, span: Span) -> bool:
    if isinstance(node, ast.match_case):
        return any(_covers(statement, span) for statement in node.body)
    start = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
    end = (getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0))
    return start <= (span.line, span.col) and (span.end_line, span.end_col) <= end


def _parted(parent: ast.AST, left: ast.AST, right: ast.AST) -> bool:
    """Whether two children of one node exclude each other."""
    if isinstance(parent, ast.IfExp):
        return {left, right} == {parent.body, parent.orelse}
    if isinstance(parent, ast.Match):
        return isinstance(left, ast.match_case) and isinstance(right, ast.match_case)
    if isinstance(parent, ast.Try) and isinstance(left, ast.ExceptHandler) and isinstance(right, ast.ExceptHandler):
        return True
    if isinstance(parent, ast.If):
        for one, other in ((left, right), (right, left)):
            if one in parent.body and other in parent.orelse:
                return True
    return False


def _called_apart(file: str, cls: ast.ClassDef, left: ast.AST, right: ast.AST) -> bool:
    """Whether some method calls two of its class in arms that exclude each other, and no other one calls them."""
    calls: dict[str, list[tuple[ast.AST, Span]]] = {}
    for definition in cls.body:
        for node in ast.walk(definition):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                calls.setdefault(node.func.attr, []).append((definition, sources.span_of(file, node)))
    one, other = (calls.get(getattr(method, "name", ""), []) for method in (left, right))
    same = len({method for method, _ in (*one, *other)}) == 1
    return same and bool(one) and bool(other) and all(exclusive(a, b) for _, a in one for _, b in other)


def _leaves(body: list[ast.stmt]) -> bool:
    """Whether control never gets past these statements."""
    for statement in body:
        if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            return True
        if isinstance(statement, ast.If) and statement.orelse and _leaves(statement.body) and _leaves(statement.orelse):
            return True
        if isinstance(statement, ast.With) and _leaves(statement.body):
            return True
    return False


def _left_before(chain: list[ast.AST], later: ast.AST) -> bool:
    """Whether an arm on the way down `chain` leaves before control could come to `later`, which follows `chain[0]`."""
    if not isinstance(later, ast.stmt):
        return False
    for outer, inner in itertools.pairwise(chain):
        if isinstance(outer, (ast.For, ast.AsyncFor, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return False  # what leaves a loop or a nested function goes on after it
        if isinstance(outer, ast.If):
            for arm in (outer.body, outer.orelse):
                if inner in arm and _leaves(arm):
                    return True
    return False
