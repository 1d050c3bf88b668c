"""Carry a Plan out on a live model: recompile methods, execute nothing of their files.

An instance keeps its class, as a subclass with the edited methods: the text of the method is edited, compiled under a
file name of its own, and made a function on the original globals, defaults and closure cells.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from types import CodeType

import torch
from torch import fx, nn

from ..capture import facts
from ..capture.graphs import graph_modules
from ..capture.guard import still, uncollected
from ..errors import ConversionError
from ..known import SWITCHES
from ..plan import Gate, Plan, Repair
from . import carries
from .changes import (
    Added,
    Biased,
    Dropped,
    Held,
    Overwritten,
    Regraphed,
    Unread,
    blank,
    constants,
    delete,
    fill,
    floats,
    note,
    overwrite,
    put,
    rebind,
    set_class,
    set_graph,
    start,
)
from .graphs import remember
from .instances import edits, module_at
from .marker import mark
from .subclass import code_changes, rezero_gate

__all__ = ["alphas", "record", "rewrite", "rezero_gate"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@uncollected()
def rewrite(model: nn.Module, plan: Plan) -> ExitStack:
    """Carry out `plan` on `model`, in place.

    The converted instances get a subclass of their class with the edited methods, their alphas (`rezero_gates` names
    them), and lose their norms; `model.rezero_plan` is the plan, with what earlier plans had converted. All or
    nothing: after an error the model is as it was.

    Returns:
        What undoes it: `close()` puts the model back as it was.

    Raises:
        ConversionError: a method's text cannot be had, is not what was imported, or cannot be edited; or the model is
            not the one that was planned for.
    """
    classes, functions, graphs = edits(model, plan)
    with ExitStack() as undo:
        changed: dict[int, list[tuple[CodeType, CodeType]]] = {}
        for instance, cls in classes:
            changed[id(instance)] = code_changes(type(instance), cls)
            set_class(undo, instance, cls)
            for known, name, value in SWITCHES:
                if isinstance(instance, known):
                    _hold(undo, instance, name, value)
        for instance, name, function in functions:
            _hold(undo, instance, name, function)
        rebind(undo, model, changed)
        unread = [(module, _read(module.graph) - _read(graph)) for module, graph in graphs]
        for module, graph in graphs:
            note(undo, module, Regraphed(module.graph))
            set_graph(undo, module, graph)
        for module in graph_modules(model).values():
            remember(undo, module)
        for owner, path, gate in _gates(model, plan):
            _place_gate(undo, model, owner, path, gate, plan.options.preserve)
        _drop_norms(undo, model, plan)
        for module, names in unread:
            _drop_unread(undo, module, names)
        for repair in dict.fromkeys(repair for site in plan.edited for repair in site.repairs):
            _repair(undo, model, repair)
        for _, graph in graphs:
            graph.lint()
        before = record(model)
        put(undo, model.__dict__, "rezero_plan", plan if before is None else _merged(before, plan))
        mark(undo, model, plan.options, (name for name, _ in alphas(model)), again=before is not None)
        return undo.pop_all()


def alphas(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The gates of a converted model with their names from the root; each parameter once.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> for name, alpha in rz.alphas(rz.convert(layer, x)):
        ...     print(name, alpha.tolist())
        alpha_self_attn [0.0]
        alpha_linear2 [0.0]
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name in module.__dict__.get("rezero_gates", ()):
            parameter = functools.reduce(getattr, name.split("."), module)
            assert isinstance(parameter, nn.Parameter)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


def record(model: nn.Module) -> Plan | None:
    """The plan that was carried out on `model`, if any."""
    plan = model.__dict__.get("rezero_plan")
    return plan if isinstance(plan, Plan) else None


def _merged(before: Plan, plan: Plan) -> Plan:
    """One record of two conversions: what the first one did, and the rest as the second one found it."""
    done = before.edited
    gated = {(site.path, gate.alpha) for site in done for gate in site.gates}
    rest = [
        site
        for site in plan.sites
        if site.verdict != "gated" or not any((site.path, gate.alpha) in gated for gate in site.gates)
    ]
    return dataclasses.replace(plan, sites=(*done, *rest), notes=tuple(dict.fromkeys((*before.notes, *plan.notes))))


# --- applying, with undo ---


def _hold(undo: ExitStack, instance: nn.Module, name: str, value: object) -> None:
    before = instance.__dict__.get(name)
    if before is not None and before is not value:
        note(undo, instance, Held(name, before))
        put(undo, instance.__dict__, name, value)


def _gates(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, Gate]]:
    """Each gate once, with its owner: several sites may share one. Gates that were there are entered as well."""
    seen: set[tuple[int, str]] = set()
    for site in (*plan.edited, *plan.of("gated")):
        owner = module_at(model, site.path)
        for gate in (*site.gates, *site.shifts):
            if (id(owner), gate.alpha) not in seen:
                seen.add((id(owner), gate.alpha))
                yield owner, site.path or "the model", gate


def _place_gate(undo: ExitStack, model: nn.Module, owner: nn.Module, path: str, gate: Gate, preserve: bool) -> None:
    """Register a new alpha, or set an existing gate's value; either is entered in `rezero_gates`."""
    if gate.existing:
        try:
            parameter = owner.get_parameter(gate.alpha)
        except AttributeError as error:
            raise ConversionError(f"{path}: no parameter {gate.alpha!r} is there") from error
        if gate.init is not None:
            fill(undo, parameter, gate.init)
            note(undo, owner, Overwritten(gate.alpha, "gate", gate.init))
    else:
        head, *within = gate.alpha.split(".")
        begun = within and any(
            isinstance(one, Added) and one.name == head for one in owner.__dict__.get("rezero_undo", ())
        )
        if hasattr(owner, head) and not begun:
            raise ConversionError(f"{path}: the name {head!r} of the new alpha is taken")
        like = next(itertools.chain(floats(owner), floats(model), [torch.empty(0)]))
        init = 1.0 if preserve or gate.init is None else gate.init
        made = [
            nn.Parameter(torch.full(gate.shape, init, dtype=like.dtype, device=like.device), gate.trainable)
            for _ in gate.parameters()
        ]
        if gate.carries is not None:
            put(undo, owner._modules, gate.alpha, carries.made(gate, init, like).train(owner.training))
        elif within:
            _append(undo, owner, gate.alpha, made[0])
        elif not gate.loops:
            put(undo, owner._parameters, gate.alpha, made[0])
        else:
            paths = [member.split(".") for member in gate.members]
            put(undo, owner._modules, gate.alpha, _nested(paths, made).train(owner.training))
        if not begun:
            note(undo, owner, Added(head, init))
    if gate.scale.map == "shift":
        return
    names: tuple[str, ...] = owner.__dict__.get("rezero_gates", ())
    new = tuple(name for name in gate.parameters() if name not in names)
    if new:
        put(undo, owner.__dict__, "rezero_gates", (*names, *new))


