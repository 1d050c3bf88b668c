"""What the alphas are called: computed from the code of the class, so that every route gives the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..plan import Operand


@dataclass(frozen=True, slots=True)
class Request:
    """One branch that needs an alpha."""

    cls: str
    """The owner's class."""
    at: Operand
    child: str
    """The owner's child that holds the branch's last weight; "" if that lies elsewhere."""


def alphas(
    requests: Iterable[Request],
    *,
    shared: bool,
    exclusive: Callable[[Operand, Operand], bool],
    taken: Callable[[str, str], bool],
) -> dict[Request, str]:
    """A name for each branch: `alpha` if its class holds one, else `alpha_<child>`.

    Args:
        requests: all branches of all classes; equal requests get one name.
        shared: one alpha for all branches of a module.
        exclusive: whether two operands lie in arms of which one call runs at most one.
        taken: whether an attribute of this name is the class's own: (cls, name).
    """
    classes: dict[str, list[Request]] = {}
    for request in dict.fromkeys(requests):
        classes.setdefault(request.cls, []).append(request)
    return {request: name for own in classes.values() for request, name in _of_class(own, shared, exclusive, taken)}


def _of_class(
    requests: list[Request],
    shared: bool,
    exclusive: Callable[[Operand, Operand], bool],
    taken: Callable[[str, str], bool],
) -> Iterable[tuple[Request, str]]:
    single = shared or len({request.at for request in requests}) == 1
    given: dict[str, list[Request]] = {}
    for request in sorted(requests, key=lambda request: request.at):
        wanted = "alpha" if single else f"alpha_{request.child.replace('.', '_')}" if request.child else "alpha_branch"
        for name in _numbered(f"rezero_{wanted}" if taken(request.cls, wanted) else wanted):
            holders = given.setdefault(name, [])
            if single or all(exclusive(request.at, holder.at) for holder in holders):
                holders.append(request)
                yield request, name
                break


def _numbered(name: str) -> Iterable[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1
