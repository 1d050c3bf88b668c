"""The recorded capture as a graph module that runs: for torch.fx pipelines of models that other tracers do not take."""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .capture.guard import substitute, untouched, weights_kept
from .capture.inputs import Inputs, resolve_inputs
from .capture.recorded import fresh_inputs, one_line, record, tensors_in
from .capture.trace import Call, Frame, Trace, origin
from .errors import ConversionError


def trace(model: nn.Module, example_inputs: Any = None, *, training: bool = False) -> fx.GraphModule:
    """A model as a torch.fx graph of the one path that it takes on the example inputs.

    The model is run once, as by `audit`, and every torch call is written down: modules of torch.nn are `call_module`
    nodes, others are inlined and noted in `node.meta["nn_module_stack"]`, so that `convert` gives the gates the names
    that they have in the model. Control flow, sizes and arguments that are no tensors are those of this run. Then the
    model and the graph are run on the inputs, and outputs and gradients compared (not on the meta device).

    Args:
        model: any `nn.Module`. It is left as it is; the graph shares its parameters, buffers and modules of torch.nn.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred.
        training: the mode of the run.

    Returns:
        The graph module. It takes the tensors among the example inputs in their order, by the names of the parameters
        they were passed by; one that was passed twice is one input. It returns what the model returns, objects and
        mappings as dicts.

    Raises:
        ConversionError: the model cannot be run on the inputs, computes with something that is no torch call, hands
            one what a graph cannot hold, or the graph does not compute what the model computes.

    Example:
        >>> import torch, rezero_convert as rz
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.fc(x) if x.shape[0] > 1 else x
        >>> graph_module = rz.trace(Block(), torch.ones(2, 4))
        >>> [str(node) for node in graph_module.graph.nodes]
        ['x', 'fc', 'add', 'output']
        >>> [name for name, _ in rz.alphas(rz.convert(graph_module, torch.ones(2, 4)))]
        ['alpha']
    """
    inputs = resolve_inputs(model, example_inputs)
    recorded = record(model, *inputs, training=training)
    graph = _runnable(recorded)
    module = fx.GraphModule(_attributes(graph, model, recorded), graph, type(model).__name__)
    _keep_persistence(module, model)
    module.train(training)
    module.graph.lint()
    if not any(tensor.is_meta for tensor in (*model.parameters(), *_tensors(inputs))):
        _check(model, module, inputs, training)
    return module


# The graph


def _runnable(recorded: Trace) -> fx.Graph:
    """The recorded graph without the nodes that stand for a tensor that another one overwrote."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    keys = _keys(recorded)
    for node in recorded.graph.nodes:
        same = node.meta.get("same_as", ())
        if len(same) > 1:
            raise _refused(node, "overwrites several tensors at once")
        if not (same and node.target is operator.setitem):
            unknown = [value for value in _values((node.args, node.kwargs)) if _UNKNOWN.fullmatch(str(value))]
            if unknown and node.op != "output":
                raise _refused(node, f"is given a {unknown[0][1:-1]}, which is no value of a graph")
            made = graph.node_copy(node, new.__getitem__)
            made.args, made.kwargs = map_aggregate(made.args, _plain), map_aggregate(made.kwargs, _plain)
            if made.op == "call_function" and getattr(made.target, "__module__", "") == torch._tensor.__name__:
                made.op, made.target = "call_method", getattr(made.target, "__name__", "")  # `x ** 2` is `x.pow(2)`
            made.meta = _meta(node, keys)
            if node.op == "placeholder":
                made.target = made.name
        new[node] = new[same[0]] if same else made
    return graph


_UNKNOWN = re.compile(r"<[\w.<>]+>")
"""What the recorder writes for an argument that fx has no form for."""


def _plain(value: Any) -> Any:
    """Numbers of NumPy as Python's: generated code can name them."""
    return value.item() if isinstance(value, (float, complex)) and hasattr(value, "item") else value


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _values(item)
    elif isinstance(value, Mapping):
        yield from _values(list(value.values()))
    elif isinstance(value, str):
        yield value


def _keys(recorded: Trace) -> dict[Call, str]:
    """A name for every module execution, as `torch.export` writes them: the path, from the second on with a number."""
    times: Counter[str] = Counter()
    keys = {}
    for call in recorded.calls:
        keys[call] = f"{call.path}@{times[call.path]}" if times[call.path] else call.path
        times[call.path] += 1
    return keys


