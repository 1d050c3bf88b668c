"""Fold the gates of a converted model into the weights of their branches, for inference and deployment."""

from __future__ import annotations

import ast
import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import sources
from .api import copied
from .capture import check_model, resolve_inputs
from .capture.facts import of_class
from .capture.recorded import one_line, record
from .capture.trace import Frame, origin
from .detect.scaling import Axis, Reading, Unscalable, products, reading, scaling
from .errors import ConversionError, NoEffectWarning
from .plan import Operand, Place, Site, Span
from .rewrite import modules
from .rewrite.changes import Added, Emptied, Folded, Overwritten, delete, note, overwrite, put, rebind, set_class
from .rewrite.instances import edited_method, find
from .rewrite.marker import mark_folded
from .rewrite.recompile import bypassed, same
from .rewrite.subclass import EditedMethod, Recipe, code_changes, converted_class, recipe_of
from .validation.running import run_model

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of outputs, relative to the largest."""


def fold(model: nn.Module, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """Multiply every gate into the last weights of its branch: the same outputs, and no gate left.

    A gate is folded if, from its product upwards, all is linear (or, for a gate that is not negative, ReLU) as far as
    parameters that nothing else reads. What cannot be folded stays; a warning names it with the reason. The record
    (`audit`) says where each gate went, and `unconvert` that it stays there. Afterwards the model is a plain residual
    network: training it further is possible, and no longer ReZero.

    Args:
        model: a converted model, or a gated one that `convert` found.
        example_inputs: as for `convert`; the model is recorded in eval and train mode, and compared before and after.
        inplace: fold the given object, not a copy.

    Returns:
        The folded model.

    Raises:
        ConversionError: there are no inputs, the model cannot be recorded or copied, parameters have no values, or the
            outputs differ afterwards. The given model is then as it was.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> model = rz.convert(layer, x).eval()
        >>> with torch.no_grad():
        ...     for _, alpha in rz.alphas(model):
        ...         _ = alpha.fill_(0.5)  # as training would
        >>> folded = rz.fold(model, x)
        >>> len(list(rz.alphas(folded))), torch.allclose(folded(x), model(x), atol=1e-5)
        (0, True)
    """
    check_model(model)
    result = model if inplace else copied(model)
    gates = _gates(result)
    if not gates:
        warnings.warn("nothing to fold: the model has no gates", NoEffectWarning, stacklevel=2)
        return result
    if any(gate.parameter.is_meta for gate in gates):
        raise ConversionError("the gates are on the meta device: they have no values that could be folded")
    inputs = resolve_inputs(result, example_inputs)
    readings = [reading(record(result, *inputs, training=training)) for training in (False, True)]
    through = frozenset(gate.path for gate in gates)
    folds: list[_Fold] = []
    stays: dict[str, str] = {}
    for gate in gates:
        try:
            folds.append(_fold(gate, readings, through))
        except Unscalable as reason:
            stays[gate.path] = str(reason)
    before = _outputs(result, inputs)
    with ExitStack() as undo:
        _carry_out(undo, result, folds)
        _record(undo, result, folds, stays)
        _compare(before, _outputs(result, inputs))
        undo.pop_all()
    if stays:
        listed = "; ".join(f"{path}: {reason}" for path, reason in stays.items())
        warnings.warn(f"{len(stays)} of {len(gates)} gates stay: {listed}", UserWarning, stacklevel=2)
    return result


@dataclass(frozen=True, slots=True)
class _Gate:
    owner: nn.Module
    at: str
    """The owner's path."""
    name: str
    """From the owner."""
    path: str
    """From the root, as traces name it."""
    parameter: nn.Parameter
    holder: nn.Module
    """The module whose parameter it is: the owner, or a module below."""

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Fold:
    """What folding one gate takes."""

    gate: _Gate
    weights: dict[str, Axis]
    edits: tuple[Operand, ...]
    """What stays of the products in the holder's methods; empty if the holder itself goes, as it only scales."""
    own: bool
    """The products are the model's own code."""


