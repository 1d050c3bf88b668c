"""What the classes of a file are made of, and how the file spells its names; read from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from ..zeroing import filled_by, held
from .splice import Edit, Function, Source, after, insert, statements


@dataclass(frozen=True, slots=True)
class Made:
    """A statement that gives an attribute of `self` its value."""

    host: ast.ClassDef
    function: Function
    stmt: ast.stmt
    value: ast.expr


@dataclass(frozen=True, slots=True)
class InitCall:
    """A statement that only sets the values of a parameter: `nn.init.zeros_(m.norm.weight)`, or a loop that does."""

    stmt: ast.stmt
    call: ast.Call
    rest: tuple[str, ...]
    """What follows the attribute: `("weight",)`."""


@dataclass(frozen=True, slots=True)
class Names:
    """How a file spells what new lines need."""

    torch: str
    nn: str
    parameter: str
    missing: Edit | None
    """The import of torch, for a file without one."""


REGISTER = ("add_module", "register_module", "register_parameter", "register_buffer")


def attribute_chain(node: ast.AST) -> tuple[str, ...] | None:
    """`self.mlp.norm` as its parts; None for anything but names and attributes."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else None


def chain_of_elements(node: ast.AST) -> tuple[str, ...] | None:
    """`self.net[-1].weight` as its parts, the index as it is."""
    parts: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Subscript):
            try:
                index = ast.literal_eval(node.slice)
            except ValueError:
                return None
            parts.append(str(index))
        else:
            parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else None


