"""What each instance of a model is to have edited: its new class, and the functions that it holds itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, MethodType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import sources
from ..errors import ConversionError
from ..known import FAST_PATHS
from ..plan import Gate, Norm, Place, Plan, Site
from . import graphs
from .changes import CALLABLES
from .recompile import codes, compiled, edited, is_at, parts, rebuilt
from .subclass import EditedMethod, Recipe, converted_class, original_of, recipe_of


class NewClass(NamedTuple):
    """An instance and the class it is to get."""

    instance: nn.Module
    cls: type[Any]


class NewFunction(NamedTuple):
    """A function that an instance holds under its own name (`block.forward = ...`), and the edited one."""

    instance: nn.Module
    name: str
    function: Any


class NewGraph(NamedTuple):
    """A graph module and the graph it is to get."""

    instance: fx.GraphModule
    graph: fx.Graph


class Edits(NamedTuple):
    """What is to be changed, instance by instance."""

    classes: list[NewClass]
    functions: list[NewFunction]
    graphs: list[NewGraph]


def edits(model: nn.Module, plan: Plan) -> Edits:
    """All that `plan` wants edited; nothing is changed yet.

    Raises:
        ConversionError: a method is not there, or its text cannot be had, is stale, or cannot be edited.
    """
    classes: list[NewClass] = []
    functions: list[NewFunction] = []
    jobs, flat = _jobs(model, plan)
    for job in jobs:
        if isinstance(job.instance, torch.jit.ScriptModule):
            raise ConversionError(f"{job.path or 'the model'}: a ScriptModule has no Python code to rewrite")
        cls: Any = type(job.instance)
        recipe = recipe_of(cls) or Recipe(cls, ())
        methods = {(method.definer, method.qualname, method.line): method for method in recipe.methods}
        for place in job.places():
            found = find(cls, place)
            if found is None:
                functions += _own(job, place)
                continue
            method = edited_method(recipe, cls, found, *_text_of(place, found.code, job))
            methods[method.definer, method.qualname, method.line] = method
        classes.append(NewClass(job.instance, converted_class(Recipe(recipe.original, tuple(_sorted(methods))))))
    return Edits(classes, functions, [_new_graph(model, job) for job in flat])


def _new_graph(model: nn.Module, job: _Job) -> NewGraph:
    assert isinstance(job.instance, fx.GraphModule)
    sites = [site for some in job.sites.values() for site in some]
    return NewGraph(job.instance, graphs.edited(model, job.path, job.instance, sites))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the plan.

    Raises:
        ConversionError: there is none, or the model is scripted.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(f"{path or 'the model'}: a ScriptModule has no Python code to rewrite")
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"the model has no module {path!r}; the plan is another model's") from error


# --- by instance ---


@dataclass(slots=True)
class _Job:
    """What one instance is to have edited."""

    instance: nn.Module
    path: str
    sites: dict[Place, list[Site]] = dataclasses.field(default_factory=dict)
    replacements: dict[Place, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def places(self) -> tuple[Place, ...]:
        return tuple(dict.fromkeys([*self.sites, *self.replacements]))


def _jobs(model: nn.Module, plan: Plan) -> tuple[list[_Job], list[_Job]]:
    """The jobs on classes and own functions, and those on graphs."""
    jobs: dict[int, _Job] = {}
    flat: dict[str, _Job] = {}

    def job(path: str) -> _Job:
        instance = module_at(model, path)
        return jobs.setdefault(id(instance), _Job(instance, path))

    touched: set[int] = set()
    home = graphs.homes(model)
    for site in plan.edited:
        for path, place, part in _parts(model, site, home):
            graph = home(place, path)
            one = job(path) if graph is None else flat.setdefault(graph, _Job(module_at(model, graph), graph))
            one.sites.setdefault(place, []).append(part)
        touched.add(id(module_at(model, site.path)))
        touched.update(
            id(module_at(model, norm.path.rpartition(".")[0]))
            for norm in site.norms
            if norm.path and norm.action != "keep"
        )
    for path, module in model.named_modules():
        rows = [row for row in FAST_PATHS if isinstance(module, row[0])]
        # a class that copies itself by its constructor must know that what it holds is converted
        copies = hasattr(type(module), "__deepcopy__") and not isinstance(module, fx.GraphModule)
        if (rows or copies) and any(id(below) in touched for below in module.modules()):
            one = job(path)
            for known, old, new in rows:
                place = _place(known, "forward")
                if not _has_edited(type(module), place):
                    one.replacements[_same_place(place, one.sites)] = (old, new)
    return list(jobs.values()), list(flat.values())


def _parts(model: nn.Module, site: Site, home: graphs.Home) -> Iterator[tuple[str, Place, Site]]:
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
    if site.skip_gate is not None:
        gates.setdefault(site.skip_gate.at.place, [])
    for shift in site.shifts:
        if shift.at is not None:
            gates.setdefault(shift.at.place, [])
    if site.move is not None:
        gates.setdefault(site.move.at.place, [])
    for place, some in gates.items():
        yield site.path, place, dataclasses.replace(site, gates=tuple(some), norms=())
    for norm in site.norms:
        if norm.action == "bypass" and norm.at is not None:
            path = home(norm.at.place, norm.path or site.path)
            path = _caller(model, site, norm) if path is None else path
            yield (
                path,
                norm.at.place,
                dataclasses.replace(site, gates=(), norms=(norm,), activation=None, skip_gate=None, shifts=()),
            )


def _caller(model: nn.Module, site: Site, norm: Norm) -> str:
    """The path of the module whose method calls the norm."""
    assert norm.at is not None
    candidates = [site.path]
    if norm.attribute and norm.path != norm.attribute and norm.path.endswith("." + norm.attribute):
        candidates.append(norm.path[: -len(norm.attribute) - 1])
    elif norm.attribute and norm.path == norm.attribute:
        candidates.append("")
    for path in candidates:
        caller = module_at(model, path)
        if norm.attribute:
            try:
                if caller.get_submodule(norm.attribute) is not module_at(model, norm.path):
                    continue
            except AttributeError:
                continue
        caller_class: Any = type(caller)
        if find(caller_class, norm.at.place) is not None or any(_held(caller, norm.at.place)):
            return path
    raise ConversionError(f"{norm.at.span}: no module was found that calls the norm {norm.path or norm.type!r} here")


# --- methods of the class ---


class _Found(NamedTuple):
    definer: int
    attributes: tuple[str, ...]
    code: CodeType


@functools.lru_cache(maxsize=1024)
def find(cls: Any, place: Place) -> _Found | None:
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
                for code in codes(value):
                    if _is_of(code, place):
                        found = code
                        names.append(name)
        if found is not None:
            return _Found(definer, tuple(dict.fromkeys(names)), found)
    return None


def _is_of(code: CodeType, place: Place) -> bool:
    file = sources.stands_for(place.file) or place.file
    return code.co_filename == file and is_at(code, None, place.line) and code.co_name == place.name


def edited_method(recipe: Recipe, cls: type, found: _Found, file: str, body: str) -> EditedMethod:
    """The record of an edit; one of a method that was edited before takes its place."""
    code = found.code
    for method in recipe.methods:
        if method.file == code.co_filename and is_at(code, method.qualname, method.line):
            return dataclasses.replace(method, file=file, text=body)
    definer = recipe.original.__mro__.index(original_of(cls.__mro__[found.definer]))
    if any((m.definer, m.qualname, m.line) == (definer, code.co_qualname, code.co_firstlineno) for m in recipe.methods):
        raise ConversionError(
            f"{code.co_filename}:{code.co_firstlineno}: {code.co_qualname} is converted already; the plan is of the "
            "unconverted model"
        )
    return EditedMethod(definer, found.attributes, code.co_qualname, code.co_firstlineno, file, body)


def _sorted(methods: dict[tuple[int, str, int], EditedMethod]) -> list[EditedMethod]:
    return sorted(methods.values(), key=lambda method: (method.definer, method.line, method.file))


def _has_edited(cls: type, place: Place) -> bool:
    recipe = recipe_of(cls)
    spots = [(method.qualname, method.line) for method in recipe.methods] if recipe is not None else []
    return (place.qualname, place.line) in spots


def _place(cls: type, attribute: str) -> Place:
    code = next(codes(cls.__dict__[attribute]))
    return Place(cls.__module__, code.co_qualname, code.co_filename, code.co_firstlineno)


def _same_place(place: Place, places: Iterable[Place]) -> Place:
    """The one of `places` that is the same function, or `place` itself."""
    return next((other for other in places if (other.file, other.line) == (place.file, place.line)), place)


# --- functions of the instance ---


def _held(instance: nn.Module, place: Place) -> Iterator[tuple[str, CodeType]]:
    """The names under which an instance itself holds the function of `place`."""
    for name, value in instance.__dict__.items():
        if isinstance(value, CALLABLES):
            yield from ((name, code) for code in codes(value) if _is_of(code, place))


def _own(job: _Job, place: Place) -> Iterator[NewFunction]:
    held = list(_held(job.instance, place))
    if not held:
        cls = type(job.instance).__qualname__
        raise ConversionError(f"{place.file}:{place.line}: {cls} has no such method {place.name!r}")
    for name, code in held:
        value = job.instance.__dict__[name]
        if not _is_bound(value, job.instance):
            raise ConversionError(
                f"{place.file}:{place.line}: {job.path or 'the model'} has a {name} of its own that does not take the "
                "module as its first argument; set it with types.MethodType(function, module)"
            )
        file, body = _text_of(place, code, job)
        sources.register(file, body)
        yield NewFunction(job.instance, name, rebuilt(value, code, compiled(body, file, code), {}))


def _is_bound(value: Any, instance: nn.Module) -> bool:
    """Whether a function gets the instance as its first argument."""
    return any(
        (isinstance(part, MethodType) and part.__self__ is instance)
        or (isinstance(part, functools.partial) and part.args and part.args[0] is instance)
        for part in parts(value)
    )


# --- text ---


@dataclass(frozen=True, slots=True)
class _Asked:
    """Sites that are equal if their text is."""

    essence: tuple[Any, ...]
    sites: tuple[Site, ...] = dataclasses.field(compare=False)


def _text_of(place: Place, code: CodeType, job: _Job) -> tuple[str, str]:
    """File name and text of an edited method; equal edits are made once."""
    sites = tuple(job.sites.get(place, ()))
    return _text(place, code, _Asked(tuple(map(_essence, sites)), sites), job.replacements.get(place))


@sources.cached
def _text(place: Place, code: CodeType, asked: _Asked, replacement: tuple[str, str] | None) -> tuple[str, str]:
    return edited(place, code, asked.sites, replacement)


def _essence(site: Site) -> tuple[Any, ...]:
    """What of a site its text depends on."""
    gates = tuple((gate.at, gate.alpha, gate.existing, gate.loops, gate.scale, gate.carries) for gate in site.gates)
    norms = tuple((norm.at, norm.action) for norm in site.norms)
    return site.edited, gates, site.skip_gate, site.shifts, norms, site.activation, site.move
