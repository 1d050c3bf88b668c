"""Highway blocks: whether each carry gate is computed from its skip, and takes its part from the branch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..detect import blocks as detected
from ..detect import carries
from ..detect.drafts import is_gated
from ..listing import number
from ..methods import METHODS
from .looks import Look, Subject, joined, several
from .results import Check


def carrying(subject: Subject) -> bool:
    """Whether a model was converted to highway blocks, or is to be checked for them."""
    return bool(_planned(subject)) or (not subject.plans and METHODS[subject.options.method].map == "carry")


def carried(subject: Subject, look: Look) -> Iterator[Check]:
    """Whether the graph has `x + sigmoid(layer(x)) * (f - x)`; in a model without a record, at all blocks."""
    if not carrying(subject):
        return
    found = detected.find(look.flow, partial(is_gated, look.flow))[0]
    layers = {block.sum.node: carries.layer(look.flow, block) for block in found}
    there = {layer for layer in layers.values() if layer is not None}
    missing = sorted(_planned(subject) - there)
    if not subject.plans:
        paths = (detected.owner_call(look.flow, node).path for node, layer in layers.items() if layer is None)
        missing = sorted({path or "the model" for path in paths})
    detail = several("carries no skip", missing) or number(len(there), "carry gate")
    yield Check("carried", look.mode, bool(there) and not missing, detail)


def _planned(subject: Subject) -> set[str]:
    return {
        joined(prefix, site.path, gate.alpha)
        for prefix, plan in subject.plans
        for site in plan.converted
        for gate in site.gates
        if gate.carries is not None
    }
