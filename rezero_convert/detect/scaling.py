"""Which parameters to scale so that a value is scaled, and nothing else: what folding a gate needs to know.

From the value upwards, through what is linear or positively homogeneous, to the last parameters. Every reader of what
would change on the way must be on the way itself.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from ..capture.facts import operation
from ..capture.trace import Trace, origin
from .flow import data_inputs

Axis = int | None
"""The dimension along which the factors differ; None for one factor."""


class Unscalable(Exception):
    """The value cannot be scaled by scaling parameters; the message is a clause that says why."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What has to be scaled."""

    parameters: dict[str, Axis]
    """By their paths from the root, with the dimension that the factors belong to."""
    positive: str
    """What holds for factors that are not negative only: the name of an activation; "" if nothing does."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Who reads what in a trace."""

    trace: Trace
    readers: dict[int, list[fx.Node]]
    """The nodes that read a parameter, by its `id`: itself as a value, and the leaf modules that hold it."""
    homes: Counter[int]
    """Under how many names a parameter is held."""
    varying: frozenset[fx.Node]
    """Computed from an input of the model, be it from its shape."""
    carrying: frozenset[fx.Node]
    """Made of parameters or inputs, not of random numbers only."""


@dataclass(slots=True)
class _Walk:
    reading: Reading
    through: frozenset[str]
    axes: dict[fx.Node, Axis] = field(default_factory=dict)
    """The nodes whose values are scaled."""
    operands: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    """Of those, the inputs that are scaled for it."""
    parameters: dict[str, Axis] = field(default_factory=dict)
    positive: str = ""


def reading(trace: Trace) -> Reading:
    """What `scaling` asks of a trace, which must be recorded of a live model."""
    assert trace.model is not None
    readers: dict[int, list[fx.Node]] = {}
    varying: set[fx.Node] = set()
    carrying: set[fx.Node] = set()
    for node in trace.graph.nodes:
        held: Iterable[nn.Parameter | None] = ()
        if node.op == "get_attr":
            held = [_parameter(trace.model, str(node.target))]
        elif node.op == "call_module" and (module := _module(trace.model, str(node.target))) is not None:
            held = module.parameters()
        for parameter in held:
            readers.setdefault(id(parameter), []).append(node)
        if node.op == "placeholder" or any(source in varying for source in node.all_input_nodes):
            varying.add(node)
        if node.op in ("placeholder", "get_attr") or any(source in carrying for source in _values(node)):
            carrying.add(node)
    homes = Counter(id(one) for module in trace.model.modules() for one in module._parameters.values())
    return Reading(trace, readers, homes, frozenset(varying), frozenset(carrying))


def _values(node: fx.Node) -> Iterable[fx.Node]:
    return () if node.op == "output" else data_inputs(node)


def products(trace: Trace, gate: str) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """Where a gate multiplies: the product, its operand, and the gate's own value there.

    Raises:
        Unscalable: the gate is read otherwise.
    """
    found = []
    stack = [node for node in trace.graph.nodes if node.op == "get_attr" and node.target == gate]
    while stack:
        value = stack.pop()
        for user in value.users:
            others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not value]
            if operation(user.target) == "mul" and len(user.all_input_nodes) == 2 and len(others) == 1:
                found.append((user, others[0], value))
            elif user.op != "output" and origin(user).facts.kind == "layout" and not others:
                stack.append(user)
            else:
                raise Unscalable(f"it is read by {_name(user)}")
    return found


