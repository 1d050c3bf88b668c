"""Carry a Plan out on a live model: recompile methods, execute nothing of their files.

An instance keeps its class, as a subclass with the edited methods: the text of the method is edited, compiled under a
file name of its own, and made a function on the original globals, defaults and closure cells.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import functools
import hashlib
import itertools
import math
import opcode
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import sources
from ..capture import facts
from ..errors import ConversionError
from ..known import FAST_PATHS
from ..plan import Gate, Norm, Place, Plan, Repair, Site
from . import text

_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rewrite(model: nn.Module, plan: Plan) -> ExitStack:
    """Carry out `plan` on `model`, in place.

    The converted instances get a subclass of their class with the edited methods, their alphas (`rezero_gates` names
    them), and lose their norms; `model.rezero_plan` is the plan. All or nothing: after an error the model is as it was.

    Returns:
        What undoes it: `close()` puts the model back as it was.

    Raises:
        ConversionError: a method's text cannot be had, is not what was imported, or cannot be edited; or the model is
            not the one that was planned for.
    """
    classes = _classes(model, plan)
    with ExitStack() as undo:
        for instance, cls in classes:
            _set_class(undo, instance, cls)
        for owner, path, gate in _gates(model, plan):
            _place_gate(undo, model, owner, path, gate, plan.options.preserve)
        _drop_norms(undo, model, plan)
        for repair in dict.fromkeys(repair for site in _edited_sites(plan) for repair in site.repairs):
            _repair(undo, model, repair)
        _set(undo, model.__dict__, "rezero_plan", plan)
        return undo.pop_all()


def alphas(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The gates of a converted model with their names from the root; each parameter once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name in module.__dict__.get("rezero_gates", ()):
            parameter = functools.reduce(getattr, name.split("."), module)
            assert isinstance(parameter, nn.Parameter)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


def record(model: nn.Module) -> Plan | None:
    """The plan that was carried out on `model`, if any."""
    plan = model.__dict__.get("rezero_plan")
    return plan if isinstance(plan, Plan) else None


def rezero_gate(alpha: Tensor, branch: Tensor) -> Tensor:
    """`alpha * branch` in the branch's dtype; a half-precision branch is scaled in single precision.

    So the residual stream keeps its dtype, whatever alpha's is, and alpha's gradient does not overflow.
    """
    if branch.dtype == torch.float16 or branch.dtype == torch.bfloat16:
        return (alpha.float() * branch).to(branch.dtype)
    return (alpha * branch).to(branch.dtype)


# --- subclasses ---


@dataclass(frozen=True, slots=True)
class EditedMethod:
    """One method's new text; enough to make the function again in another process."""

    definer: int
    """Position of the defining class in the method resolution order."""
    attributes: tuple[str, ...]
    """The names under which that class holds the function."""
    qualname: str
    line: int
    """The function's first line."""
    file: str
    text: str
    """All lines of `file`; those before the function are empty but for the class header."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a converted class."""

    base: Any
    """The class, or the recipe of a class that is itself converted."""
    methods: tuple[EditedMethod, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        return self

    def original(self) -> type[nn.Module]:
        """The class as the user wrote it."""
        base: type[nn.Module] | Recipe = self.base
        return base.original() if isinstance(base, Recipe) else base


def revive(
    recipe: Recipe, make: Callable[..., nn.Module], args: tuple[Any, ...], gates: dict[str, nn.Parameter]
) -> nn.Module:
    """Make a converted instance again, from a pickle or for a copy; its state is set afterwards."""
    module = make(*args)
    object.__setattr__(module, "__class__", converted_class(recipe))
    if gates:  # made by a constructor, which knows nothing of them
        module._parameters.update(gates)
        module.__dict__["rezero_gates"] = tuple(gates)
    return module


@functools.cache
def converted_class(recipe: Recipe) -> type[Any]:
    """The subclass that `recipe` describes; always the same object.

    Raises:
        ConversionError: the class no longer has the methods that were edited.
    """
    base = recipe.base if not isinstance(recipe.base, Recipe) else converted_class(recipe.base)
    original = recipe.original()
    by_class: dict[int, dict[str, Any]] = {}
    for method in recipe.methods:
        members = by_class.setdefault(method.definer, {})
        definer = base.__mro__[method.definer]
        sources.register(method.file, method.text)
        for attribute in method.attributes:
            value = members.get(attribute, definer.__dict__.get(attribute))
            old = next((code for code in _codes(value) if _is(code, method.qualname, method.line)), None)
            if old is None:
                raise ConversionError(
                    f"{definer.__module__}.{method.qualname}: the class has changed since the model was converted"
                )
            members[attribute] = _rebuilt(value, old, _compiled(method.text, method.file, old), {})
    # an edited method that a base class defines stays below the classes that override it
    bases = [_subclass(base.__mro__[index], (), members) for index, members in sorted(by_class.items()) if index]
    namespace = {**by_class.get(0, {}), "rezero_recipe": recipe, "rezero_gate": staticmethod(rezero_gate)}
    namespace["__init__"] = _init(base, original, recipe)
    namespace["__reduce_ex__"] = _reduce_ex(original, recipe)
    return _subclass(base, tuple(bases), namespace)


class _Quiet:
    """Keeps a class's `__init_subclass__` (registries, checks) from hearing of converted classes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _subclass(base: type, others: tuple[type, ...], namespace: dict[str, Any]) -> type[Any]:
    """A class that passes for `base`."""
    hears = any("__init_subclass__" in cls.__dict__ for cls in base.__mro__[:-1])
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, ((_Quiet,) if hears else ()) + (base, *others), {**names, **namespace})


def _init(base: Any, original: type, recipe: Recipe) -> Callable[..., None]:
    """A constructor that gives an instance of the original class: `type(model)(config)` is an unconverted model."""
    construct = base.__init__

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if type(self).__dict__.get("rezero_recipe") is recipe:
            object.__setattr__(self, "__class__", original)

    return __init__


def _reduce_ex(original: type, recipe: Recipe) -> Callable[..., Any]:
    """Pickling by recipe: the subclass itself cannot be found by its name."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        cls = type(self)
        if cls.__dict__.get("rezero_recipe") is not recipe:  # somebody's subclass of the converted class
            return super(converted_class(recipe), self).__reduce_ex__(protocol)
        reduced: Any = super(cls, self).__reduce_ex__(max(2, int(protocol)))
        if not isinstance(reduced, tuple):
            return reduced
        make, args, *state = reduced
        gates: dict[str, nn.Parameter] = {}
        if getattr(make, "__name__", "") not in ("__newobj__", "__newobj_ex__"):  # made by a constructor of its own
            names = self.__dict__.get("rezero_gates", ())
            gates = {name: gate for name in names if (gate := self._parameters.get(name)) is not None}
        args = tuple(original if arg is cls else arg for arg in args)
        return (revive, (recipe, original if make is cls else make, args, gates), *state)

    return __reduce_ex__


# --- what is to be edited ---


class _Found(NamedTuple):
    definer: int
    attributes: tuple[str, ...]
    code: CodeType


@dataclass(slots=True)
class _Job:
    """What one instance is to have edited."""

    instance: nn.Module
    path: str
    sites: dict[Place, list[Site]] = dataclasses.field(default_factory=dict)
    replacements: dict[Place, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def places(self) -> tuple[Place, ...]:
        return tuple(dict.fromkeys([*self.sites, *self.replacements]))


def _classes(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The new class of every instance that needs one."""
    jobs: dict[int, _Job] = {}

    def job(path: str) -> _Job:
        instance = _module(model, path)
        return jobs.setdefault(id(instance), _Job(instance, path))

    touched: set[int] = set()
    for site in _edited_sites(plan):
        for path, place, part in _parts(model, site):
            job(path).sites.setdefault(place, []).append(part)
        touched.add(id(_module(model, site.path)))
        touched.update(
            id(_module(model, norm.path.rpartition(".")[0]))
            for norm in site.norms
            if norm.path and norm.action != "keep"
        )
    for path, module in model.named_modules():
        for known, old, new in FAST_PATHS:
            if isinstance(module, known) and any(id(below) in touched for below in module.modules()):
                one = job(path)
                one.replacements[_same_place(_place(known, "forward"), one.sites)] = (old, new)
    texts: dict[Any, tuple[str, str]] = {}
    made: list[tuple[nn.Module, type[nn.Module]]] = []
    for one in jobs.values():
        if isinstance(one.instance, torch.jit.ScriptModule):
            raise ConversionError(f"{one.path or 'the model'}: a ScriptModule has no Python code to rewrite")
        cls: Any = type(one.instance)
        methods = [
            EditedMethod(
                found.definer,
                found.attributes,
                found.code.co_qualname,
                found.code.co_firstlineno,
                *_text_of(texts, place, found.code, one),
            )
            for place in one.places()
            for found in [_required(cls, place)]
        ]
        made.append((one.instance, converted_class(Recipe(_base(cls), tuple(sorted(methods, key=_order))))))
    return made


def _base(cls: type) -> type | Recipe:
    """What a recipe for a subclass of `cls` starts from."""
    base: type | Recipe = cls.__dict__.get("rezero_recipe", cls)
    return base


def _text_of(texts: dict[Any, tuple[str, str]], place: Place, code: CodeType, job: _Job) -> tuple[str, str]:
    """File name and text of an edited method; equal edits are made once."""
    sites, replacement = tuple(job.sites.get(place, ())), job.replacements.get(place)
    key = (place, code, tuple(_essence(site) for site in sites), replacement)
    if key not in texts:
        texts[key] = _edited(place, code, sites, replacement)
    return texts[key]


def _edited_sites(plan: Plan) -> tuple[Site, ...]:
    return tuple(site for site in plan.sites if text.is_edited(site))


def _order(method: EditedMethod) -> tuple[int, int, str]:
    return method.definer, method.line, method.file


def _essence(site: Site) -> tuple[Any, ...]:
    """What of a site its text depends on."""
    gates = tuple((gate.at, gate.alpha, gate.existing) for gate in site.gates)
    return gates, tuple(norm.at for norm in site.norms), site.activation


def _parts(model: nn.Module, site: Site) -> Iterator[tuple[str, Place, Site]]:
    """The edits of a site by (module path, method): gates, norms and activation may be in different ones."""
    site = dataclasses.replace(site, verdict="converted")
    moved = site.activation is not None and site.activation.action == "move"
    gates: dict[Place, list[Gate]] = {}
    for gate in site.gates:
        place = gate.at.place if gate.at is not None else site.place
        if place is not None and ((gate.at is not None and not gate.existing) or moved):
            gates.setdefault(place, []).append(gate)
    if moved and site.activation is not None:
        gates.setdefault(site.activation.at.place, [])
    for place, some in gates.items():
        yield site.path, place, dataclasses.replace(site, gates=tuple(some), norms=())
    for norm in site.norms:
        if norm.action == "bypass" and norm.at is not None:
            path = _caller(model, site, norm)
            yield path, norm.at.place, dataclasses.replace(site, gates=(), norms=(norm,), activation=None)


def _caller(model: nn.Module, site: Site, norm: Norm) -> str:
    """The path of the module whose method calls the norm."""
    assert norm.at is not None
    candidates = [site.path]
    if norm.attribute and norm.path != norm.attribute and norm.path.endswith("." + norm.attribute):
        candidates.append(norm.path[: -len(norm.attribute) - 1])
    elif norm.attribute and norm.path == norm.attribute:
        candidates.append("")
    for path in candidates:
        caller = _module(model, path)
        if norm.attribute:
            try:
                if caller.get_submodule(norm.attribute) is not _module(model, norm.path):
                    continue
            except AttributeError:
                continue
        caller_class: Any = type(caller)
        if _find(caller_class, norm.at.place) is not None:
            return path
    raise ConversionError(f"{norm.at.span}: no module was found that calls the norm {norm.path or norm.type!r} here")


def _module(model: nn.Module, path: str) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(f"{path or 'the model'}: a ScriptModule has no Python code to rewrite")
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"the model has no module {path!r}; the plan is another model's") from error


def _place(cls: type, attribute: str) -> Place:
    code = next(_codes(cls.__dict__[attribute]))
    return Place(cls.__module__, code.co_qualname, code.co_filename, code.co_firstlineno)


def _same_place(place: Place, places: Iterable[Place]) -> Place:
    """The one of `places` that is the same function, or `place` itself."""
    return next((other for other in places if (other.file, other.line) == (place.file, place.line)), place)


def _required(cls: type, place: Place) -> _Found:
    found = _find(cls, place)
    if found is None:
        raise ConversionError(f"{place.file}:{place.line}: {cls.__qualname__} has no such method {place.name!r}")
    return found


@functools.lru_cache(maxsize=1024)
def _find(cls: Any, place: Place) -> _Found | None:
    """Where in the classes of `cls` the function of `place` is held."""
    for definer, holder in enumerate(cls.__mro__):
        if holder is object:
            continue
        names: list[str] = []
        found: CodeType | None = None
        members = holder.__dict__
        likely = {place.name: members[place.name]} if place.name in members else {}
        for some in (likely, members):
            for name, value in some.items():
                for code in _codes(value):
                    if code.co_filename == place.file and _is(code, None, place.line) and code.co_name == place.name:
                        found = code
                        names.append(name)
        if found is not None:
            return _Found(definer, tuple(dict.fromkeys(names)), found)
    return None


def _is(code: CodeType, qualname: str | None, line: int) -> bool:
    return code.co_firstlineno == line and qualname in (None, code.co_qualname)


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
    if isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        return [value.func]
    wrapped = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
    return [] if wrapped is None else [wrapped]


def _codes(value: Any) -> Iterator[CodeType]:
    """The code objects of a method and of what it wraps, outermost first."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop(0)
        if id(item) in seen or isinstance(item, (nn.Module, Tensor)):
            continue
        seen.add(id(item))
        if isinstance(item, FunctionType):
            yield item.__code__
        queue += _inner(item)


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _rebuilt(value: Any, old: CodeType, new: CodeType, memo: dict[int, Any]) -> Any:
    """`value` with the function of code `old` replaced by one of code `new`; what holds it is copied, not changed."""
    if id(value) in memo:
        return memo[id(value)]
    if not any(code is old for code in _codes(value)):
        return value
    if isinstance(value, FunctionType):
        return _rebuilt_function(value, old, new, memo)
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_rebuilt(value.__func__, old, new, memo))
    if isinstance(value, MethodType):
        return MethodType(_rebuilt(value.__func__, old, new, memo), value.__self__)
    if isinstance(value, property):
        fget, fset, fdel = (_rebuilt(part, old, new, memo) for part in (value.fget, value.fset, value.fdel))
        return type(value)(fget, fset, fdel, value.__doc__)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return type(value)(_rebuilt(value.func, old, new, memo), *value.args, **value.keywords)
    if isinstance(value, functools.cached_property):
        made: functools.cached_property[Any] = functools.cached_property(_rebuilt(value.func, old, new, memo))
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
        if not own and _filled(cell) and any(inner is old for inner in _codes(cell.cell_contents)):
            cells[name] = CellType()
            changed.append((cells[name], cell))
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, value.__globals__, value.__name__, value.__defaults__, closure)
    memo[id(value)] = made
    for target, cell in changed:
        target.cell_contents = _rebuilt(cell.cell_contents, old, new, memo)
    made.__kwdefaults__ = value.__kwdefaults__
    made.__annotations__ = dict(value.__annotations__)
    made.__qualname__, made.__module__, made.__doc__ = value.__qualname__, value.__module__, value.__doc__
    made.__dict__.update(value.__dict__)
    if "__wrapped__" in made.__dict__:
        made.__dict__["__wrapped__"] = _rebuilt(made.__dict__["__wrapped__"], old, new, memo)
    return made


# --- text and code ---


def _edited(
    place: Place, code: CodeType, sites: tuple[Site, ...], replacement: tuple[str, str] | None
) -> tuple[str, str]:
    """File name and text of the method with its edits."""
    header, body, first = _method(place, code)
    _check(place, code, _padded(header + body, first))
    edited = text.edit(header + body, sites, text.call, file=place.file, first_line=first)
    if replacement is not None:
        if replacement[0] not in edited:
            raise ConversionError(f"{place.file}:{place.line}: no {replacement[0]} in {place.qualname} of this version")
        edited = edited.replace(*replacement)
    edited = _padded(edited, first)
    digest = hashlib.sha256(f"{place.file}\n{edited}".encode()).hexdigest()[:10]
    return f"<rezero {place.module}.{code.co_qualname} {digest}>", edited


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


def _compiled(body: str, file: str, like: CodeType) -> CodeType:
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
        if code.co_name == like.co_name and _is(code, like.co_qualname, like.co_firstlineno):
            return code
        queue += [const for const in code.co_consts if isinstance(const, CodeType)]
    raise ConversionError(
        f"{like.co_filename}:{like.co_firstlineno}: {like.co_qualname} is not there (has the file changed?)"
    )


def _check(place: Place, code: CodeType, body: str) -> None:
    """Raise unless `body` is the text that `code` was made of."""
    stale = f"{place.file}:{place.line}: the text of {place.qualname} is not what was imported; restart Python"
    try:
        compiled = _compiled(body, place.file, code)
    except SyntaxError as error:
        raise ConversionError(f"{place.file}:{error.lineno}: syntax error: {error.msg}") from error
    if _same(compiled, code):
        return
    # import hooks (pytest's) rewrite assertions; all else must be there, at its place
    tree = _scaffold(_WithoutAssertions().visit(ast.parse(body, place.file)), code)
    if not _within(_dig(tree, place.file, code), code):
        raise ConversionError(stale)


class _WithoutAssertions(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node)


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same; file and line numbers do not count."""
    if (one.co_code, one.co_names, one.co_varnames, one.co_freevars, one.co_cellvars) != (
        (other.co_code, other.co_names, other.co_varnames, other.co_freevars, other.co_cellvars)
    ):
        return False
    return len(one.co_consts) == len(other.co_consts) and all(map(_same_constant, one.co_consts, other.co_consts))


def _same_constant(one: object, other: object) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return _same(one, other)
    return type(one) is type(other) and repr(one) == repr(other)


def _within(part: CodeType, whole: CodeType) -> bool:
    """Whether all names, constants and operations of `part` are in `whole`, at the same positions."""
    return all(mine <= others for mine, others in zip(_marks(part), _marks(whole), strict=True)) and (
        part.co_varnames[: part.co_argcount] == whole.co_varnames[: whole.co_argcount]
    )


def _marks(code: CodeType) -> tuple[set[object], set[object], set[object]]:
    """Names, constants, and positions of operations, nested functions' included."""
    names: set[object] = {*code.co_names, *code.co_freevars}
    constants: set[object] = {repr(const) for const in code.co_consts if not isinstance(const, CodeType)}
    opcodes = code.co_code[::2]
    places = zip(opcodes, code.co_positions(), strict=True)
    spots: set[object] = {position for op, position in places if op in _OPERATIONS and None not in position}
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


# --- applying, with undo ---


def _set(undo: ExitStack, mapping: dict[str, Any], key: str, value: Any) -> None:
    if key in mapping:
        undo.callback(mapping.__setitem__, key, mapping[key])
    else:
        undo.callback(mapping.pop, key)
    mapping[key] = value


def _delete(undo: ExitStack, mapping: dict[str, Any], key: str) -> None:
    before = dict(mapping)
    undo.callback(mapping.update, before)  # in the old order
    undo.callback(mapping.clear)
    del mapping[key]


def _fill(undo: ExitStack, parameter: Tensor, value: float | Tensor) -> None:
    if not parameter.is_meta:
        before = parameter.detach().clone()
        undo.callback(_copy, parameter, before)
    with torch.no_grad():
        parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)