def _meta(node: fx.Node, keys: Mapping[Call, str]) -> dict[str, Any]:
    """What other passes read at a node: its modules, its place in the source, its shape."""
    here = origin(node)
    stack: dict[str, tuple[str, Any]] = {}
    call: Call | None = here.call
    while call is not None:
        cls = type(call.module) if call.module is not None else call.cls
        stack = {keys[call]: (call.path, cls), **stack}
        call = call.parent
    meta: dict[str, Any] = {"nn_module_stack": stack} if node.op not in ("placeholder", "output") else {}
    if here.frames:
        meta["stack_trace"] = "\n".join(_line(frame) for frame in reversed(here.frames))
    if here.shape is not None and here.dtype is not None:
        meta["val"] = torch.empty(here.shape, dtype=here.dtype, device="meta")
    return meta


def _line(frame: Frame) -> str:
    return f'  File "{frame.span.file}", line {frame.span.line}, in {frame.place.qualname}'


def _refused(node: fx.Node, why: str) -> ConversionError:
    frames = origin(node).frames
    where = f"{frames[0].span.file}:{frames[0].span.line}: " if frames else ""
    return ConversionError(f"{where}{node.target} {why}: no graph that runs can be made")


# What it holds


def _attributes(graph: fx.Graph, model: nn.Module, recorded: Trace) -> dict[str, Any]:
    """The modules and tensors that the graph's nodes name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {}
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module":
            if path.startswith("<"):
                raise ConversionError(f"{path[1:-1]} is no submodule of {type(model).__name__}: not in a graph")
            found[path] = model.get_submodule(path)
        elif node.op == "get_attr":
            if path not in tensors:
                tensors[path] = _held(path, model, recorded)
            found[path] = tensors[path]
    return found


def _held(path: str, model: nn.Module, recorded: Trace) -> Tensor:
    """A tensor that is no parameter and no buffer: an attribute, or one that the run came by."""
    holder, _, name = path.rpartition(".")
    tensor = recorded.constants.get(path, model.get_submodule(holder).__dict__.get(name))
    node = next(node for node in recorded.graph.find_nodes(op="get_attr", target=path))
    if not isinstance(tensor, Tensor) or origin(node).facts.kind == "unseen":
        raise _refused(node.next, "reads a tensor that no torch call made")
    return tensor


def _keep_persistence(module: nn.Module, model: nn.Module) -> None:
    """Buffers outside of state dicts stay so; fx registers every one as persistent, also in modules that are shared."""
    names = model.state_dict(keep_vars=True)
    for path, _ in list(module.named_buffers()):
        if path not in names:
            holder, _, name = path.rpartition(".")
            module.get_submodule(holder)._non_persistent_buffers_set.add(name)


# The check


def _tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors among the inputs, each once, in the order of the placeholders."""
    args, kwargs = inputs
    return list({id(one): one for value in (*args, *kwargs.values()) for one in tensors_in(value)}.values())


def _check(model: nn.Module, module: fx.GraphModule, inputs: Inputs, training: bool) -> None:
    """Run both."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected = _outcome(model, model, inputs, weights, training)
    try:
        found = _outcome(module, module.forward, (tuple(_tensors(inputs)), {}), weights, training)  # calls print errors
    except Exception as error:  # of whatever the graph lacks
        raise ConversionError(f"the graph of {type(model).__name__} does not run: {one_line(error)}") from error
    for what, ours, theirs in zip(("outputs", "gradients"), found, expected, strict=True):
        if len(ours) != len(theirs) or not all(_same(one, other) for one, other in zip(ours, theirs, strict=True)):
            raise ConversionError(
                f"the graph of {type(model).__name__} has other {what} than the model, which does something that is no "
                "torch call, or changes how torch runs (no_grad, autocast)"
            )


def _outcome(
    model: nn.Module, run: Callable[..., Any], inputs: Inputs, weights: list[nn.Parameter], training: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The tensors of the output, and the gradients of the sum of their sizes; none where torch cannot compute them."""
    with untouched(model, training=training, gradients=True), weights_kept(model):
        substitute(model, parameter=lambda tensor: tensor, buffer=Tensor.clone, other=Tensor.clone)
        args, kwargs = fresh_inputs(inputs)
        outputs = list(tensors_in(run(*args, **kwargs)))
        parts = [one.abs().double().sum() for one in outputs if one.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        with contextlib.suppress(RuntimeError):  # models that overwrite what their own gradient needs
            if parts and weights:
                gradients = torch.autograd.grad(torch.stack(parts).sum(), weights, allow_unused=True)
        return [one.detach() for one in outputs], gradients


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal, up to the rounding of sums in another order."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    finite = other[other.isfinite()] if other.is_floating_point() else other
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * size, equal_nan=True)
