"""Carry a Plan out on the graph of a `torch.fx.GraphModule`: the same edits as in text, on nodes."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from .. import sources
from ..capture.facts import of_function, operation
from ..capture.graphs import graph_modules, text_of
from ..errors import ConversionError
from ..plan import WHOLE, Gate, Move, Norm, Operand, Place, Scale, Site, SkipGate
from .changes import RECORDS

Home = Callable[[Place, str], str | None]
_HALF = (torch.float16, torch.bfloat16)


def homes(model: nn.Module) -> Home:
    """What gives, for a place in generated code and a module path, the path of the graph module whose code that is.

    None for any other text. The code of a copy of the module counts as the module's.
    """
    modules = graph_modules(model)

    @functools.cache
    def of_file(file: str) -> tuple[str, ...]:
        own = {path: text_of(module).file for path, module in modules.items()}
        text = sources.text(file) if sources.has_text(file) else None
        return tuple(path for path, mine in own.items() if file == mine or (text and text == sources.text(mine)))

    def home(place: Place, path: str) -> str | None:
        found = of_file(place.file) if modules else ()
        return max((at for at in found if not at or f"{path}.".startswith(f"{at}.")), key=len, default=None)

    return home


def edited(model: nn.Module, path: str, module: fx.GraphModule, sites: Iterable[Site]) -> fx.Graph:
    """A copy of a graph module's graph with the edits of `sites`; the module is not changed.

    Args:
        model: the whole model.
        path: of the graph module in the model.
        module: the graph module.
        sites: with the gates, norms and activations whose code is the module's own.

    Raises:
        ConversionError: a node that is to be edited is not there.
    """
    return _Editor(model, path, module).carry_out(list(sites))


class _Editor:
    """The editing of one graph."""

    def __init__(self, model: nn.Module, path: str, module: fx.GraphModule) -> None:
        self.model = model
        self.path = path
        self.graph: fx.Graph = copy.deepcopy(module.graph)
        self.named = {node.name: node for node in self.graph.nodes}
        self.inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        self.lines = {line: self.named[node.name] for line, node in text_of(module).nodes.items()}
        self.attributes: dict[str, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            self.attributes.setdefault(str(node.target), []).append(node)
        self.replaced: dict[fx.Node, fx.Node] = {}

    def carry_out(self, sites: list[Site]) -> fx.Graph:
        for site in sites:
            for gate in site.gates:
                if gate.at is not None:
                    self.gate(site, gate, gate.at)
            for shift in site.shifts:
                self.shift(site, shift)
            if site.skip_gate is not None:
                self.skip(site, site.skip_gate)
            if site.move is not None:
                self.move(site.move)
            if site.activation is not None and site.activation.action == "move":
                self.drop(self.node(site.activation.at), self.value(site.activation.at))
        for norm in dict.fromkeys(norm for site in sites for norm in site.norms):
            assert norm.at is not None
            self.bypass(norm, norm.at)
            if norm.bias:
                self.bias(self.below(norm.bias))
        self.clean()
        self.forget({self.below(norm.path) for site in sites for norm in site.norms if norm.path})
        self.graph.lint()
        return self.graph

    def below(self, path: str) -> str:
        """A module path from the graph module."""
        return path.removeprefix(self.path).lstrip(".")

    def node(self, at: Operand) -> fx.Node:
        node: fx.Node | None = self.lines.get(at.span.line)
        if node is None:
            raise ConversionError(f"{at.span}: the graph of {self.path or 'the model'} has no node for this line")
        return node

    def operand(self, at: Operand) -> Any:
        """A node, or the number that `lerp` weighs by."""
        node = self.node(at)
        found = node.kwargs.get(at.index) if isinstance(at.index, str) else node.args[at.index]
        if isinstance(at.index, str) and found is None:
            found = self.named.get(at.index) or self.inputs.get(at.index)
        if found is None:
            raise ConversionError(f"{at.span}: {node.format_node()} has no operand {at.index}")
        return found

    def value(self, at: Operand) -> fx.Node:
        """The node of an operand."""
        found = self.operand(at)
        if not isinstance(found, fx.Node):
            raise ConversionError(f"{at.span}: operand {at.index} of {self.node(at).format_node()} is no tensor")
        return found

    def gate(self, site: Site, gate: Gate, at: Operand) -> None:
        """Scale an operand, with the activation of the sum on it if that moves."""
        node, branch = self.node(at), self.operand(at)
        if isinstance(branch, fx.Node) and _overwrites(node, branch):  # who reads it afterwards reads the sum
            branch.replace_all_uses_with(node, delete_user_cb=lambda user: node < user)
        if node.target is torch.ops.aten.lerp.Scalar:
            node.target = torch.ops.aten.lerp.Tensor
        moved = site.activation if site.activation is not None and site.activation.action == "move" else None
        with self.graph.inserting_before(node):
            scaled = branch
            if moved is not None:
                scaled = self.applied(self.node(moved.at), self.value(moved.at), branch)
            if gate.carries is not None:
                scaled = self.carried(node, scaled, self.value(gate.carries), self.parameter(site, gate.alpha))
            elif not gate.existing:
                scaled = self.scaled(node, scaled, self.parameter(site, gate.alpha), gate.scale)
        self.update(node, at, scaled)

    def carried(self, node: fx.Node, branch: Any, skip: fx.Node, layer: str) -> fx.Node:
        """`sigmoid(layer(skip)) * (branch - skip)`; `node` is the sum."""
        ops, aten = torch.ops.aten, isinstance(node.target, OpOverload)
        computed = self.graph.create_node("call_module", layer, (skip,))
        gate = self.graph.call_function(ops.sigmoid.default if aten else torch.sigmoid, (computed,))
        less = self.graph.call_function(ops.sub.Tensor if aten else operator.sub, (branch, skip))
        made = self.graph.call_function(ops.mul.Tensor if aten else operator.mul, (gate, less))
        for one in (computed, gate, less, made):
            one.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
            one.meta.update({key: skip.meta[key] for key in _VALUE if key in skip.meta})
        return made

    def applied(self, active: fx.Node, whole: fx.Node, branch: Any) -> Any:
        """Once more what an activation computes, in one node or several, of `branch` instead of `whole`."""
        copies: dict[fx.Node, Any] = {whole: branch}

        def copied(node: fx.Node) -> Any:
            if node not in copies:
                anew = node > whole or node.op == "get_attr"
                for source in node.all_input_nodes if anew else ():
                    copied(source)
                copies[node] = self.graph.node_copy(node, copies.__getitem__) if anew else node
            return copies[node]

        return copied(active)

    def move(self, move: Move) -> None:
        """Normalize something else: the result of a node, or what one or several nodes read."""
        norm, entry = self.node(move.at), self.value(move.at)
        places = [self.node(at) for at in move.to]
        first = min(places)
        if move.to[0].index == WHOLE:
            readers = list(first.users)
            with self.graph.inserting_before(first.next):
                made = self.applied(norm, entry, first)
            first.replace_all_uses_with(made, delete_user_cb=readers.__contains__)
        else:
            with self.graph.inserting_before(first):
                made = self.applied(norm, entry, self.value(move.to[0]))
            for node, at in zip(places, move.to, strict=True):
                self.update(node, at, made)
        self.drop(norm, entry)

    def skip(self, site: Site, gate: SkipGate) -> None:
        """Scale the skip, by a constant or by what a gate leaves."""
        node, stream = self.node(gate.at), self.value(gate.at)
        with self.graph.inserting_before(node):
            alpha = self.parameter(site, gate.alpha) if gate.alpha else ""
            self.update(node, gate.at, self.scaled(node, stream, alpha, gate.scale))

    def shift(self, site: Site, gate: Gate) -> None:
        """Add a number to what a layer reads."""
        assert gate.at is not None
        node, stream = self.node(gate.at), self.value(gate.at)
        aten = isinstance(node.target, OpOverload)
        with self.graph.inserting_before(node):
            bias = self.graph.get_attr(self.parameter(site, gate.alpha))
            made = self.graph.call_function(torch.ops.aten.add.Tensor if aten else operator.add, (stream, bias))
        made.meta.update({key: stream.meta[key] for key in _VALUE if key in stream.meta})
        for one in (bias, made):
            one.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
        self.update(node, gate.at, made)

    def parameter(self, site: Site, alpha: str) -> str:
        relative = self.below(site.path)
        return f"{relative}.{alpha}" if relative else alpha

    def update(self, node: fx.Node, at: Operand, value: fx.Node) -> None:
        if isinstance(at.index, str):
            node.update_kwarg(at.index, value)
        else:
            node.update_arg(at.index, value)

    def scale(self, alpha: str, scale: Scale, aten: bool) -> Iterator[Any]:
        """The nodes of `factor * map(alpha)`, the last one its value; a number if there is no alpha."""
        if not alpha:
            yield scale.factor
            return
        value = self.graph.get_attr(alpha)
        yield value
        ops = torch.ops.aten
        if scale.trailing:
            sizes = [-1, *[1] * scale.trailing]
            view = ops.view.default if aten else torch.Tensor.view
            value = self.graph.call_function(view, (value, sizes))
            yield value
        if scale.map == "relu":
            value = self.graph.call_function(ops.relu.default if aten else torch.relu, (value,))
            yield value
        elif scale.map == "complement":
            value = self.graph.call_function(ops.rsub.Scalar if aten else torch.rsub, (value, 1))
            yield value
        if scale.factor != 1.0:
            value = self.graph.call_function(ops.mul.Tensor if aten else operator.mul, (value, scale.factor))
            yield value

    def scaled(self, node: fx.Node, branch: Any, alpha: str, scale: Scale) -> Any:
        """`factor * map(alpha) * branch`, in the branch's dtype; `node` is the sum."""
        aten = isinstance(node.target, OpOverload)
        dtype = _dtype(branch) if isinstance(branch, fx.Node) and alpha else None
        made: list[Any] = list(self.scale(alpha, scale, aten))
        if dtype in _HALF:
            made.append(self._cast(made[-1], torch.float32, aten))
        factors = (made[-1], branch) if alpha else (branch, made[-1])
        made.append(self.graph.call_function(torch.ops.aten.mul.Tensor if aten else operator.mul, factors))
        if dtype in _HALF:
            made.append(self._cast(made[-1], dtype, aten))
        for one in made if alpha else made[1:]:
            one.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
        valued = made[-1:] if dtype not in _HALF else made[-2:]
        for one in valued if isinstance(branch, fx.Node) else ():
            one.meta.update({key: branch.meta[key] for key in _VALUE if key in branch.meta})
        return made[-1]

    def _cast(self, node: fx.Node, dtype: torch.dtype, aten: bool) -> fx.Node:
        if aten:
            return self.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        return self.graph.call_method("to", (node, dtype))

    def bypass(self, norm: Norm, at: Operand) -> None:
        """Give the readers of a norm what it normalizes."""
        node, entry = self.node(at), self.value(at)
        if isinstance(node.target, OpOverload) and norm.kind == "layer":
            with self.graph.inserting_before(node):  # its result was contiguous, whatever it was given
                entry = self.graph.call_function(torch.ops.aten.contiguous.default, (entry,))
            entry.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
            entry.meta.update({key: self.value(at).meta[key] for key in _VALUE if key in self.value(at).meta})
        parts = [user for user in node.users if user.target is operator.getitem] if _gives_several(node) else []
        for part in parts:
            if part.args[1] == 0:
                self.drop(part, entry)
            elif not part.users:
                self.graph.erase_node(part)
        if not parts:
            self.drop(node, entry)

    def bias(self, layer: str) -> None:
        """Have a written-out layer read the bias that its module gets; a module's own call does without."""
        name = f"{layer}_bias" if layer in self.attributes else f"{layer}.bias"
        for weight in self.attributes.get(layer, self.attributes.get(f"{layer}.weight", ())):
            for node in list(weight.users):
                with self.graph.inserting_before(node):
                    made = self.graph.get_attr(name)
                made.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
                if len(node.args) > 2:
                    node.update_arg(2, made)
                elif "bias" in node.kwargs:
                    node.update_kwarg("bias", made)
                else:
                    node.args = (*node.args, made)

    def forget(self, paths: set[str]) -> None:
        """Erase what still reads the parameters of norms that went: a count of batches that nobody reads."""
        for target, nodes in self.attributes.items():
            if paths.isdisjoint(itertools.accumulate(target.split("."), "{}.{}".format)):
                continue
            for node in nodes:
                for user in list(node.users):
                    if not user.users:
                        self.graph.erase_node(user)
                if not node.users and not node._erased:
                    self.graph.erase_node(node)

    def drop(self, node: fx.Node, instead: fx.Node) -> None:
        while instead in self.replaced:
            instead = self.replaced[instead]
        node.replace_all_uses_with(instead)
        self.replaced[node] = instead

    def clean(self) -> None:
        """Erase what went, and what only it had needed."""
        waiting = list(self.replaced)
        while waiting:
            node = waiting.pop()
            for user in list(node.users) if not node._erased else ():
                if not user.users and operation(user.target) in ("alias", "detach"):  # left behind by make_fx
                    self.graph.erase_node(user)
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            sources_of = node.all_input_nodes
            self.graph.erase_node(node)
            waiting += sources_of


