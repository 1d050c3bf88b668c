"""Adds in loops over modules: which lists are walked, and how the alphas can be walked beside them.

Two things are matched: what the run tells, the paths of the modules whose branches one add has added
("stages.0.1.linear"), and what the text says, the paths of what its `for` clauses walk (`for stage in self.stages`,
`for block in stage`: "stages.*.*").
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .. import sources
from ..errors import ConversionError
from ..plan import Loop, Place, Span
from . import code, iterables

Refused = str
"""Why not, as a sentence."""
Elements = Callable[[str], Sequence[str] | None]
"""The names of the modules in the list or dictionary at a path from the owner; None where they are not known."""

_Clause = ast.For | ast.comprehension
_DISPLAYS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


@dataclass(frozen=True, slots=True)
class Walk:
    """How the alphas of one add are walked."""

    loops: tuple[Loop, ...]
    """Outermost first; empty where one alpha serves all modules, whose results are added in one."""
    members: tuple[str, ...]
    """The paths of the parameters below the list of alphas; empty where the passes are not known."""


@dataclass(frozen=True, slots=True)
class _Star:
    """The part of a path that changes with the passes of a `for` clause."""

    clause: _Clause
    walked: ast.expr
    """What the clause goes through, or the list that its count is an index of."""
    variable: str
    index: str
    counts: tuple[int, int] = (0, 1)
    """First value and step of a count that is an index of the list."""
    backwards: bool = False
    choices: tuple[str, ...] = ()
    """The paths that a display of modules holds, `for f in (self.a, self.b)`."""


_Path = tuple["str | _Star", ...]


def loop_of(place: Place, add: Span, weights: Sequence[str], elements: Elements, *, run: bool = True) -> Walk | Refused:
    """The loops around an add that ran for each of several modules.

    Args:
        place: the method.
        add: the add in its text.
        weights: per pass the path, from the owner, of the module with the branch's last weight; on the static route
            maybe one path with "*" for each element.
        elements: what lists and dictionaries of modules hold.
        run: whether the passes are those of a run.
    """
    clauses = _clauses(place)
    around = [
        clause for clause, body in clauses if any(sources.span_of(place.file, part).contains(add) for part in body)
    ]
    parts = [tuple(path.split(".")) for path in weights]
    for path in sorted(_paths(place, around), key=_stars, reverse=True):
        stars = [part for part in path if isinstance(part, _Star)]
        found = {names for part in parts if (names := _match(path, part)) is not None}
        if len(found) < len(set(parts)) or not all(_match(path, part) for part in parts):
            continue
        if not run and parts[0].count("*") > len(stars) and len(around) > len(stars):
            continue  # an inner loop whose walk is not understood
        if [clause for clause in around if any(clause is star.clause for star in stars)] == [s.clause for s in stars]:
            chosen = None if run else next((star for star in stars if _is_chosen(place, star.clause, add)), None)
            if chosen is not None:
                return _not_every(_written(place.file, chosen.walked, code.self_name(place)))
            return _walk(place, path, sorted(found) if run else [], elements)
    every = [clause for clause, _ in clauses]
    inside = len(parts) == 1 and any(_match(path, parts[0]) for path in _paths(place, every))
    tied = len(set(parts)) == 1 and "*" not in parts[0]
    if inside or (tied and not _is_keyed(place, around, parts[0])):
        return Walk((), ())
    named = " and ".join(dict.fromkeys(weights[:2]))
    if not around:
        return f"one add for the branches of {named}, and no `for` around it that walks them"
    return f"the loop walks the modules of {named} in a way that a list of alphas cannot be walked beside"


def _not_every(written: str) -> Refused:
    return f"not every pass of the loop over {written} adds its branch"


def _is_chosen(place: Place, clause: _Clause, add: Span) -> bool:
    """Whether a condition on what a loop walks decides which of its passes come to an add."""
    variables = _names(clause.target)
    for node in [part for statement in getattr(clause, "body", ()) for part in ast.walk(statement)]:
        if isinstance(node, (ast.If, ast.IfExp)) and _names(node.test) & variables:
            arms = [*node.body, *node.orelse] if isinstance(node, ast.If) else [node.body, node.orelse]
            held = any(sources.span_of(place.file, arm).contains(add) for arm in arms)
            left = any(isinstance(part, (ast.Continue, ast.Break)) for arm in arms for part in ast.walk(arm))
            if held or (left and sources.span_of(place.file, node) < add):
                return True
    return False


@sources.cached
def _clauses(place: Place) -> list[tuple[_Clause, Sequence[ast.expr | ast.stmt]]]:
    """The `for` clauses of a method with what they repeat, in the order of the text, outer ones first."""
    try:
        definition = sources.function(place)
    except ConversionError:
        return []
    found: list[tuple[_Clause, Sequence[ast.expr | ast.stmt]]] = []
    nodes = [node for node in ast.walk(definition) if isinstance(node, (ast.For, *_DISPLAYS))] if definition else []
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.For):
            found.append((node, node.body))
        else:
            made = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            found += [(clause, made) for clause in node.generators]
    return found


def _stars(path: _Path) -> int:
    return sum(isinstance(part, _Star) for part in path)


def _match(path: _Path, weight: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of the elements that a weight lies in; None if it lies elsewhere, or there are none."""
    found = []
    for part in path:
        if isinstance(part, _Star) and part.choices:
            rest = f"{'.'.join(weight)}."
            name = next((one for one in part.choices if rest.startswith(f"{one}.")), None)
            if name is None:
                return None
            found.append(name)
            weight = weight[name.count(".") + 1 :]
            continue
        if not weight or not (isinstance(part, _Star) or weight[0] in (part, "*")):
            return None
        found += [weight[0]] if isinstance(part, _Star) else []
        weight = weight[1:]
    return tuple(found) or None