def _copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _set_class(undo: ExitStack, instance: nn.Module, cls: type[nn.Module]) -> None:
    undo.callback(object.__setattr__, instance, "__class__", type(instance))
    before = type(instance)
    object.__setattr__(instance, "__class__", cls)
    # methods that the instance holds itself (accelerate's `_old_forward`) would bypass the class
    for name, value in list(instance.__dict__.items()):
        if isinstance(value, (FunctionType, MethodType, functools.partial)):
            for method in cls.__dict__["rezero_recipe"].methods:
                member = before.__mro__[method.definer].__dict__[method.attributes[0]]
                old = next(code for code in _codes(member) if _is(code, method.qualname, method.line))
                value = _rebuilt(value, old, _compiled(method.text, method.file, old), {})
            _set(undo, instance.__dict__, name, value)


def _gates(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, Gate]]:
    """Each gate once, with its owner: several sites may share one."""
    seen: set[tuple[int, str]] = set()
    for site in _edited_sites(plan):
        owner = _module(model, site.path)
        for gate in site.gates:
            if (id(owner), gate.alpha) not in seen:
                seen.add((id(owner), gate.alpha))
                yield owner, site.path or "the model", gate


def _place_gate(undo: ExitStack, model: nn.Module, owner: nn.Module, path: str, gate: Gate, preserve: bool) -> None:
    """Register a new alpha, or set an existing gate's value; either is entered in `rezero_gates`."""
    if gate.existing:
        try:
            parameter = owner.get_parameter(gate.alpha)
        except AttributeError as error:
            raise ConversionError(f"{path}: no parameter {gate.alpha!r} is there") from error
        if gate.init is not None:
            _fill(undo, parameter, gate.init)
    else:
        if hasattr(owner, gate.alpha):
            raise ConversionError(f"{path}: the name {gate.alpha!r} of the new alpha is taken")
        like = next(itertools.chain(_floats(owner), _floats(model), [torch.empty(0)]))
        init = 1.0 if preserve or gate.init is None else gate.init
        made = [
            nn.Parameter(torch.full(gate.shape, init, dtype=like.dtype, device=like.device)) for _ in gate.parameters()
        ]
        if gate.loop is None:
            _set(undo, owner._parameters, gate.alpha, made[0])
        else:
            _set(undo, owner._modules, gate.alpha, nn.ParameterList(made).train(owner.training))
    names: tuple[str, ...] = owner.__dict__.get("rezero_gates", ())
    new = tuple(name for name in gate.parameters() if name not in names)
    if new:
        _set(undo, owner.__dict__, "rezero_gates", (*names, *new))