def _gives_several(node: fx.Node) -> bool:
    """Whether an operation returns a tuple, with statistics beside the result: `x[0]` of a tensor is another thing."""
    if isinstance(node.target, OpOverload):
        return len(node.target._schema.returns) > 1
    return node.op == "call_function" and operation(node.target).lstrip("_").startswith(("native_", "fused_rms_norm"))


_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack")
_VALUE = ("val", "tensor_meta", "example_value")


def _overwrites(node: fx.Node, value: fx.Node) -> bool:
    """Whether an operation leaves its result in one of its operands: `value.add_(other)`."""
    facts = of_function(getattr(node.target, "_opname", node.target))
    return node.op in ("call_function", "call_method") and facts.inplace and node.all_input_nodes[0] is value


def _dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's value, where an earlier pass has noted it."""
    for key in _VALUE:
        dtype = getattr(node.meta.get(key), "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def remember(undo: ExitStack, module: fx.GraphModule) -> None:
    """Have copies and pickles of a converted graph module keep its records: torch.fx makes its children anew."""
    cls: Any = type(module)  # each graph module has a class of its own
    for name, value in (("__deepcopy__", _deepcopy), ("__reduce__", _reduce)):
        if name in cls.__dict__:
            undo.callback(setattr, cls, name, cls.__dict__[name])
        else:
            undo.callback(delattr, cls, name)
        setattr(cls, name, value)


def completed(copied: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a model with what torch.fx leaves out when it copies graph modules: hooks, attributes, modes."""
    for path, graph in graph_modules(model).items():
        twin = copied.get_submodule(path)
        for name in _HOOKS:
            twin.__dict__[name] = copy.copy(graph.__dict__[name])
        twin.__dict__.update({name: value for name, value in graph.__dict__.items() if name not in twin.__dict__})
        for below, module in graph.named_modules():
            twin.get_submodule(below).training = module.training
    return copied


_HOOKS = tuple(
    f"_{kind}hooks{more}"
    for kind, more in (
        ("forward_", ""), ("forward_", "_with_kwargs"), ("forward_", "_always_called"), ("forward_pre_", ""),
        ("forward_pre_", "_with_kwargs"), ("backward_", ""), ("backward_pre_", ""),
    )
)  # fmt: skip


def _records(module: nn.Module) -> dict[str, dict[str, Any]]:
    found = {
        path: {key: one.__dict__[key] for key in RECORDS if key in one.__dict__} for path, one in module.named_modules()
    }
    return {path: records for path, records in found.items() if records}


def _with_records(module: fx.GraphModule, records: dict[str, dict[str, Any]]) -> fx.GraphModule:
    for path, own in records.items():
        module.get_submodule(path).__dict__.update(own)
    with ExitStack() as undo:
        remember(undo, module)
        undo.pop_all()
    return module


def _deepcopy(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    made = fx.GraphModule.__deepcopy__(self, memo)
    return _with_records(made, copy.deepcopy(_records(self), memo))


def _reduce(self: fx.GraphModule) -> tuple[Any, ...]:
    return _revived, (fx.GraphModule.__reduce__(self), _records(self))


def _revived(reduced: tuple[Any, ...], records: dict[str, dict[str, Any]]) -> fx.GraphModule:
    make, args = reduced
    return _with_records(make(*args), records)
