"""What the alphas are called: computed from the code of the class, so that every route gives the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..plan import Operand


@dataclass(frozen=True, slots=True)
class Request:
    """One branch that needs an alpha."""

    cls: str
    """The owner's class."""
    rank: int
    """How far up the owner's bases the class is whose text holds the add: 0 for the owner's own."""
    at: Operand
    child: str
    """The owner's child that holds the branch's last weight; "" if that lies elsewhere."""


def alphas(
    requests: Iterable[Request],
    *,
    shared: bool,
    exclusive: Callable[[Operand, Operand], bool],
    taken: Callable[[str, str], bool],
    several: Callable[[Request], bool] = lambda request: False,
) -> dict[Request, str]:
    """A name for each branch: `alpha` if the class whose text holds it holds one, else `alpha_<child>`.

    A base class comes before those that inherit from it: text that several classes share has one name for all.

    Args:
        requests: all branches of all classes; equal requests get one name.
        shared: one alpha for all branches of a module.
        exclusive: whether two operands lie in arms of which one call runs at most one.
        taken: whether an attribute of this name is the class's own: (cls, name).
        several: whether the text that holds a branch holds more of them than the requests tell.
    """
    every = list(dict.fromkeys(requests))
    texts: dict[tuple[str, str], list[Request]] = {}
    for request in every:
        texts.setdefault((request.at.place.file, request.at.place.cls), []).append(request)
    given: dict[Operand, str] = {}
    for own in sorted(texts.values(), key=lambda own: -max(request.rank for request in own)):
        owners = {request.cls for request in own}
        above = {request.at: given[request.at] for request in every if request.cls in owners and request.at in given}
        for at, name in _of_text(own, shared, exclusive, taken, above, any(map(several, own))):
            given[at] = name
    return {request: given[request.at] for request in every}


def _of_text(
    requests: list[Request],
    shared: bool,
    exclusive: Callable[[Operand, Operand], bool],
    taken: Callable[[str, str], bool],
    above: Mapping[Operand, str],
    several: bool,
) -> Iterator[tuple[Operand, str]]:
    """The names in the text of one class, where its owners have those `above` already."""
    by_place = {request.at: request for request in sorted(requests, key=lambda request: request.at)}
    single = len(by_place) == 1 and not several and (shared or "alpha" not in above.values())
    holders: dict[str, list[Operand]] = {}
    for at, name in above.items():
        holders.setdefault(name, []).append(at)
    for at, request in by_place.items():
        wanted = "alpha" if single or shared else f"alpha_{request.child.replace('.', '_') or 'branch'}"
        for name in _numbered(f"rezero_{wanted}" if taken(request.cls, wanted) else wanted):
            others = holders.setdefault(name, [])
            if shared or all(exclusive(at, other) for other in others):
                others.append(at)
                yield at, name
                break


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1
