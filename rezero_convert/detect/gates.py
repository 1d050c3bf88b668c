"""What scales a branch already: learnable gates, constants, gates computed from the input, zero-initialised layers."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from .. import sources
from ..capture.trace import Call
from ..plan import Repair, RepairKind
from ..zeroing import zeroes
from . import code
from .blocks import Branch, has_weight
from .flow import Flow
from .patterns import POINTWISE
from .sums import weight

_ZERO_AT_ZERO = frozenset({"tanh", "sin", "neg", "relu"})
_ZERO_ACTIVATIONS = _ZERO_AT_ZERO | frozenset(
    "relu6 leaky_relu leakyrelu gelu silu mish elu selu celu hardswish".split()
)
_GATE_STEPS = frozenset({"mul", "div"})
_ZERO_OF_ZEROS = frozenset("add sub cat stack sum mean abs square matmul mm bmm einsum".split())
_WEIGHT_AND_BIAS = {
    "batch_norm": ("weight", 3, "bias", 4),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), ("weight", 2, "bias", 3)),
    "addmm": ("mat2", 2, "input", 0),
    "baddbmm": ("batch2", 2, "input", 0),
}
"""Where functional layers take their weight and bias, by name and position; the others second and third."""


@dataclass(frozen=True, slots=True)
class Found:
    """A gate at the end of a branch."""

    kind: Literal["scalar", "channel", "input", "offset"]
    """scalar and channel: a parameter. input: computed from the input by a layer that is zero now (adaLN-Zero).
    offset: computed from a parameter that is not zero, as in `1 + gamma`, and zero now."""
    parameter: str
    """Path of the parameter, or of the layer that computes the gate."""
    node: int
    """The multiplication."""
    zero: bool | None
    """Whether it is zero now; None where values are not known."""
    root: int = -1
    """The parameter's node; -1 for a gate that is not the parameter itself."""
    conditional: bool = False
    """Made by the class under a condition only (known on the static route)."""


def existing(flow: Flow, branch: Branch) -> Found | None:
    """The learnable gate that a branch ends in: LayerScale, SkipInit, `gamma * F(x)`.

    Looked for upwards from the sum, through dropout, changes of layout and constant factors; in `torch.lerp(x, f, w)`,
    upwards from the weight.
    """
    add = branch.term.add
    if flow.name(add) != "lerp":
        return _above(flow, branch.term.value, branch)
    scale = weight(flow, add)
    found = None if scale is None else _gate(flow, add, scale, branch) or _above(flow, scale, branch)
    return None if found is None else replace(found, node=add)


def _above(flow: Flow, node: int | None, branch: Branch) -> Found | None:
    """The gate among the factors of a value."""
    while node is not None and node > branch.region[0]:
        if flow.name(node) in _GATE_STEPS and node not in flow.steps:
            for factor in flow.inputs[node]:
                found = _gate(flow, node, factor, branch)
                if found is not None:
                    return found
        node = _same_scale(flow, node)
    return None


def last_norm(flow: Flow, branch: Branch) -> Found | None:
    """The norm that a branch ends in, at most under dropout or another layout, as the gate that its weight is."""
    node = branch.term.value
    while flow.facts[node].kind in ("layout", "dropout") and len(flow.inputs[node]) == 1:
        node = flow.inputs[node][0]
    if flow.facts[node].kind != "norm" or flow.facts[node].fused or node <= branch.region[0]:
        return None
    if node in flow.steps or flow.nodes[node].op == "call_module":
        path = f"{flow.steps[node].path if node in flow.steps else flow.nodes[node].target}.weight"
    else:
        given = flow.nodes[node].kwargs.get("weight")
        sources = [given] if isinstance(given, fx.Node) else flow.nodes[node].all_input_nodes
        paths = [flow.parameter(flow.index[source]) or "" for source in sources]
        # every signature names the weight before the bias
        path = next((one for one in paths if one and isinstance(parameter(flow, one), nn.Parameter)), "")
    value = parameter(flow, path) if path else None
    if not path or (flow.trace.model is not None and not isinstance(value, nn.Parameter)):
        return None
    return Found("channel", path, node, is_zero(value) or _starts_at_zero(flow, node, path))