def _append(undo: ExitStack, owner: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Put a parameter at the end of a list, made with the lists above it where it is the first in them."""
    *lists, _ = path.split(".")
    for depth, name in enumerate(lists, 1):
        if name not in owner._modules:
            made = nn.ParameterList() if depth == len(lists) else nn.ModuleList()
            put(undo, owner._modules, name, made.train(owner.training))
        owner = owner.get_submodule(name)
    assert isinstance(owner, nn.ParameterList)
    owner.append(parameter)


def _nested(paths: list[list[str]], parameters: list[nn.Parameter]) -> nn.Module:
    """The parameters as a list, or as lists in lists if their paths are longer."""
    if len(paths[0]) == 1:
        return nn.ParameterList(parameters)
    groups: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        groups.setdefault(path[0], []).append(number)
    inner = ([paths[n][1:] for n in group] for group in groups.values())
    return nn.ModuleList(
        _nested(rest, [parameters[n] for n in group]) for rest, group in zip(inner, groups.values(), strict=True)
    )


def _drop_norms(undo: ExitStack, model: nn.Module, plan: Plan) -> None:
    """Take out the norms that nothing uses any more, and put in the biases they had provided."""
    actions: dict[str, set[str]] = {}
    for site in plan.sites:
        for norm in site.norms:
            actions.setdefault(norm.path, set()).add(norm.action if site.edited else "keep")
    going = {path: wanted for path, wanted in actions.items() if path and "keep" not in wanted}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder in model.modules():
        for key, child in holder._modules.items():
            holders.setdefault(id(child), []).append((holder, key))
    for path, wanted in going.items():
        norm_module = module_at(model, path)
        rest: nn.Sequential | None = _unfused(norm_module, path) if "unfuse" in wanted else None
        kept = tuple(rest._modules) if rest is not None else ()
        shell, starts = blank(norm_module), constants(norm_module)
        for holder, key in holders.get(id(norm_module), []):
            order = tuple(holder._modules)
            if rest is not None:
                put(undo, holder._modules, key, rest)
            elif "slot" in wanted or isinstance(holder, _CONTAINERS):
                put(undo, holder._modules, key, nn.Identity().train(norm_module.training))
            else:
                delete(undo, holder._modules, key)
            dtype = next(itertools.chain(floats(holder), floats(model), [torch.empty(0)])).dtype
            note(undo, holder, Dropped(key, order, shell, dtype, starts, kept))
    for path in dict.fromkeys(n.bias for site in plan.edited for n in site.norms if n.bias and n.action != "keep"):
        above, _, name = path.rpartition(".")
        if (weight := module_at(model, above)._parameters.get(name)) is not None:
            bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            put(undo, module_at(model, above)._parameters, f"{name}_bias", nn.Parameter(bias, weight.requires_grad))
            note(undo, module_at(model, above), Added(f"{name}_bias"))
            continue
        layer = module_at(model, path)
        if layer._parameters.get("bias") is None:
            note(undo, layer, Biased("bias" in layer._parameters))
            put(undo, layer._parameters, "bias", _zero_bias(layer, path))


def _read(graph: fx.Graph) -> set[str]:
    """The parameters and buffers that a graph reads."""
    return {str(node.target) for node in graph.find_nodes(op="get_attr")}


def _drop_unread(undo: ExitStack, module: fx.GraphModule, names: set[str]) -> None:
    """Take out the parameters and buffers of norms written out in a graph, where no other code can read them."""
    for path in sorted(names):
        holder_path, _, name = path.rpartition(".")
        try:
            holder = module.get_submodule(holder_path)
        except AttributeError:  # it went with a norm's module
            continue
        if holder is not module and type(holder).forward is not nn.Module.forward:
            continue
        for mapping in (holder._parameters, holder._buffers):
            tensor = mapping.get(name)
            if tensor is not None:
                kept: torch.Tensor = tensor
                if isinstance(tensor, nn.Parameter):
                    kept = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
                note(undo, holder, Unread(name, tuple(mapping), kept, start(tensor)))
                delete(undo, mapping, name)


def _unfused(norm: nn.Module, path: str) -> nn.Sequential:
    """What a fused norm + activation module does besides normalizing."""
    rest = {name: child for name, child in norm.named_children() if facts.of_class(type(child)).kind != "norm"}
    if not rest:
        raise ConversionError(f"{path}: no activation was found inside this {type(norm).__qualname__}")
    kept = nn.Sequential()
    for name, child in rest.items():
        kept.add_module(name, child)
    kept.training = norm.training
    return kept


def _zero_bias(layer: nn.Module, path: str) -> nn.Parameter:
    with still(layer):
        weight = getattr(layer, "weight", None)
    size = getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)
    if type(layer) is nn.Module and isinstance(weight, torch.Tensor):  # torch.export keeps parameters, not classes
        size = len(weight)
    if not isinstance(size, int) or not isinstance(weight, torch.Tensor):
        raise ConversionError(f"{path}: a {type(layer).__qualname__} cannot be given a bias")
    bias = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(bias, requires_grad=weight.requires_grad)


def _repair(undo: ExitStack, model: nn.Module, repair: Repair) -> None:
    """Undo a zero initialization."""
    holder, _, name = repair.parameter.rpartition(".")
    module = module_at(model, holder)
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ConversionError(f"the model has no parameter {repair.parameter!r}; the plan is another model's")
    note(undo, module, Overwritten(name, "start" if repair.how in ("zeros", "scaled") else "repair"))
    if repair.how in ("ones", "zeros"):
        fill(undo, parameter, float(repair.how == "ones"))
        return
    if repair.how == "scaled":
        undo.callback(overwrite, parameter, parameter.detach().clone())
        overwrite(parameter, parameter.detach() * repair.factor)
        return
    tensors = [tensor for tensor in itertools.chain(module.parameters(), module.buffers()) if not tensor.is_meta]
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor, value in zip(tensors, before, strict=True):
        undo.callback(overwrite, tensor, value)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        for tensor, value in zip(tensors, before, strict=True):
            if tensor is not parameter:
                overwrite(tensor, value)
    if parameter.is_meta or parameter.detach().count_nonzero().item() == 0:
        if parameter.dim() < 2:
            fill(undo, parameter, 1.0)
        else:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