def scaling(reading: Reading, ends: list[tuple[fx.Node, fx.Node, Axis]], through: frozenset[str]) -> Scaling:
    """The parameters to scale in place of each operand in its product.

    Args:
        reading: of the trace.
        ends: products of one gate, their operands, and the dimension of the operands that the gate's factors belong to.
        through: the paths of parameters that are gates themselves: what they multiply is scaled, not they.

    Raises:
        Unscalable: something on the way is not homogeneous, is read elsewhere, or has no parameter.
    """
    walk = _Walk(reading, through)
    stack = [(operand, axis) for _, operand, axis in ends]
    while stack:
        node, axis = stack.pop()
        if node in walk.axes:
            if walk.axes[node] != axis:
                raise Unscalable(f"the channels of {_name(node)} are read in two layouts")
            continue
        walk.axes[node] = axis
        sources = list(_sources(walk, node, axis))
        walk.operands[node] = tuple(source for source, _ in sources)
        stack += sources
    for product, operand, _ in ends:
        if product in walk.axes:
            raise Unscalable("it scales what it has scaled before")
        walk.operands[product] = (operand,)
    _check_readers(walk)
    return Scaling(walk.parameters, walk.positive)


def _check_readers(walk: _Walk) -> None:
    for node in walk.axes:
        for user in node.users:
            if node not in walk.operands.get(user, ()) and not _reads_form_only(user):
                raise Unscalable(f"{_name(node)} is also read by {_name(user)}")
    for path in walk.parameters:
        parameter = _parameter(_model(walk), path)
        if any(node not in walk.axes for node in walk.reading.readers[id(parameter)]):
            raise Unscalable(f"{path} is also read elsewhere")


def _reads_form_only(node: fx.Node) -> bool:
    unread = node.target is operator.getitem and not node.users  # a further result that nobody wants
    return unread or (node.op != "output" and operation(node.target) in _FORMS)


_FORMS = frozenset(
    "zeros_like ones_like empty_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor".split()
)
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d"})
_HOMOGENEOUS = frozenset({"relu", "leaky_relu"})
_SAME_PLACES = frozenset("to type_as float half bfloat16 double clone contiguous identity Identity".split())
_SUMS = frozenset({"add", "sub", "rsub", "cat", "stack"})


def _sources(walk: _Walk, node: fx.Node, axis: Axis) -> Iterator[tuple[fx.Node, Axis]]:
    """The inputs to scale so that `node` is; parameters are entered."""
    kind = origin(node).facts.kind if node.op != "output" else "other"
    if node.op == "get_attr":
        _enter(walk, str(node.target), axis)
    elif node.op == "placeholder":
        raise Unscalable("it reaches the model's input before any weight")
    elif node.op == "call_module":
        yield from _of_module(walk, node, axis, kind)
    else:
        yield from _of_function(walk, node, axis, kind)


def _of_module(walk: _Walk, node: fx.Node, axis: Axis, kind: str) -> Iterator[tuple[fx.Node, Axis]]:
    module = _module(_model(walk), str(node.target))
    if module is None:
        raise Unscalable(f"{node.target} is not a module of the model")
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unscalable(f"{node.target} has forward hooks")
    if isinstance(module, nn.MultiheadAttention):
        module = module.out_proj
        _enter_affine(walk, f"{node.target}.out_proj", module, None if axis is None else 0)
    elif isinstance(module, nn.Embedding) and module.max_norm is None:
        _enter(walk, f"{node.target}.weight", None if axis is None else _is_axis(node, axis, -1, 1))
    elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or kind == "norm":
        _enter_affine(walk, str(node.target), module, None if axis is None else _row_axis(node, module, axis))
    elif isinstance(module, _DROPOUT_MODULES) or kind == "layout":
        yield node.all_input_nodes[0], _moved(node, axis)
    elif isinstance(module, (nn.ReLU, nn.LeakyReLU)):
        walk.positive = type(module).__name__
        yield node.all_input_nodes[0], axis
    else:
        raise Unscalable(f"{_name(node)} does not pass a factor on")