def _starts_at_zero(flow: Flow, node: int, path: str) -> bool:
    """Whether the class that calls a norm has set its weight to zero, as far as text tells."""
    frames = flow.steps[node].frames if node in flow.steps else flow.origin(node).frames
    if flow.trace.model is not None or not frames or frames[0].owner is None:
        return False
    name = path.removeprefix(f"{frames[0].owner}." if frames[0].owner else "")
    return code.is_zeroed_by(frames[0].place.file, frames[0].place.cls, name)


def _same_scale(flow: Flow, node: int) -> int | None:
    """The value that `node` passes on up to a constant factor, dropout or layout."""
    sources = [source for source in flow.inputs[node] if not flow.constant[source]]
    if flow.name(node) == "choice" and sources:
        return max(sources)
    steps = flow.name(node) in _GATE_STEPS or flow.facts[node].kind in ("layout", "dropout")
    return sources[0] if len(sources) == 1 and steps else None


def _gate(flow: Flow, product: int, factor: int, branch: Branch) -> Found | None:
    """The gate that `factor` is in `product`, if it is one."""
    if flow.constant[factor]:
        roots = _parameters(flow, factor)
        if len(roots) != 1:
            return None
        if not _vanishes_with(flow, factor, roots[0]):
            path = flow.parameter(roots[0]) or ""
            return Found("offset", path, product, True) if is_zero(_value(flow, factor)) else None
        path = flow.parameter(roots[0]) or ""
        value = parameter(flow, path)
        if flow.trace.model is not None and not isinstance(value, nn.Parameter):
            return None
        shape, written = flow.shape(roots[0]), None
        if shape is None:
            shape, written = _as_written(flow.nodes[roots[0]].meta.get("constructor", ""))
        numel = None if shape is None else torch.Size(shape).numel()
        if numel is not None and shape is not None and numel > max(shape, default=1):
            return None  # a matrix of weights, not a gate
        zero = is_zero(value) if value is not None else written
        return Found(
            "scalar" if numel == 1 else "channel",
            path,
            product,
            zero,
            roots[0],
            _is_conditional(flow, product, roots[0]),
        )
    layer = _computing_layer(flow, factor)
    if layer is None or layer in branch.cuts:  # crossed by all of the branch: its last layer
        return None
    return Found("input", str(flow.nodes[layer].target), product, True)


def _as_written(constructor: str) -> tuple[tuple[int, ...] | None, bool | None]:
    """Shape and zeroness of a parameter by the text of its start value, each None where that does not tell."""
    try:
        call = ast.parse(constructor.strip(), mode="eval").body
    except SyntaxError:
        return None, None
    if not isinstance(call, ast.Call):
        return None, None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "tensor" and call.args:
        value = _literal(call.args[0])
        return ((), value == 0) if isinstance(value, (int, float)) else (None, None)
    if name not in ("zeros", "ones", "full"):
        return None, None
    sizes = _literal(call.args[0]) if len(call.args) == 1 or name == "full" else tuple(map(_literal, call.args))
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    known = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) for size in sizes)
    fill = {"zeros": 0, "ones": 1}.get(name, _literal(call.args[1]) if len(call.args) > 1 else None)
    return tuple(sizes) if known else None, fill == 0 if isinstance(fill, (int, float)) else None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _is_conditional(flow: Flow, product: int, root: int) -> bool:
    call: Call | None = flow.origin(product).call
    while call is not None and call.parent is not None:
        if call.facts.optional:
            return True
        call = call.parent
    return bool(flow.nodes[root].meta.get("conditional"))


def _parameters(flow: Flow, node: int) -> list[int]:
    """The parameters and buffers that a constant value is computed from."""
    found, seen, stack = [], {node}, [node]
    while stack:
        here = stack.pop()
        if flow.nodes[here].op == "get_attr":
            found.append(here)
        for source in flow.inputs[here]:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return found


def _paths(flow: Flow, node: int) -> list[str]:
    return [flow.parameter(root) or "" for root in _parameters(flow, node)]


def _vanishes_with(flow: Flow, node: int, root: int) -> bool:
    """Whether a value computed from one parameter is zero when that is."""
    while node != root:
        sources = flow.inputs[node]
        if len(sources) != 1 or not (
            flow.facts[node].kind == "layout" or flow.name(node) in _GATE_STEPS | _ZERO_AT_ZERO
        ):
            return False
        node = sources[0]
    return True