@dataclass(frozen=True, slots=True)
class _Names:
    """What names in a method stand for."""

    modules: dict[str, _Path]
    counters: dict[str, tuple[_Clause, tuple[int, int]]]
    """The variables that count passes, with first value and step."""
    keys: dict[str, _Path]
    """The variables that may be keys of a dictionary of modules, with the path of the element."""


def _names_in(place: Place, clauses: Sequence[_Clause]) -> _Names:
    names = _Names({code.self_name(place): ()}, {}, {})
    values = iterables.variables(place)
    for clause in clauses:
        walk = iterables.expanded(clause.iter, values)
        index, counts = _count_variable(clause.target, walk)
        if index:
            names.counters[index] = clause, counts
        for target, walked, backwards in _walked(clause.target, walk):
            _enter(target, _Star(clause, walked, ast.unparse(target), index, backwards=backwards), names)
    return names


def _paths(place: Place, clauses: Sequence[_Clause]) -> Iterator[_Path]:
    """The paths, from the owner, of the modules that the loops' variables, indices and keys stand for."""
    names = _names_in(place, clauses)
    yield from names.modules.values()
    for node in _subscripts(place):
        path = _path(node, names)
        if path is not None:
            yield path


@sources.cached
def _subscripts(place: Place) -> list[ast.Subscript]:
    definition = sources.function(place)
    nodes = ast.walk(definition) if definition is not None else ()
    values = iterables.variables(place)
    subscripts = (iterables.expanded(node, values) for node in nodes if isinstance(node, ast.Subscript))
    return [node for node in subscripts if isinstance(node, ast.Subscript)]


def _is_keyed(place: Place, around: Sequence[_Clause], weight: tuple[str, ...]) -> bool:
    """Whether a weight is in a module that is looked up by a loop's variable: each pass may look up another one."""
    names = _names_in(place, around)
    variables = {name for clause in around for name in _names(clause.target)}
    looked_up = [_path(node.value, names) for node in _subscripts(place) if _names(node.slice) & variables]
    return any(path and path == weight[: len(path)] for path in looked_up)