def _of_function(walk: _Walk, node: fx.Node, axis: Axis, kind: str) -> Iterator[tuple[fx.Node, Axis]]:
    name = operation(node.target)
    inputs = _tensors(node)
    if name in _SUMS:
        if name not in ("cat", "stack") and len(inputs) < 2:
            raise Unscalable(f"{_name(node)} adds a number")
        if axis is not None and name in ("cat", "stack"):
            raise Unscalable("a factor per channel is not followed through a concatenation")
        yield from ((source, _broadcast(node, source, axis)) for source in inputs)
    elif name in ("mul", "div", "neg"):
        if name == "div" and (node.args[0] is not inputs[0] or inputs[0] in inputs[1:]):
            raise Unscalable(f"{_name(node)} divides by it")
        source = _factor(walk, inputs[:1] if name == "div" else inputs, node)
        yield source, _broadcast(node, source, axis)
    elif name == "getitem" and (of := inputs[0]).op == "call_module" and origin(of).facts.kind == "attention":
        if node.args[1] != 0:
            raise Unscalable("it reads attention weights")
        yield of, None if axis is None else _is_axis(node, axis, -1, axis)
    elif name in _DROPOUTS or name in _HOMOGENEOUS:
        walk.positive = name if name in _HOMOGENEOUS else walk.positive
        yield inputs[0], axis
    elif kind == "layout":
        yield inputs[0], _moved(node, axis)
    elif kind in ("linear", "norm") or name == "matmul":
        yield from _affine(node, name, axis)
    else:
        raise Unscalable(f"{_name(node)} does not pass a factor on")


_AFFINE: dict[str, tuple[int, int | None, int]] = {
    "linear": (1, 2, 0),
    "conv1d": (1, 2, 0),
    "conv2d": (1, 2, 0),
    "conv3d": (1, 2, 0),
    "addmm": (2, 0, 1),
    "matmul": (1, None, -1),
    "layer_norm": (2, 3, 0),
    "rms_norm": (2, None, 0),
    "group_norm": (2, 3, 0),
    "batch_norm": (3, 4, 0),
}
"""Functions with weight and bias: the positions of both, and the weight's dimension of output channels."""


def _affine(node: fx.Node, name: str, axis: Axis) -> Iterator[tuple[fx.Node, Axis]]:
    if name not in _AFFINE:
        raise Unscalable(f"{_name(node)} does not pass a factor on")
    weight_at, bias_at, rows = _AFFINE[name]
    weight = _argument(node, weight_at, "mat2" if name == "addmm" else "weight")
    bias = None if bias_at is None else _argument(node, bias_at, "input" if name == "addmm" else "bias")
    if weight is None or sum(arg in (weight, bias) for arg in _tensors(node)) != 1 + (bias is not None):
        raise Unscalable(f"{_name(node)} has no weight of its own")
    if axis is not None:
        last = _rank(node) - int(name[4]) - 1 if name.startswith("conv") else -1
        if name.endswith("_norm") and name not in ("layer_norm", "rms_norm"):
            last = 1
        if name in ("layer_norm", "rms_norm", "matmul") and _rank(weight) != (2 if name == "matmul" else 1):
            raise Unscalable(f"the channels of {_name(node)} are in more than one dimension")
        rows = _is_axis(node, axis, last, rows % _rank(weight))
    yield weight, None if axis is None else rows
    if bias is not None:
        yield bias, None if axis is None else _rank(bias) - 1


def _argument(node: fx.Node, position: int, name: str) -> fx.Node | None:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return value if isinstance(value, fx.Node) else None


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors among the arguments, each time that they are given."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda arg: found.append(arg))
    return found


def _factor(walk: _Walk, inputs: list[fx.Node], node: fx.Node) -> fx.Node:
    """The one factor of a product to scale: a parameter if one is there, else the one that comes from the inputs."""
    if len(inputs) != len(set(inputs)):
        raise Unscalable(f"{_name(node)} is a square")
    own = [source for source in inputs if source.op == "get_attr" and source.target not in walk.through]
    own = [source for source in own if _parameter(_model(walk), str(source.target)) is not None]
    if own:
        return own[0]
    live = [source for source in inputs if source in walk.reading.carrying]
    live = [source for source in live if source in walk.reading.varying] or live
    if len(live) != 1:
        raise Unscalable(f"{_name(node)} multiplies two values")
    return live[0]


# --- dimensions ---