def _value(flow: Flow, node: int) -> torch.Tensor | None:
    """What pointwise operations and products make of live parameters now; None if that cannot be said."""
    target = flow.nodes[node]
    if target.op == "get_attr":
        value = parameter(flow, str(target.target))
        return None if value is None or value.is_meta else value.detach().clone()
    known = flow.name(node) in POINTWISE or flow.name(node) in ("matmul", "mm") or flow.facts[node].kind == "layout"
    if target.op == "call_module" or not known:
        return None
    sources = {source: _value(flow, flow.index[source]) for source in target.all_input_nodes}
    if any(value is None for value in sources.values()):
        return None
    args, kwargs = fx.node.map_arg((target.args, target.kwargs), sources.__getitem__)
    compute = getattr(torch.Tensor, target.target) if isinstance(target.target, str) else target.target
    try:
        result = compute(*args, **kwargs)
    except (TypeError, RuntimeError):  # the trace of a text does not hold all arguments
        if not flow.trace.route.startswith("static"):
            raise
        return None
    return result if isinstance(result, torch.Tensor) else None


def _computing_layer(flow: Flow, node: int) -> int | None:
    """The linear layer, zero in all parameters now, or by the file's text, whose output `node` is a part of."""
    while True:
        if flow.facts[node].kind == "linear" and flow.nodes[node].op == "call_module":
            path, frames = str(flow.nodes[node].target), flow.origin(node).frames
            if flow.trace.model is None:
                return node if frames and _is_written_zero(flow, node, path, "linear") else None
            module = flow.module(path)
            parameters: list[object] = [] if module is None else list(module.parameters(recurse=False))
            parameters += [getattr(module, name) for name in getattr(module, "parametrizations", ())]
            return node if parameters and all(is_zero(value) for value in parameters) else None
        sources = flow.inputs[node]
        if len(sources) != 1 or flow.facts[node].kind != "layout":
            return None
        node = sources[0]


def repairs(flow: Flow, branch: Branch) -> Iterator[Repair]:
    """The zero-initialised layers that make a branch zero as a whole, with what undoes that.

    Only layers that every path of the branch crosses count, and those that make a factor of it (xLSTM's SwiGLU).
    """
    factors = [layer for node in branch.cuts if flow.name(node) == "mul" for layer in _factors(flow, node, branch)]
    for node in (*branch.cuts, *factors):
        target = flow.nodes[node]
        if flow.trace.model is None:
            yield from _written_repairs(flow, node)
        elif node in flow.steps or target.op == "call_module":
            path = flow.steps[node].path if node in flow.steps else str(target.target)
            yield from _layer_repairs(flow, path, flow.facts[node].kind)
        elif flow.facts[node].kind in ("linear", "norm") or has_weight(flow, node):
            yield from _function_repairs(flow, node)


def _factors(flow: Flow, product: int, branch: Branch) -> Iterator[int]:
    """The layers of the branch whose outputs are factors of a product, perhaps through activations that keep a zero."""
    for node in flow.inputs[product]:
        while node in branch.region[1:] and _keeps_zero(flow, node):
            (node,) = flow.inputs[node]
        if node in branch.region[1:] and node not in branch.cuts and has_weight(flow, node):
            yield node


def _keeps_zero(flow: Flow, node: int) -> bool:
    return len(flow.inputs[node]) == 1 and _passes_zero(flow, node)


def _passes_zero(flow: Flow, node: int) -> bool:
    return flow.facts[node].kind in ("layout", "dropout") or flow.name(node).lower() in _ZERO_ACTIVATIONS


def _written_repairs(flow: Flow, node: int) -> Iterator[Repair]:
    """A layer that some statement of the file fills with zeros, perhaps under a condition."""
    kind, frames = flow.facts[node].kind, flow.origin(node).frames
    bare = _written_parameter(flow, node) if frames and has_weight(flow, node) else ""
    if bare:
        yield Repair(bare, "reset", certain=False, owner=_owner(flow, bare, frames[0].span.file))
        return
    if kind not in ("norm", "linear") or not frames or flow.nodes[node].op == "get_attr":
        return
    path = flow.steps[node].path if node in flow.steps else str(flow.nodes[node].target)
    if node not in flow.steps and flow.nodes[node].op != "call_module":
        weight = _weight_of(flow, node)
        path = (
            next((flow.parameter(root) or "" for root in _parameters(flow, weight)), "") if weight is not None else ""
        )
        path = path.removesuffix(".weight")
    if path and _is_written_zero(flow, node, path, kind):
        undone: RepairKind = "ones" if kind == "norm" else "unwrap" if _is_wrapped(flow, node) else "reset"
        owner = _owner(flow, path, frames[0].span.file)
        yield Repair(f"{path}.weight", undone, certain=False, owner=owner)


