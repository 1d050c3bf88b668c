"""FixUp: where scalar biases go, which weights are scaled down, and which start at zero.

Source: Zhang et al., "Fixup Initialization", ICLR 2019, and the ReZero authors' fixup_resnet_cifar.py. Unlike there,
the weights are not drawn anew: what they are is scaled; and the shortcut's own convolution reads the skip without a
bias.
"""

from __future__ import annotations

from dataclasses import replace

from ..methods import METHODS
from ..plan import Activation, Gate, Operand, Options, Repair, Scale, Site
from . import code, gates
from .blocks import Branch, has_weight
from .flow import Flow

_SHIFT = Scale(map="shift")


def biases(
    flow: Flow, branch: Branch, site: Site, after: Activation | None
) -> tuple[tuple[Gate, ...], list[Repair]] | str:
    """The biases of a branch, without names as yet, and the changes of its weights; or why there is no place for them.

    Args:
        flow: of a trace.
        branch: of one gate.
        site: with path and place.
        after: the activation of the sum, which has a bias too.
    """
    inside = branch.region[1:]
    weighted = [node for node in inside if has_weight(flow, node)]
    if any(flow.facts[node].kind in ("attention", "recurrent") for node in weighted):
        return "an attention or recurrent module holds several layers, with no place for biases between them"
    if weighted[-1] not in branch.cuts:
        return "not all of the branch crosses its last layer"
    made: list[Gate] = []
    for node in inside:
        if node in weighted or flow.facts[node].kind == "activation":
            at = _entry(flow, node, site)
            if at is None:
                return f"{flow.name(node)} is not called in the text of the module that adds: a bias has no place there"
            made.append(Gate(at, "", "", "", scale=_SHIFT))
    if after is not None:
        made.append(Gate(after.at, "", "", "", scale=_SHIFT))
    layers = [_parameters(flow, node) for node in weighted]
    if not all(layers):
        return "a weight of the branch is computed, and cannot be scaled"
    repairs = [Repair(name, "scaled") for names in layers[:-1] for name in names[:1]]
    return tuple(made), [*repairs, *(Repair(name, "zeros") for name in layers[-1])]


def _entry(flow: Flow, node: int, site: Site) -> Operand | None:
    """The first argument of a layer's call, in the text of the module that adds."""
    step = flow.steps.get(node)
    frames = step.frames if step is not None else flow.origin(node).frames
    if not frames or site.place is None:
        return None
    own = frames[0].owner == site.path or frames[0].span in flow.trace.generated
    if not own or (frames[0].place.file, frames[0].place.line) != (site.place.file, site.place.line):
        return None
    target = flow.nodes[node]
    method = step is None and target.op == "call_method"
    receiver = method and code.is_receiver(frames[0].span, len(target.args) + len(target.kwargs))
    at = Operand(site.place, frames[0].span, 0, receiver)
    found = at if code.operand(at) is not None else replace(at, index="input")
    return found if code.operand(found) is not None else None


def _parameters(flow: Flow, node: int) -> list[str]:
    """Weight and bias of a layer, the weight first."""
    target = flow.nodes[node]
    if target.op == "call_module":
        names = [f"{target.target}.weight", f"{target.target}.bias"]
    else:
        names = [flow.parameter(source) or "" for source in flow.inputs[node] if flow.constant[source]]
    text = flow.trace.model is None
    return [name for name in names if name and (text or gates.parameter(flow, name) is not None)]


def _owner(flow: Flow, parameter: str) -> tuple[str, str]:
    """Path and class of the module that holds the layer which a parameter is of."""
    path = parameter.rpartition(".")[0].rpartition(".")[0]
    return path, type(flow.module(path)).__qualname__


def headed(flow: Flow, sites: list[Site], options: Options) -> list[Site]:
    """The sites, where the method wants it with a zero classifier: the linear layer that the model returns."""
    own = [site for site in sites if site.verdict == "converted"]
    if not METHODS[options.method].biases or not own or flow.trace.model is None:
        return sites
    repairs: list[Repair] = []
    for output in flow.trace.root.outputs:
        node = flow.index.get(output)
        while node is not None and flow.facts[node].kind in ("layout", "dropout") and len(flow.inputs[node]) == 1:
            node = flow.inputs[node][0]
        if node is not None and flow.facts[node].kind == "linear" and has_weight(flow, node):
            repairs += [Repair(name, "zeros", owner=_owner(flow, name)) for name in _parameters(flow, node)]
    last = own[-1]
    return [replace(one, repairs=(*one.repairs, *repairs)) if one is last else one for one in sites]