def _gates(model: nn.Module) -> list[_Gate]:
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    found: dict[int, _Gate] = {}
    for at, owner in model.named_modules():
        for name in owner.__dict__.get("rezero_gates", ()):
            parameter = owner.get_parameter(name)
            holder = owner.get_submodule(name.rpartition(".")[0])
            if of_class(type(holder)).kind != "norm":  # a norm's weight is where a gate would be folded to
                found.setdefault(id(parameter), _Gate(owner, at, name, paths[id(parameter)], parameter, holder))
    return list(found.values())


# --- deciding ---


def _fold(gate: _Gate, readings: list[Reading], through: frozenset[str]) -> _Fold:
    """How a gate is folded.

    Raises:
        Unscalable: it cannot be.
    """
    ran: set[Frame] = set()
    weights: dict[str, Axis] | None = None
    idle = []
    for one in readings:
        ends = products(one.trace, gate.path)
        if not ends:
            idle.append(one)
            continue
        ran.update(origin(product).frames[0] for product, _, _ in ends)
        found = scaling(one, [(product, operand, _axis(product, operand, value)) for product, operand, value in ends],
                        through)  # fmt: skip
        if found.positive and bool((gate.parameter.detach() < 0).any()):
            raise Unscalable(f"it is negative, and there is a {found.positive} between the weight and it")
        if weights is not None and weights != found.parameters:
            raise Unscalable("it would go into other weights in train mode than in eval mode")
        weights = found.parameters
    if weights is None:
        raise Unscalable("it is not read when the model runs")
    for one in idle:
        assert one.trace.model is not None
        if any(one.readers.get(id(one.trace.model.get_parameter(path))) for path in weights):
            raise Unscalable("its weights are read in a mode in which it is not")
    calls = tuple(_calls(gate, {frame.span for frame in ran}, _bare_norms(gate, weights)))
    if calls:
        return _Fold(gate, weights, calls, own=False)
    if _only_scales(gate, readings):
        return _Fold(gate, weights, (), own=True)
    return _Fold(gate, weights, tuple(_product(gate, readings[0].trace.model, frame) for frame in ran), own=True)


def _axis(product: fx.Node, operand: fx.Node, value: fx.Node) -> Axis:
    """The dimension of the operand that the gate's factors belong to."""
    shape, whole = origin(value).shape, origin(product).shape
    if shape is None or whole is None or whole != origin(operand).shape:
        raise Unscalable("it widens what it scales")
    wide = [i for i, size in enumerate(shape) if size > 1]
    if len(wide) > 1:
        raise Unscalable("it has more than one dimension")
    return len(whole) - len(shape) + wide[0] if wide else None


def _bare_norms(gate: _Gate, weights: Iterable[str]) -> frozenset[str]:
    """The owner's norms that no weight is in: whether they are called makes no difference to folding."""
    prefix = f"{gate.at}." if gate.at else ""
    kinds = {name: of_class(type(child)).kind for name, child in gate.owner.named_children()}
    return frozenset(
        f"self.{name}"
        for name, kind in kinds.items()
        if kind == "norm" and not any(path.startswith(f"{prefix}{name}.") for path in weights)
    )


def _calls(gate: _Gate, ran: set[Span], norms: frozenset[str]) -> Iterator[Operand]:
    """The calls that apply a gate in its owner's methods, none if it is not applied by a call of ours.

    Raises:
        Unscalable: one of them did not run, and is not like one that did.
    """
    recipe = recipe_of(type(gate.owner))
    made: list[tuple[Place, ast.Call]] = []
    for method in recipe.methods if recipe is not None else ():
        place = _place(gate.owner, method)
        made += [(place, call) for call in _applications(sources.tree(method.file), gate.name)]
    known = [_form(call, norms) for place, call in made if sources.span_of(place.file, call) in ran]
    for place, call in made:
        span = sources.span_of(place.file, call)
        if span not in ran and _form(call, norms) not in known:
            raise Unscalable(f"a path that did not run applies it to something else ({span})")
        yield Operand(place, span, 1)


def _place(owner: nn.Module, method: EditedMethod) -> Place:
    return Place(type(owner).__module__, method.qualname, method.file, method.line)