def _owner(flow: Flow, path: str, file: str) -> tuple[str, str] | None:
    """Path and class of the innermost module of the file that holds a layer or parameter, the root aside."""
    holders = [call for call in flow.trace.calls if call.path and path.startswith(f"{call.path}.")]
    here = [call for call in holders if sources.class_of(file, call.cls) is not None]
    within = max(here, key=lambda call: len(call.path), default=None)
    return None if within is None else (within.path, within.cls)


def _written_parameter(flow: Flow, node: int) -> str:
    """The path of the parameter that a value is multiplied by, if its class makes it zero by the text; else ""."""
    weight = _weight_of(flow, node) if flow.nodes[node].op != "call_module" and node not in flow.steps else None
    roots = _parameters(flow, weight) if weight is not None else []
    if weight is None or len(roots) != 1 or not _vanishes_with(flow, weight, roots[0]):
        return ""
    frame, path = flow.origin(node).frames[-1], flow.parameter(roots[0]) or ""
    name = path.removeprefix(f"{frame.owner}." if frame.owner else "")
    made = _as_written(flow.nodes[roots[0]].meta.get("constructor", ""))[1]
    again = any(other.endswith(name) and not zero for other, zero in code.filled(frame.place.file))
    zero = (made and not again) or code.is_zeroed_by(frame.place.file, frame.place.cls, name)
    return path if zero and "." not in name else ""


def _is_wrapped(flow: Flow, node: int) -> bool:
    """Whether a layer comes from a function that fills it with zeros: `zero_module(nn.Conv2d(8, 8, 3))`."""
    return any(map(zeroes, flow.nodes[node].meta.get("through", ())))


def _is_written_zero(flow: Flow, node: int, path: str, kind: str) -> bool:
    """Whether the file fills a layer with zeros, by the layer's last name: in the constructor of what holds it."""
    if kind == "linear" and _is_wrapped(flow, node):
        return True
    file, name = flow.origin(node).frames[0].span.file, path.rpartition(".")[2]
    if not (code.is_zeroed(file, f"{path}.weight") or code.is_zeroed(file, f"{name}.weight")):
        return False
    others = [str(one.target) for one in flow.nodes if one.op == "call_module" and str(one.target) != path]
    around = path.rpartition(".")[0]
    if name.isdigit() and f"{path}.weight" not in code.zeroed(file):  # by an index from the end: the last layer
        later = (one.rpartition(".") for one in others)
        if any(holder == around and last.isdigit() and int(last) > int(name) for holder, _, last in later):
            return False
    bare = kind == "norm" or code.has_no_bias(flow.nodes[node].meta.get("constructor", ""))
    bare = bare or (flow.nodes[node].op != "call_module" and node not in flow.steps)  # `_weight_of` has seen to it
    return bare or code.is_zeroed(file, f"{path}.bias") or code.is_zeroed(file, f"{name}.bias")


def _layer_repairs(flow: Flow, path: str, kind: str) -> Iterator[Repair]:
    module = flow.module(path)
    if module is None or kind not in ("norm", "linear", "attention"):
        return
    last = getattr(module, "out_proj", module) if kind == "attention" else module
    name = f"{path}.out_proj" if last is not module else path
    weight, bias = getattr(last, "weight", None), getattr(last, "bias", None)
    if is_zero(weight) and (bias is None or is_zero(bias)):
        yield Repair(f"{name}.weight", "ones" if kind == "norm" else "reset")


def _function_repairs(flow: Flow, node: int) -> Iterator[Repair]:
    """A functional layer or a product with a matrix, which is a zero parameter or computed as a product with one
    (NF-ResNet's `gain`)."""
    weight = _weight_of(flow, node)
    roots = _parameters(flow, weight) if weight is not None else []
    values = {root: parameter(flow, flow.parameter(root) or "") for root in roots}
    zero = [root for root, value in values.items() if isinstance(value, nn.Parameter) and is_zero(value)]
    now = _value(flow, weight) if weight is not None and zero else None
    if weight is None or not (now is None or is_zero(now)):
        return
    layer = flow.facts[node].kind in ("linear", "norm")
    for root in zero:
        alone = _vanishes_with(flow, weight, root)
        if alone or layer:
            how: RepairKind = "reset" if alone and flow.facts[node].kind != "norm" else "ones"
            yield Repair(flow.parameter(root) or "", how)


