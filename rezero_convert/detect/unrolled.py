"""Loops over modules that a tracer of torch.fx has unrolled: their gates are a list again, as in the classes' text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .drafts import Draft, relative
from .flow import Flow
from .names import Request


def passes(
    flow: Flow, drafts: Iterable[Draft], is_walked: Callable[[str, str], bool]
) -> dict[Request, tuple[Request, str]]:
    """For gates that the passes of one loop would share: the first pass, and the path of the gate in its list.

    Passes are told by the weights that their branches end in, which differ in nothing but their numbers in lists of
    modules, and count those up in order from 0, as nested loops do.

    Args:
        flow: of a trace with graphs.
        drafts: in the order in which they run.
        is_walked: whether a class may walk a child in a loop: (class name, the child's name).
    """
    groups: dict[tuple[str, str, str], dict[tuple[int, ...], Request]] = {}
    doubled = set()
    for draft in drafts:
        for gate, asked, weight in zip(draft.site.gates, draft.requests, draft.weights, strict=False):
            if asked is None or gate.at is None or gate.at.span not in flow.trace.generated:
                continue
            parts = relative(weight, draft.site.path).split(".")
            key = (draft.site.path, asked.cls, ".".join("*" if part.isdigit() else part for part in parts))
            numbers = tuple(int(part) for part in parts if part.isdigit())
            if numbers in groups.setdefault(key, {}):
                doubled.add(key)  # one module for several passes
            groups[key][numbers] = asked
    found: dict[Request, tuple[Request, str]] = {}
    for key, members in groups.items():
        first = next(iter(members.values()))
        listed = _listed(tuple(members)) if key not in doubled and is_walked(key[1], first.child) else None
        for asked, path in zip(members.values(), listed or (), strict=False):
            found[asked] = (first, path)
    return found


def _listed(numbers: tuple[tuple[int, ...], ...]) -> tuple[str, ...] | None:
    """The paths in lists of the sizes that were counted up to; None where the counting is not that of loops."""
    varying = [place for place in range(len(numbers[0])) if len({one[place] for one in numbers}) > 1]
    counted = [tuple(one[place] for place in varying) for one in numbers]
    starts = {one[:end] for one in counted for end in range(1, len(varying) + 1)}
    if not varying or counted != sorted(counted):
        return None
    if any(start[-1] and (*start[:-1], start[-1] - 1) not in starts for start in starts):
        return None  # a number was left out
    return tuple(".".join(map(str, one)) for one in counted)
