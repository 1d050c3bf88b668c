"""Modules that are a norm or an activation by what they compute, whatever their name.

A module call is a *norm* when its output does not change with the scale of its input: the degree of homogeneity is
followed through its operations (x: 1, mean(x^2): 2, rsqrt of that: -1, x * rsqrt(...): 0). Llama's RMSNorm is one; the
global response norm of ConvNeXt V2, `x + gamma * (x * n(x)) + beta`, is of degree 1 and is not. It is an *activation*
when it is a chain of pointwise operations on its input alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from ..capture.facts import Facts, operation
from ..capture.trace import Call, Trace, origin
from ..plan import NormKind

POINTWISE = frozenset(
    "add sub mul div pow square sqrt rsqrt exp expm1 log log1p tanh sigmoid erf erfc relu relu6 gelu silu mish "
    "elu selu celu leaky_relu hardswish hardsigmoid hardtanh softplus softsign logsigmoid clamp clamp_min clamp_max "
    "minimum maximum min max neg abs sin cos reciprocal threshold float to type_as clone rsub".split()
)
REDUCTIONS = frozenset(
    "mean var std sum norm linalg_norm vector_norm linalg_vector_norm var_mean std_mean amax".split()
)
_KEEPS_DEGREE = frozenset(
    "mean std sum norm linalg_norm vector_norm linalg_vector_norm amax neg abs clamp clamp_min clamp_max max maximum "
    "float to type_as half bfloat16 double type clone contiguous view reshape permute transpose flatten unflatten "
    "unsqueeze squeeze expand expand_as getitem movedim chunk cat choice var_mean std_mean _to_copy alias as_strided "
    "_unsafe_view".split()
)
_NORM_FUNCTIONS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm normalize".split())


@dataclass(frozen=True, slots=True)
class Summary:
    """A module call that counts as one step from `entry` to `end`."""

    call: Call
    entry: fx.Node
    end: fx.Node
    facts: Facts


def summaries(trace: Trace, norm_types: tuple[type[nn.Module], ...] = ()) -> Iterator[Summary]:
    """The calls of custom norms and activations in a trace.

    Args:
        trace: from any capture.
        norm_types: classes that are layer-type norms by the user's word.
    """
    inside: dict[Call, list[fx.Node]] = {}
    parents = {call.parent for call in trace.calls}
    for node in trace.graph.nodes:
        if node.op != "output":
            inside.setdefault(origin(node).call, []).append(node)
    for call in trace.calls:
        told = isinstance(call.module, norm_types)
        known = told or call.facts.kind == "norm"
        if len(call.outputs) != 1 or not call.bare or not call.inputs or (call in parents and not known):
            continue
        nodes = inside.get(call, [])
        end = call.outputs[0]
        if end in call.inputs or (end not in nodes and not known):
            continue
        facts = Facts("norm", call.facts.type, norm="layer") if told else _classify(call, nodes, end)
        if facts is not None:
            yield Summary(call, call.inputs[0], end, facts)


def _classify(call: Call, nodes: list[fx.Node], end: fx.Node) -> Facts | None:
    """What the call is; None unless it is a norm or an activation."""
    if call.facts.kind == "norm" and call.module is not None:
        return replace(call.facts, fused=any(not isinstance(child, nn.Identity) for child in call.module.children()))
    if call.facts.kind in ("norm", "activation"):
        return call.facts
    work = [node for node in nodes if node.op != "get_attr"]
    if any(node.op == "call_module" for node in work) or not work:
        return None
    kind = _norm(call.inputs[0], work, end)
    if kind is not None:
        return Facts("norm", call.facts.type, norm=kind)
    if len(call.inputs) == 1 and len(work) == len(nodes) and _is_pointwise(call.inputs[0], work):
        last = operation(end.target) if len(work) == 1 else call.facts.type
        return Facts("activation", last if last in ("sigmoid", "softmax") else call.facts.type)
    return None


def _is_pointwise(entry: fx.Node, work: list[fx.Node]) -> bool:
    """Whether every node is pointwise in `entry` and something other than a change of dtype happens."""
    own = {entry, *work}
    computes = False
    for node in work:
        name = operation(node.target)
        if name not in POINTWISE or any(source not in own for source in node.all_input_nodes):
            return False
        computes = computes or name not in ("float", "to", "type_as", "clone")
    return computes


def _norm(entry: fx.Node, work: list[fx.Node], end: fx.Node) -> NormKind | None:
    """The kind of norm that `work` computes from `entry` to `end`, if it is one."""
    degrees: dict[fx.Node, float] = {entry: 1.0}
    kind: NormKind | None = None
    for node in work:
        name = operation(node.target)
        sources = [source for source in node.all_input_nodes if source in degrees]
        if not sources:
            continue
        found = degree(name, node, degrees)
        if found is None:
            return None
        degrees[node] = found
        if name in _NORM_FUNCTIONS:
            kind = origin(node).facts.norm or "layer"
        elif name in REDUCTIONS:
            kind = reduced_kind(node, entry)
    return kind if degrees.get(end) == 0 else None


def degree(name: str, node: fx.Node, degrees: dict[fx.Node, float]) -> float | None:
    """The degree of homogeneity of a node in the entry; None where the rule is not known.

    Added parameters and constants (bias, eps) do not count: the question is what the norm divides by.
    """
    args = [degrees.get(arg, 0.0) if isinstance(arg, fx.Node) else 0.0 for arg in node.args]
    known = [degrees[source] for source in node.all_input_nodes if source in degrees]
    first = args[0] if args else 0.0
    if name in _NORM_FUNCTIONS:
        return 0.0
    if name in ("mul", "matmul", "addcmul"):
        return sum(degrees.get(source, 0.0) for source in node.args if isinstance(source, fx.Node))
    if name == "div":
        return first - (args[1] if len(args) > 1 else 0.0)
    if name in ("pow", "square"):
        exponent = 2.0 if name == "square" else node.args[1] if len(node.args) > 1 else None
        return first * exponent if isinstance(exponent, (int, float)) else None
    if name in ("sqrt", "rsqrt", "reciprocal", "var"):
        return first * {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "var": 2.0}[name]
    if name in ("type_as", "to", "expand_as"):
        return first
    if name == "getitem" and node.args[1] == 0 and operation(getattr(node.args[0], "target", "")) == "var_mean":
        return first * 2
    if name in ("add", "sub") or name in _KEEPS_DEGREE:
        return known[0] if len(set(known)) == 1 else None
    return None


def reduced_kind(node: fx.Node, entry: fx.Node) -> NormKind:
    """The kind of a written-out norm by the dimensions that its statistics go over."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    listed = dims if isinstance(dims, (tuple, list)) else (dims,)
    shape = origin(entry).shape
    if 0 in listed:
        return "batch"
    if shape is not None and len(shape) == 4 and set(listed) in ({2, 3}, {-1, -2}):
        return "instance"
    return "layer"