def _applications(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    """The calls `self.rezero_gate(self.<name>, ...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rezero_gate":
            alpha = node.args[0]
            if isinstance(alpha, ast.Attribute) and alpha.attr == name:
                yield node


def _form(call: ast.Call, norms: frozenset[str]) -> list[str]:
    """What is computed in a gate's operand, whatever from; calls of `norms` do not count."""
    computing = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Subscript)
    nodes = [node for node in ast.walk(call.args[1]) if isinstance(node, computing)]
    texts = [ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node) for node in nodes]
    return [text for text in texts if text not in norms]


def _only_scales(gate: _Gate, readings: list[Reading]) -> bool:
    """Whether the gate's holder is a module that does nothing but scale by it: a LayerScale."""
    holder = gate.holder
    plain = len([*holder.parameters(), *holder.buffers()]) == 1 and not any(True for _ in holder.children())
    if not plain or holder is gate.owner or holder._forward_hooks or holder._forward_pre_hooks:
        return False
    for one in readings:
        ends = {product: operand for product, operand, _ in products(one.trace, gate.path)}
        calls = [call for call in one.trace.calls if call.module is holder]
        if any(len(call.inputs) != 1 or [ends.get(end) for end in call.outputs] != call.inputs for call in calls):
            return False
        if set(ends) != {call.outputs[0] for call in calls}:
            return False
    return True


def _product(gate: _Gate, model: nn.Module | None, frame: Frame) -> Operand:
    """The other operand of a product with the gate in a method of its holder.

    Raises:
        Unscalable: the product is not there, or is written in another form.
    """
    where = f"it is applied in a form of code that is not edited ({frame.span})"
    if isinstance(gate.holder, nn.ParameterList):
        raise Unscalable("it is applied in a loop, whose text is not edited")
    cls: Any = type(gate.holder)
    assert model is not None
    if frame.owner is None or model.get_submodule(frame.owner) is not gate.holder or find(cls, frame.place) is None:
        raise Unscalable(where)
    node = sources.expression(frame.span)
    sides: list[ast.expr] = []
    receiver = False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        sides = [node.left, node.right]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        receiver = len(node.args) == 1
        sides = [node.func.value, *node.args] if receiver else node.args
    left = [i for i, side in enumerate(sides) if not _mentions(side, gate.attribute)]
    if len(sides) != 2 or len(left) != 1:
        raise Unscalable(where)
    return Operand(frame.place, frame.span, left[0], receiver=receiver)


def _mentions(node: ast.AST, attribute: str) -> bool:
    return any(isinstance(part, ast.Attribute) and part.attr == attribute for part in ast.walk(node))


# --- carrying out ---


def _carry_out(undo: ExitStack, model: nn.Module, folds: list[_Fold]) -> None:
    for one in folds:
        for path, axis in one.weights.items():
            _scale(undo, model.get_parameter(path), one.gate.parameter, axis)
    edits: dict[int, tuple[nn.Module, list[Operand]]] = {}
    for one in folds:
        if one.edits:
            edits.setdefault(id(one.gate.holder), (one.gate.holder, []))[1].extend(one.edits)
    changed: dict[int, list[tuple[CodeType, CodeType]]] = {}
    for holder, operands in edits.values():
        cls = _without(type(holder), operands)
        changed[id(holder)] = code_changes(type(holder), cls)
        set_class(undo, holder, cls)
    rebind(undo, model, changed)
    for one in folds:
        _take_out(undo, model, one)


def _scale(undo: ExitStack, weight: nn.Parameter, gate: Tensor, axis: Axis) -> None:
    """Multiply, half precision in single."""
    before = weight.detach().clone()
    undo.callback(overwrite, weight, before)
    wide = torch.promote_types(torch.promote_types(weight.dtype, gate.dtype), torch.float32)
    factor = gate.detach().to(before.device, wide)
    shape = [1] * before.dim()
    if axis is not None:
        shape[axis] = -1
    factor = factor.flatten() if not shape else factor.reshape(shape)
    overwrite(weight, (before.to(wide) * factor).reshape(before.shape))