def _rank(node: fx.Node) -> int:
    shape = origin(node).shape
    if shape is None:
        raise Unscalable(f"the shape of {_name(node)} is not known")
    return len(shape)


def _is_axis(node: fx.Node, axis: int, wanted: int, gives: int) -> int:
    """`gives`, if the channels are the wanted dimension of `node`."""
    if axis != wanted % _rank(node):
        raise Unscalable(f"the gate's channels are not those of {_name(node)}")
    return gives


def _row_axis(node: fx.Node, module: nn.Module, axis: int) -> int:
    """The dimension of a module's weight that makes dimension `axis` of its output."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed and module.groups != 1:
            raise Unscalable(f"{_name(node)} is a transposed convolution in groups")
        return _is_axis(node, axis, _rank(node) - len(module.kernel_size) - 1, int(module.transposed))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        raise Unscalable(f"the channels of {_name(node)} are in more than one dimension")
    return _is_axis(node, axis, -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) else 1, 0)


def _broadcast(node: fx.Node, source: fx.Node, axis: Axis) -> Axis:
    """The dimension of an operand that becomes dimension `axis` of a pointwise result."""
    if axis is None:
        return None
    own = axis - _rank(node) + _rank(source)
    shape, result = origin(source).shape, origin(node).shape
    if own < 0 or shape is None or result is None or shape[own] != result[axis]:
        raise Unscalable(f"the gate's channels are not those of {_name(source)}")
    return own


def _moved(node: fx.Node, axis: Axis) -> Axis:
    """The dimension of the input that a change of layout makes dimension `axis`."""
    if axis is None:
        return None
    name = origin(node).facts.type if node.op == "call_module" else operation(node.target)
    if name in _SAME_PLACES or name in _DROPOUTS or origin(node).facts.kind == "dropout":
        return axis
    numbers = [arg for arg in node.args[1:] if not isinstance(arg, fx.Node)]
    flat = [item for arg in numbers for item in (arg if isinstance(arg, (tuple, list)) else [arg])]
    dims = [item % _rank(node) for item in flat if isinstance(item, int)]
    if name == "permute" and len(dims) == _rank(node):
        return dims[axis]
    if name == "transpose" and len(dims) == 2:
        return {dims[0]: dims[1], dims[1]: dims[0]}.get(axis, axis)
    raise Unscalable(f"a factor per channel is not followed through {_name(node)}")


# --- parameters ---


def _enter_affine(walk: _Walk, path: str, module: nn.Module, axis: Axis) -> None:
    if module._parameters.get("weight") is None:
        raise Unscalable(f"{path} has no weight parameter of its own")
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if not {"weight", "bias"}.issuperset(names):
        raise Unscalable(f"{path} has parameters besides weight and bias")
    if getattr(module, "bias", None) is not None and "bias" not in names:
        raise Unscalable(f"{path} has no bias parameter of its own")
    for name in names:
        _enter(walk, f"{path}.{name}", None if axis is None else axis if name == "weight" else 0)


def _enter(walk: _Walk, path: str, axis: Axis) -> None:
    parameter = _parameter(_model(walk), path)
    if parameter is None:
        raise Unscalable(f"it reaches {path}, which is not a parameter")
    if path in walk.through:
        raise Unscalable(f"it reaches the gate {path}")
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
        raise Unscalable(f"{path} is not a plain floating-point parameter with values")
    if walk.reading.homes[id(parameter)] > 1:
        raise Unscalable(f"{path} is tied to another parameter")
    if walk.parameters.setdefault(path, axis) != axis:
        raise Unscalable(f"the channels of {path} are read in two layouts")


def _model(walk: _Walk) -> nn.Module:
    assert walk.reading.trace.model is not None
    return walk.reading.trace.model


def _parameter(model: nn.Module, path: str) -> nn.Parameter | None:
    holder, _, name = path.rpartition(".")
    module = _module(model, holder)
    return None if module is None else module._parameters.get(name)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    frames = origin(node).frames
    return f"{operation(node.target)} ({frames[0].span})" if frames else operation(node.target)