def _floats(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if parameter.dtype in _DTYPES)


def _drop_norms(undo: ExitStack, model: nn.Module, plan: Plan) -> None:
    """Take out the norms that nothing uses any more, and put in the biases they had provided."""
    actions: dict[str, set[str]] = {}
    for site in plan.sites:
        for norm in site.norms:
            actions.setdefault(norm.path, set()).add(norm.action if text.is_edited(site) else "keep")
    going = {path: wanted for path, wanted in actions.items() if path and "keep" not in wanted}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder in model.modules():
        for key, child in holder._modules.items():
            holders.setdefault(id(child), []).append((holder, key))
    for path, wanted in going.items():
        norm_module = _module(model, path)
        for holder, key in holders.get(id(norm_module), []):
            if "unfuse" in wanted:
                _set(undo, holder._modules, key, _unfused(norm_module, path))
            elif "slot" in wanted or isinstance(holder, _CONTAINERS):
                _set(undo, holder._modules, key, nn.Identity().train(norm_module.training))
            else:
                _delete(undo, holder._modules, key)
    for path in dict.fromkeys(
        n.bias for site in _edited_sites(plan) for n in site.norms if n.bias and n.action != "keep"
    ):
        layer = _module(model, path)
        if layer._parameters.get("bias") is None:
            _set(undo, layer._parameters, "bias", _zero_bias(layer, path))