def last_name(node: ast.AST) -> str:
    """The last name of a callee: `Parameter` in `nn.Parameter`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def literal(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def self_name(function: Function) -> str:
    arguments = [*function.args.posonlyargs, *function.args.args]
    return arguments[0].arg if arguments else "self"


def methods_of(cls: ast.ClassDef) -> list[Function]:
    return [stmt for stmt in statements(cls.body) if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef))]


def method_of(cls: ast.ClassDef, name: str) -> Function | None:
    return next((function for function in reversed(methods_of(cls)) if function.name == name), None)


def find_class(source: Source, name: str) -> ast.ClassDef | None:
    return next((cls for cls in reversed(source.classes) if cls.name == name), None)


def bases_of(source: Source, cls: ast.ClassDef) -> list[ast.ClassDef]:
    found = [
        find_class(source, last_name(base.value if isinstance(base, ast.Subscript) else base)) for base in cls.bases
    ]
    return [base for base in found if base is not None and base is not cls]


def lineage(source: Source, cls: ast.ClassDef) -> list[ast.ClassDef]:
    """The class and its bases in this file, nearest first."""
    found = [cls]
    for known in found:
        found += [base for base in bases_of(source, known) if base not in found]
    return found


def descendants(source: Source, cls: ast.ClassDef) -> list[ast.ClassDef]:
    return [other for other in source.classes if other is not cls and cls in lineage(source, other)]


def related(source: Source, cls: ast.ClassDef) -> list[ast.ClassDef]:
    return [*lineage(source, cls), *descendants(source, cls)]


def nested_suites(stmt: ast.stmt) -> list[list[ast.stmt]]:
    parts = [getattr(stmt, name, None) or [] for name in ("body", "orelse", "finalbody")]
    return parts + [part.body for part in (*getattr(stmt, "handlers", ()), *getattr(stmt, "cases", ()))]


def assigned_values(stmt: ast.stmt, me: str, attribute: str) -> list[ast.expr]:
    """What a statement gives to `self.<attribute>`."""
    wanted = (me, attribute)
    if isinstance(stmt, ast.Assign):
        found: list[ast.expr] = []
        for target in stmt.targets:
            if attribute_chain(target) == wanted:
                found.append(stmt.value)
            elif isinstance(target, (ast.Tuple, ast.List)):
                values = stmt.value.elts if isinstance(stmt.value, (ast.Tuple, ast.List)) else []
                for index, part in enumerate(target.elts):
                    if attribute_chain(part) == wanted:
                        found.append(values[index] if len(values) == len(target.elts) else stmt.value)
        return found
    if isinstance(stmt, ast.AnnAssign) and stmt.value is not None and attribute_chain(stmt.target) == wanted:
        return [stmt.value]
    if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
        arguments = stmt.value.args
        if attribute_chain(stmt.value.func) in [(me, name) for name in REGISTER] and len(arguments) >= 2:
            return arguments[1:2] if literal(arguments[0]) == attribute else []
        if (
            attribute_chain(stmt.value.func) == ("setattr",)
            and len(arguments) == 3
            and attribute_chain(arguments[0]) == (me,)
        ):
            return arguments[2:] if literal(arguments[1]) == attribute else []
    return []


def makers(source: Source, cls: ast.ClassDef, attribute: str) -> list[Made]:
    """The statements that make an attribute, in the nearest class of the lineage with any; `= None` makes nothing."""
    for host in lineage(source, cls):
        found = [
            Made(host, function, stmt, value)
            for function in methods_of(host)
            for stmt in statements(function.body)
            for value in assigned_values(stmt, self_name(function), attribute)
            if not (isinstance(value, ast.Constant) and value.value is None)
        ]
        if found:
            return found
    return []


def constructor_calls(value: ast.expr) -> list[ast.Call]:
    """The constructor calls a value may come from: both arms of a condition."""
    if isinstance(value, ast.IfExp):
        return constructor_calls(value.body) + constructor_calls(value.orelse)
    if isinstance(value, ast.BoolOp):
        return [call for part in value.values for call in constructor_calls(part)]
    return [value] if isinstance(value, ast.Call) else []


def resolve(source: Source, cls: ast.ClassDef, parts: list[str]) -> list[tuple[ast.ClassDef, ast.expr, Made | None]]:
    """The expressions that make the module at a path below a class, each with the class whose text holds it.

    The last item is the statement, if the expression is the value of an attribute and not an element of a container.
    """
    found: list[tuple[ast.ClassDef, ast.expr, Made | None]] = []
    for made in makers(source, cls, parts[0]):
        found += _descend(source, made.host, made.value, parts[1:], made)
    return found


def _descend(
    source: Source, host: ast.ClassDef, value: ast.expr, parts: list[str], made: Made | None
) -> list[tuple[ast.ClassDef, ast.expr, Made | None]]:
    if not parts:
        return [(host, value, made)]
    found: list[tuple[ast.ClassDef, ast.expr, Made | None]] = []
    for call in constructor_calls(value):
        inner = find_class(source, last_name(call.func))
        if inner is not None and not parts[0].isdigit():
            found += resolve(source, inner, parts)
            continue
        element = _element(source, call, parts[0], made.function if made is not None else None)
        for one in _elements(call, made) if parts[0] == "*" else [element]:
            if one is not None:
                found += _descend(source, host, one, parts[1:], None)
    return found


def _elements(call: ast.Call, made: Made | None) -> list[ast.expr]:
    """What makes all elements of a list of modules, by a display, a comprehension or `append`; [] if that is open."""
    found: list[ast.expr] = []
    for given in call.args:
        parts = given.elts if isinstance(given, (ast.List, ast.Tuple)) else [given]
        found += [part.elt if isinstance(part, (ast.ListComp, ast.GeneratorExp)) else part for part in parts]
    targets = made.stmt.targets if made is not None and isinstance(made.stmt, ast.Assign) else []
    for node in ast.walk(made.function) if made is not None else ():
        called = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if called is not None and attribute_chain(called.value) in [attribute_chain(target) for target in targets]:
            found += node.args if isinstance(node, ast.Call) and called.attr == "append" else [called]
    clear = all(isinstance(part, ast.Call) and constructor_calls(part) for part in found)
    return found if clear else []


def _element(source: Source, call: ast.Call, key: str, function: Function | None) -> ast.expr | None:
    """The element of a literal `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict`."""
    elements: list[ast.expr] = list(call.args)
    if len(elements) == 1 and isinstance(elements[0], ast.Call) and last_name(elements[0].func) == "OrderedDict":
        elements = elements[0].args
    if len(elements) == 1 and isinstance(elements[0], ast.Dict):
        pairs = zip(elements[0].keys, elements[0].values, strict=True)
        return next((value for name, value in pairs if name is not None and literal(name) == key), None)
    if len(elements) == 1 and isinstance(elements[0], ast.Starred):
        inside = elements[0].value
        if isinstance(inside, ast.Name) and function is not None:
            elements = _built_list(function, inside.id) or []
        else:
            elements = [inside] if isinstance(inside, (ast.List, ast.Tuple)) else []
    if len(elements) == 1 and isinstance(elements[0], (ast.List, ast.Tuple)):
        elements = elements[0].elts
    elif last_name(call.func) == "ModuleList":
        elements = []  # a list of modules from elsewhere
    if elements and all(isinstance(e, ast.Tuple) and len(e.elts) == 2 and literal(e.elts[0]) for e in elements):
        pairs_of = [e.elts for e in elements if isinstance(e, ast.Tuple)]
        named = next((value for name, value in pairs_of if literal(name) == key), None)
        return named if named is not None or not key.isdigit() else None
    if any(isinstance(e, ast.Starred) for e in elements) or not key.isdigit() or int(key) >= len(elements):
        return None
    return elements[int(key)]


def _built_list(function: Function, name: str) -> list[ast.expr] | None:
    """The elements of a local list that is built without conditions or loops."""
    found: list[ast.expr] | None = None
    for stmt in function.body:
        if isinstance(stmt, ast.Assign) and [attribute_chain(t) for t in stmt.targets] == [(name,)]:
            found = list(stmt.value.elts) if isinstance(stmt.value, ast.List) else None
        elif isinstance(stmt, ast.AugAssign) and attribute_chain(stmt.target) == (name,):
            found = None if found is None or not isinstance(stmt.value, ast.List) else found + stmt.value.elts
        elif isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
            call = stmt.value
            if attribute_chain(call.func) == (name, "append") and found is not None:
                found = found + call.args[:1]
            elif attribute_chain(call.func) == (name, "extend") and found is not None:
                found = found + call.args[0].elts if isinstance(call.args[0], ast.List) else None
        elif any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(stmt)) and _is_compound(stmt):
            found = None
    return found if found is None or not any(isinstance(e, ast.Starred) for e in found) else None


def _is_compound(stmt: ast.stmt) -> bool:
    """Whether a statement is compound."""
    return bool(nested_suites(stmt)[0])


def init_calls(source: Source, family: list[ast.ClassDef], attribute: str) -> list[InitCall]:
    """Statements that only set an attribute's parameters.

    Seen on `self`, on a name tested to be of one of the classes, on one that runs over modules made of them, on a local
    variable that a method puts into the attribute.
    """
    names = {cls.name for cls in family}
    found: list[InitCall] = []

    def visit(body: list[ast.stmt], known: frozenset[str]) -> None:
        for stmt in body:
            call = _only_call(stmt)
            if call is not None:
                for target in _set_in(stmt, call):
                    if len(target) >= 2 and target[0] in known and target[1] == attribute:
                        found.append(InitCall(stmt, call, target[2:]))
            if isinstance(stmt, ast.ClassDef):
                visit(stmt.body, frozenset())
                for function in methods_of(stmt) if stmt in family else ():
                    visit(function.body, frozenset({self_name(function)}))
                    variables = {name: path for name, path in held(function).items() if path[0] == attribute}
                    found.extend(_of_variables(function, variables) if variables else ())
            elif isinstance(stmt, ast.If):
                visit(stmt.body, known | _tested(stmt.test, names))
                visit(stmt.orelse, known)
            else:
                loop = _runs_over(source, stmt, names) if isinstance(stmt, ast.For) else set()
                for suite in nested_suites(stmt):
                    visit(suite, known | loop)

    visit(source.tree.body, frozenset())
    return list({id(call.stmt): call for call in found}.values())


def _only_call(stmt: ast.stmt) -> ast.Call | None:
    """The call that a statement is, or that a loop makes and nothing else."""
    if isinstance(stmt, ast.For) and len(stmt.body) == 1 and not stmt.orelse:
        (stmt,) = stmt.body
    return stmt.value if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call) else None


def _set_in(stmt: ast.stmt, call: ast.Call) -> list[tuple[str, ...]]:
    """What a statement sets that is no more than a call; of a loop that fills all parameters of a layer, the weight."""
    if not isinstance(stmt, ast.For):
        target = set_by(call)
        return [target] if target is not None else []
    filled = [(*chain, *below) for whole, below in filled_by(stmt) if (chain := chain_of_elements(whole))]
    one = len({target[:-1] for target in filled}) == 1
    return sorted(filled, key=lambda target: target[-1] != "weight")[:1] if one else []


def _of_variables(function: Function, places: dict[str, tuple[str, ...]]) -> Iterator[InitCall]:
    """The statements that set parameters of local variables, as those of what `places` says they are on `self`."""
    for stmt in statements(function.body):
        call = _only_call(stmt)
        for variable, *rest in _set_in(stmt, call) if call is not None else ():
            if variable in places and rest:
                assert call is not None
                yield InitCall(stmt, call, (*places[variable][1:], *rest))


def _runs_over(source: Source, loop: ast.For, names: set[str]) -> set[str]:
    """The variable of a loop over an attribute that is made of the classes: `for block in self.blocks`."""
    chain = attribute_chain(loop.iter)
    if not isinstance(loop.target, ast.Name) or chain is None or len(chain) != 2:
        return set()
    owners = [cls for cls in source.classes if cls.lineno <= loop.lineno <= (cls.end_lineno or 0)]
    values = [made.value for cls in owners[-1:] for made in makers(source, cls, chain[1])]
    calls = [n for value in values for n in ast.walk(value) if isinstance(n, ast.Call)]
    return {loop.target.id} if any(last_name(call.func) in names for call in calls) else set()


def _tested(test: ast.expr, names: set[str]) -> set[str]:
    """The names that a condition finds to be of one of the classes."""
    found = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Call) and last_name(node.func) == "isinstance" and len(node.args) == 2:
            classes = node.args[1].elts if isinstance(node.args[1], ast.Tuple) else [node.args[1]]
            if isinstance(node.args[0], ast.Name) and any(last_name(c) in names for c in classes):
                found.add(node.args[0].id)
    return found


def set_by(call: ast.Call) -> tuple[str, ...] | None:
    """What an initializing call fills: the argument of `nn.init.zeros_(x)`, the receiver of `x.data.fill_(0)`."""
    if not last_name(call.func).endswith("_") or last_name(call.func).endswith("__"):
        return None
    filled = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(filled, ast.Call) and last_name(filled.func) == "detach" and isinstance(filled.func, ast.Attribute):
        filled = filled.func.value
    receiver = chain_of_elements(filled) if filled is not None else None
    if receiver is not None and receiver[-1] in ("data", "weight", "bias"):
        return tuple(part for part in receiver if part != "data")
    target = chain_of_elements(call.args[0]) if call.args else None
    if target is not None and len(target) > 1:
        return tuple(part for part in target if part != "data")
    return receiver


def spelling(source: Source) -> Names:
    """How the file names torch, torch.nn and Parameter at module level."""
    bound: dict[str, str] = {}
    imports: list[ast.stmt] = []
    for stmt in statements(source.tree.body):
        if isinstance(stmt, ast.Import):
            imports.append(stmt)
            for alias in stmt.names:
                if alias.asname:
                    bound.setdefault(alias.name, alias.asname)
                elif alias.name.partition(".")[0] == "torch":
                    bound.setdefault("torch", "torch")
        elif isinstance(stmt, ast.ImportFrom) and not stmt.level:
            imports.append(stmt)
            for alias in stmt.names:
                bound.setdefault(f"{stmt.module}.{alias.name}", alias.asname or alias.name)
    torch = bound.get("torch")
    nn = bound.get("torch.nn")
    parameter = bound.get("torch.nn.Parameter") or bound.get("torch.nn.parameter.Parameter")
    missing = _missing_import(source) if torch is None else None
    torch = torch or "torch"
    spelled = f"{nn or torch + '.nn'}.Parameter"
    return Names(torch, nn or f"{torch}.nn", parameter if parameter and nn is None else spelled, missing)


def _missing_import(source: Source) -> Edit:
    body = source.tree.body
    imports = [
        s for s in body if isinstance(s, (ast.Import, ast.ImportFrom)) and getattr(s, "module", "") != "__future__"
    ]
    modules = {id(s): s.module or "" if isinstance(s, ast.ImportFrom) else s.names[0].name for s in imports}
    first = next((s for s in imports if modules[id(s)].partition(".")[0] == "torch"), None)
    if first is not None or imports:
        line = (first or imports[-1]).lineno if first is not None else (imports[-1].end_lineno or 0) + 1
        return Edit(source.line_start(line), source.line_start(line), "import torch\n")
    head = [s for s in body if isinstance(s, ast.ImportFrom) or (isinstance(s, ast.Expr) and s is body[0])]
    line = (head[-1].end_lineno or 0) + 1 if head else body[0].lineno
    return Edit(source.line_start(line), source.line_start(line), "\nimport torch\n" if head else "import torch\n\n")


def indent_unit(source: Source, cls: ast.ClassDef) -> str:
    """One level of indentation, as this file has it."""
    for stmt in source.nodes:
        if isinstance(stmt, (ast.FunctionDef, ast.ClassDef)) and stmt.body[0].lineno > stmt.lineno:
            outer, inner = source.indent(stmt.lineno), source.indent(stmt.body[0].lineno)
            if inner.startswith(outer) and inner != outer:
                return inner[len(outer) :]
    return "    "


def new_method(
    source: Source, cls: ast.ClassDef, head: list[str], base_call: str, lines: list[str], last: bool = False
) -> Edit:
    """A method for a class that lacks it: before the first one, or at the end of the class."""
    unit = indent_unit(source, cls)
    first = cls.body[0]
    if first.lineno == cls.lineno or (
        len(cls.body) == 1 and isinstance(first, ast.Expr) and literal(first.value) is Ellipsis
    ):
        indent = source.indent(cls.lineno) + unit
        start, end = source.span(first)[0], source.span(cls.body[-1])[1]
        gap = len(source.text[:start]) - len(source.text[:start].rstrip())
        text = "\n".join([*(indent + h for h in head), *(indent + unit + line for line in (base_call, *lines))])
        return Edit(start - gap, end, "\n" + text)
    indent = source.indent(first.lineno)
    new = [*head, *(unit + line for line in (base_call, *lines))]
    methods = [stmt for stmt in cls.body if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    if last or not methods:
        place = after(source, cls.body[-1], cls.body)
        return insert(source, place, indent, ["", *new])
    line = min([methods[0].lineno, *(d.lineno for d in methods[0].decorator_list)])
    while source.is_comment(line - 1) and source.indent(line - 1) == indent:
        line -= 1
    return insert(source, Edit(source.line_start(line), source.line_start(line), ""), indent, [*new, ""])


def is_folded(source: Source, function: Function) -> bool:
    """Whether a body begins on the line of its signature: `def __init__(self): super().__init__()`."""
    first = function.body[0].lineno
    return bool(source.text[source.line_start(first) : source.span(function.body[0])[0]].strip())


def unfolded(source: Source, cls: ast.ClassDef, init: Function, lines: list[str]) -> Edit:
    """`def __init__(self): super().__init__()` over several lines."""
    start, end = source.span(init.body[0])[0], source.span(init.body[-1])[1]
    indent = source.indent(init.lineno) + indent_unit(source, cls)
    head = source.text[start:end]
    gap = len(source.text[:start]) - len(source.text[:start].rstrip(" \t"))
    return Edit(start - gap, end, "".join(f"\n{indent}{line}" for line in (head, *lines)))