def _path(node: ast.expr, names: _Names) -> _Path | None:
    """The path of a module that an expression is; None for any other expression."""
    if isinstance(node, ast.Name):
        return names.modules.get(node.id)
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return None
    base = _path(node.value, names)
    if base is None:
        return None
    if isinstance(node, ast.Attribute):
        return (*base, node.attr)
    if isinstance(node.slice, ast.Constant):
        return (*base, str(node.slice.value))
    key = node.slice.id if isinstance(node.slice, ast.Name) else ""
    if key in names.counters:
        clause, counts = names.counters[key]
        return (*base, _Star(clause, _part(node.value, *counts), key, key, counts))
    element = names.keys.get(key)
    return element if element is not None and element[:-1] == base else None


def _walked(target: ast.expr, walk: ast.expr, *, backwards: bool = False) -> Iterator[tuple[ast.expr, ast.expr, bool]]:
    """The lists that go into a `for` clause, each with the variables for its elements, and whether from its end."""
    inner = iterables.wrapped(walk, "reversed")
    if inner is not None:
        yield from _walked(target, inner, backwards=not backwards)
    elif isinstance(walk, ast.Call) and isinstance(walk.func, ast.Name) and isinstance(target, ast.Tuple):
        lists = {"zip": walk.args, "enumerate": walk.args[:1]}.get(walk.func.id, [])
        for variable, part in zip(target.elts[-len(lists) :] if lists else (), lists, strict=False):
            yield from _walked(variable, part, backwards=backwards)
    else:
        yield target, walk, backwards


def _enter(target: ast.expr, star: _Star, names: _Names) -> None:
    """Note what a loop's variables stand for: elements of a list, a slice, a dictionary or a display of modules."""
    container: ast.expr = _unsliced(star.walked)
    method = ""
    if isinstance(container, ast.Call) and isinstance(container.func, ast.Attribute) and not container.args:
        method, container = container.func.attr, container.func.value
    key = target
    if method in iterables.ITEMS:
        if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return
        key, target = target.elts
    display = container.elts if isinstance(container, (ast.Tuple, ast.List)) else None
    if isinstance(container, ast.Dict) and method:
        display = container.values
    if display is not None:
        held = [_path(element, names) or () for element in display]
        choices = tuple(".".join(part for part in path if isinstance(part, str)) for path in held)
        whole = all(choices) and not any(map(_stars, held))
        _bind(target, (replace(star, choices=choices),) if whole else None, names)
        return
    base = _path(container, names)
    known = base is not None and method in ("", *iterables.VALUES, *iterables.ITEMS)
    element = (*base, star) if base is not None and known else None
    if isinstance(key, ast.Name) and element is not None and method not in iterables.VALUES:
        names.keys[key.id] = element
    _bind(target, element, names)


def _unsliced(walked: ast.expr) -> ast.expr:
    return walked.value if isinstance(walked, ast.Subscript) and isinstance(walked.slice, ast.Slice) else walked


def _bind(target: ast.expr, path: _Path | None, names: _Names) -> None:
    if isinstance(target, ast.Name):
        names.modules.pop(target.id, None)
        if path is not None:
            names.modules[target.id] = path
    elif isinstance(target, (ast.Tuple, ast.List)):
        for number, element in enumerate(target.elts):
            _bind(element, (*path, str(number)) if path is not None else None, names)


def _part(walked: ast.expr, first: int, step: int) -> ast.expr:
    """The part of a list whose indices a loop counts."""
    if (first, step) == (0, 1):
        return walked
    ends = [ast.Constant(number) if number != default else None for number, default in ((first, 0), (step, 1))]
    return ast.Subscript(walked, ast.Slice(ends[0], None, ends[1]), ast.Load())


def _count_variable(target: ast.expr, walk: ast.expr) -> tuple[str, tuple[int, int]]:
    """The variable that counts the passes of a loop, be it down, its first value and step; "" if it has none."""
    walk = iterables.wrapped(walk, "reversed") or walk
    counts = iterables.counts(walk)
    if counts is not None and isinstance(target, ast.Name):
        return target.id, counts
    counted = iterables.wrapped(walk, "enumerate") is not None and isinstance(target, ast.Tuple)
    first = target.elts[0] if counted and isinstance(target, ast.Tuple) else None
    return first.id if isinstance(first, ast.Name) else "", (0, 1)