def _unfused(norm: nn.Module, path: str) -> nn.Sequential:
    """What a fused norm + activation module does besides normalizing."""
    rest = {name: child for name, child in norm.named_children() if facts.of_class(type(child)).kind != "norm"}
    if not rest:
        raise ConversionError(f"{path}: no activation was found inside this {type(norm).__qualname__}")
    kept = nn.Sequential()
    for name, child in rest.items():
        kept.add_module(name, child)
    kept.training = norm.training
    return kept


def _zero_bias(layer: nn.Module, path: str) -> nn.Parameter:
    size = getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)
    weight = layer._parameters.get("weight")
    if not isinstance(size, int) or weight is None:
        raise ConversionError(f"{path}: a {type(layer).__qualname__} cannot be given a bias")
    bias = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(bias, requires_grad=weight.requires_grad)


def _repair(undo: ExitStack, model: nn.Module, repair: Repair) -> None:
    """Undo a zero initialization."""
    holder, _, name = repair.parameter.rpartition(".")
    module = _module(model, holder)
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ConversionError(f"the model has no parameter {repair.parameter!r}; the plan is another model's")
    if repair.how == "ones":
        _fill(undo, parameter, 1.0)
        return
    tensors = [tensor for tensor in itertools.chain(module.parameters(), module.buffers()) if not tensor.is_meta]
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor, value in zip(tensors, before, strict=True):
        undo.callback(_copy, tensor, value)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        for tensor, value in zip(tensors, before, strict=True):
            if tensor is not parameter:
                _copy(tensor, value)
    if parameter.is_meta or parameter.detach().count_nonzero().item() == 0:
        if parameter.dim() < 2:
            _fill(undo, parameter, 1.0)
        else:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