def _weight_of(flow: Flow, node: int) -> int | None:
    """The constant operand that a functional layer or a matrix product multiplies by, if nothing is added to that."""
    target = flow.nodes[node]
    if flow.facts[node].kind not in ("linear", "norm"):
        weights = [source for source in flow.inputs[node] if flow.constant[source]]
        return weights[0] if len(weights) == 1 else None
    name, place, other, behind = _WEIGHT_AND_BIAS.get(flow.name(node), ("weight", 1, "bias", 2))
    given = [
        target.kwargs.get(key) or (target.args[position] if len(target.args) > position else None)
        for key, position in ((name, place), (other, behind))
    ]
    weight, bias = (flow.index[value] if isinstance(value, fx.Node) else None for value in given)
    if bias is not None and not all(
        is_zero(parameter(flow, flow.parameter(root) or "")) for root in _parameters(flow, bias)
    ):
        return None
    return weight if weight is not None and _holds_values_of_weights(flow, weight) else None


def _holds_values_of_weights(flow: Flow, node: int) -> bool:
    """Whether a value is constant, be it of a type that the stream decides: `self.weight.type_as(x)`."""
    sources = flow.inputs[node]
    return flow.constant[node] or (bool(sources) and all(_holds_values_of_weights(flow, one) for one in sources))


def held_at_zero(flow: Flow, branch: Branch, repaired: Collection[str]) -> str | None:
    """What makes a branch zero for good, as a reader knows it; None if nothing is known to.

    Args:
        branch: one whose gate is not zero.
        repaired: the parameters that will be zero no longer.
    """
    zero: dict[int, str] = {}
    for node in branch.region[1:]:
        cause = _held(flow, node, zero, repaired)
        if cause is not None:
            zero[node] = cause
    return zero.get(branch.term.value)


def _held(flow: Flow, node: int, zero: dict[int, str], repaired: Collection[str]) -> str | None:
    """What makes a value zero, given the values before it that are."""
    target, inputs = flow.nodes[node], flow.inputs[node]
    moving = [source for source in inputs if not flow.constant[source]]
    if _computing_layer(flow, node) == node and f"{target.target}.weight" not in repaired:
        return str(target.target)
    if target.op == "call_module" or node in flow.steps:
        return zero.get(moving[0]) if len(moving) == 1 and _passes_zero(flow, node) else None
    product = flow.name(node) == "mul" or has_weight(flow, node)
    if flow.name(node) == "mul" and 0 in [arg for arg in target.args if isinstance(arg, (int, float))]:
        return "the factor 0"
    layer = flow.facts[node].kind in ("linear", "norm")
    weight = _weight_of(flow, node) if layer else None
    factors = inputs if product and not layer else () if weight is None else (weight,)
    for source in factors:
        paths = _paths(flow, source) if flow.constant[source] and _is_zero_now(flow, source) else []
        if source in zero or (paths and not set(paths) & set(repaired)):
            return zero.get(source, ", ".join(paths))
    if not moving or not (_passes_zero(flow, node) or flow.name(node) in _ZERO_OF_ZEROS):
        return None
    held = all(source in zero or (flow.constant[source] and _is_zero_now(flow, source)) for source in inputs)
    return zero[moving[0]] if held else None


def _is_zero_now(flow: Flow, node: int) -> bool:
    """Whether a constant is zero now. What is computed from matrices is looked at only if one of them is zero."""
    roots = [parameter(flow, path) for path in _paths(flow, node)]
    matrices = any(value is not None and value.numel() > max(value.shape, default=1) for value in roots)
    return (any(map(is_zero, roots)) or not matrices) and is_zero(_value(flow, node))


def is_zero(value: object) -> bool:
    """Whether a tensor with values is all zeros; reads the whole only when its beginning is."""
    if not isinstance(value, torch.Tensor) or value.is_meta or not value.numel():
        return False
    with torch.no_grad():
        return not bool(value.detach().flatten()[:8].any()) and not bool(value.detach().any())


def parameter(flow: Flow, path: str) -> torch.Tensor | None:
    """The live parameter or buffer at a path, None on the static route."""
    module = flow.module(path.rpartition(".")[0])
    value = getattr(module, path.rpartition(".")[2], None) if module is not None else None
    return value if isinstance(value, torch.Tensor) else None