def _without(cls: Any, operands: list[Operand]) -> type[Any]:
    """The class with each operand in the place of its product; the original one if nothing else was edited."""
    recipe = recipe_of(cls) or Recipe(cls, ())
    methods = {(method.definer, method.qualname, method.line): method for method in recipe.methods}
    for place in dict.fromkeys(operand.place for operand in operands):
        found = find(cls, place)
        assert found is not None
        own = tuple(operand for operand in operands if operand.place == place)
        method = edited_method(recipe, cls, found, *bypassed(place, found.code, own))
        methods[method.definer, method.qualname, method.line] = method
    made = converted_class(Recipe(recipe.original, tuple(methods.values())))
    kept = tuple(method for key, method in methods.items() if not same(*made.__dict__["rezero_codes"][key]))
    if not kept and not hasattr(recipe.original, "__deepcopy__"):
        return recipe.original
    return converted_class(Recipe(recipe.original, kept))


def _take_out(undo: ExitStack, model: nn.Module, one: _Fold) -> None:
    """Remove the parameter, and have its owner remember where it went."""
    gate = one.gate
    records = gate.owner.__dict__
    left = tuple(name for name in records["rezero_gates"] if name != gate.name)
    if left:
        put(undo, records, "rezero_gates", left)
    else:
        delete(undo, records, "rezero_gates")
    kept = [
        entry
        for entry in records.get("rezero_undo", ())
        if not (isinstance(entry, (Added, Overwritten)) and entry.name == gate.name)
    ]
    put(undo, records, "rezero_undo", tuple(kept))
    value, held = gate.parameter.detach().cpu().clone(), gate.holder._parameters
    if one.edits:
        note(undo, gate.holder, Folded(gate.attribute, value, tuple(one.weights), one.own))
        if one.own:
            put(undo, held, gate.attribute, None)  # the code may ask whether it is there
        else:
            delete(undo, held, gate.attribute)
        return
    note(undo, gate.owner, Folded(gate.name, value, tuple(one.weights), own=False))
    blank = copy.deepcopy(gate.holder)
    overwrite(next(blank.parameters()), torch.ones(()))
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if child is gate.holder:
                put(undo, module._modules, key, nn.Identity().train(child.training))
                note(undo, module, Emptied(key, blank))


def _record(undo: ExitStack, model: nn.Module, folds: list[_Fold], stays: dict[str, str]) -> None:
    """Enter in the model's plan what became of its gates."""
    plan = modules.record(model)
    if plan is None:
        return
    where = {(one.gate.at, one.gate.name): ", ".join(one.weights) for one in folds}
    sites = tuple(_folded(site, where, stays) for site in plan.sites)
    put(undo, model.__dict__, "rezero_plan", dataclasses.replace(plan, sites=sites))
    mark_folded(undo, model, (one.gate.path for one in folds))


def _folded(site: Site, where: dict[tuple[str, str], str], stays: dict[str, str]) -> Site:
    gone = [gate.alpha for gate in site.gates if (site.path, gate.alpha) in where]
    prefix = f"{site.path}." if site.path else ""
    said = [f"{alpha} is folded into {where[site.path, alpha]}" for alpha in gone]
    for gate in site.gates:
        said += [f"{name} stays: {stays[prefix + name]}" for name in gate.parameters() if prefix + name in stays]
    if not said:
        return site
    gates = tuple(gate for gate in site.gates if gate.alpha not in gone)
    reason = "; ".join([*([site.reason] if site.reason and gates else []), *said])
    if gates:
        return dataclasses.replace(site, gates=gates, reason=reason)
    if site.verdict not in ("converted", "gated"):
        return dataclasses.replace(site, gates=())
    return dataclasses.replace(site, verdict="folded", code="RZ121", gates=(), reason=reason)


# --- checking ---


def _outputs(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[list[Tensor]]:
    """What a model returns in eval and in train mode."""
    try:
        return [run_model(model, *copy.deepcopy(inputs), training=mode, gradients=False)[0] for mode in (False, True)]
    except Exception as error:  # whatever a model raises
        raise ConversionError(f"the model raised on the example inputs: {one_line(error)}") from error


def _compare(before: list[list[Tensor]], after: list[list[Tensor]]) -> None:
    for mode, old, new in zip(("eval", "train"), before, after, strict=True):
        if len(old) != len(new) or not all(_close(one, other) for one, other in zip(old, new, strict=True)):
            raise ConversionError(f"the folded model's outputs differ in {mode} mode; nothing was folded")


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype not in _TOLERANCES or not one.numel():
        return torch.equal(one, other)
    largest = float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCES[one.dtype] * largest, equal_nan=True)