def _index(star: _Star) -> str:
    """The number of a loop's pass, as an expression."""
    first, step = star.counts
    index = star.index if not first else f"{star.index} - {first}"
    return index if step == 1 else f"({index}) // {step}" if first else f"{index} // {step}"


def _walk(place: Place, path: _Path, found: list[tuple[str, ...]], elements: Elements) -> Walk | Refused:
    """How the alphas go along with what the loops walk.

    Args:
        path: of the modules whose branches are added.
        found: the elements whose branches were added; empty if not known.
    """
    me = code.self_name(place)
    loops: list[Loop] = []
    numbers: dict[tuple[str, ...], int] = {}
    stars = [(number, part) for number, part in enumerate(path) if isinstance(part, _Star)]
    for level, (number, star) in enumerate(stars):
        written = _written(place.file, star.walked, me)
        if _names(star.walked) - {me} - {name for _, outer in stars[:level] for name in _names(outer.clause.target)}:
            return f"what part of its modules the loop walks, {written}, is computed in the method"
        for prefix in dict.fromkeys(names[:level] for names in found):
            own = list(dict.fromkeys(names[level] for names in found if names[:level] == prefix))
            held = star.choices or elements(_filled(path[:number], prefix)) or ()
            if not set(own) <= set(held):
                return f"the loop walks {written} in a way that a list of alphas cannot be walked beside"
            walked = [held[n] for n in _range(star.walked, [held.index(name) for name in own], len(held))]
            counts = star.index and level + 1 == len(stars)  # a list beside an outer loop is walked in every pass
            if set(walked) != set(own) and not (counts and set(walked[: len(own)]) == set(own)):
                return _not_every(written)
            numbers |= {(*prefix, name): walked.index(name) for name in own}
        counted = level + 1 < len(stars) and star.variable == star.index
        modules = f"range({_counted(star, place.file, me)})" if counted else written
        backwards = star.backwards and not star.index
        loops.append(Loop(_first_variable(place.file, star.clause), modules, star.variable, _index(star), backwards))
    members = sorted([numbers[names[: level + 1]] for level in range(len(stars))] for names in found)
    return Walk(tuple(loops), tuple(".".join(map(str, member)) for member in members))


def _counted(star: _Star, file: str, me: str) -> str:
    """What a loop that counts indices of a list goes through, as the arguments of `range`."""
    first, step = star.counts
    whole = f"len({_written(file, _unsliced(star.walked) if star.counts != (0, 1) else star.walked, me)})"
    return whole if (first, step) == (0, 1) else f"{first}, {whole}" + (f", {step}" if step != 1 else "")


def _filled(path: _Path, names: tuple[str, ...]) -> str:
    """The path of one list, given the elements that it lies in."""
    left = iter(names)
    return ".".join(part if isinstance(part, str) else next(left) for part in path)


def _range(walked: ast.expr, found: list[int], length: int) -> range:
    """The elements of a list that a walk goes through; from the first found to the last if the text does not tell."""
    if _unsliced(walked) is walked:
        return range(length)
    assert isinstance(walked, ast.Subscript)
    assert isinstance(walked.slice, ast.Slice)
    ends = (walked.slice.lower, walked.slice.upper, walked.slice.step)
    try:
        return range(length)[slice(*[None if end is None else int(ast.literal_eval(end)) for end in ends])]
    except (ValueError, TypeError):
        return range(min(found), max(found) + 1)


def _written(file: str, node: ast.expr, me: str) -> str:
    whole = hasattr(node, "lineno")
    text = " ".join(sources.segment(sources.span_of(file, node)).split()) if whole else ast.unparse(node)
    return text if me == "self" else re.sub(rf"\b{me}\b", "self", text)


def _names(node: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _first_variable(file: str, clause: _Clause) -> Span:
    names = (node for node in ast.walk(clause.target) if isinstance(node, ast.Name))
    return min(sources.span_of(file, name) for name in names)
