"""`grow`: a converted model made deeper, which computes the same: a block behind a zero gate is the identity."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..api import copied
from ..capture.inputs import resolve_inputs
from ..capture.recorded import one_line
from ..codes import BLOCKS_LEFT
from ..errors import ConversionError
from ..known import DEPTH, LAYER_INDEX, PER_LAYER, RESETS
from ..plan import Plan, Site
from ..rewrite.changes import put, rejoined, replace
from ..rewrite.modules import record
from ..validation import validate
from ..validation.running import identical, run_model

Order = tuple[tuple[int, bool], ...]
"""The blocks after growing: which old one each comes from, and whether it is new."""


def grow(
    model: nn.Module,
    blocks: str,
    factor: int = 2,
    example_inputs: Any = None,
    *,
    where: Literal["interleave", "append"] = "interleave",
    weights: Literal["copy", "fresh"] = "copy",
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Multiply the number of blocks of a converted model; its outputs stay bit-identical at that moment.

    New blocks are copies whose gates are 0 (progressive stacking, Gong et al. 2019; for ReZero: Bachlechner et al.,
    UAI 2021, section 7). Attributes that count the blocks (a layer's index) go on counting, and a transformers
    configuration gets the new depth, so that caches keep working.

    Args:
        model: converted, in any state of training.
        blocks: path of the `ModuleList` or `Sequential` that holds the blocks and nothing else: "transformer.h".
        factor: how many times as deep, at least 2.
        example_inputs: as for `convert`; for the check.
        where: "interleave" puts the copies behind each block, "append" all of them behind the last.
        weights: of the new blocks' branches: those of the block that they are a copy of, or "fresh" ones, by each
            module's `reset_parameters` and a transformers model's `_init_weights`.
        optimizer: of the model, which must be grown in place: keeps the state it has; new parameters join the group
            of those they are copies of, with no state of their own, as at the start of training. Learning rate
            schedulers need no change.
        inplace: grow the given object, not a copy.
        verify: run the model before and after, and `validate` the result.

    Returns:
        The deeper model.

    Raises:
        ConversionError: a block is not converted or would not be the identity, blocks share weights or gates, weights
            cannot be made fresh, or the deeper model does not do the same or does not run its new blocks. The given
            model and optimizer are then as they were.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> model, x = rz.convert(encoder, torch.randn(5, 2, 16)).eval(), torch.randn(5, 2, 16)
        >>> deeper = rz.grow(model, "layers", example_inputs=x)
        >>> len(deeper.layers), torch.equal(deeper(x), model(x))
        (4, True)
    """
    if type(factor) is not int or factor < 2:
        raise ConversionError(f"factor must be a whole number of at least 2, not {factor!r}")
    if where not in ("interleave", "append") or weights not in ("copy", "fresh"):
        raise ConversionError('where must be "interleave" or "append", weights "copy" or "fresh"')
    if optimizer is not None and not inplace:
        raise ConversionError("an optimizer holds the parameters of the given model: pass inplace=True as well")
    old = _blocks(model, blocks)
    _check(model, blocks, old)
    before = _outputs(model, example_inputs) if verify else None
    result = model if inplace else copied(model)
    with ExitStack() as undo:
        pairs = _grown(undo, result, blocks, _order(len(old), factor, where), weights)
        if before is not None:
            _verify(result, before, example_inputs)
        if optimizer is not None:
            _join(undo, optimizer, pairs)
        undo.pop_all()
    return result


def _order(count: int, factor: int, where: str) -> Order:
    if where == "interleave":
        return tuple((at, bool(turn)) for at in range(count) for turn in range(factor))
    return tuple((at, bool(turn)) for turn in range(factor) for at in range(count))


# deciding


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    try:
        holder = model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"the model has no module {path!r}") from error
    if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
        raise ConversionError(f"{path} is a {type(holder).__qualname__}, not a ModuleList or Sequential")
    names = list(holder._modules)
    if names != [str(at) for at in range(len(names))]:
        raise ConversionError(f"{path}: its modules have names ({', '.join(names[:3])}), not numbers")
    if not names:
        raise ConversionError(f"{path} is empty")
    return list(holder)


def _check(model: nn.Module, path: str, old: Sequence[nn.Module]) -> None:
    """Refuse what cannot be multiplied."""
    if len({id(block) for block in old}) < len(old):
        raise ConversionError(f"{path}: one module stands in several places: its copies would not be tied to it")
    seen: dict[int, int] = {}
    plans = list(_plans(model, path))
    for at, block in enumerate(old):
        gates = list(_gates(block))
        if not gates:
            raise ConversionError(f"{path}.{at} has no gate of its own: a copy of it would not be the identity")
        for gate in gates:
            if seen.setdefault(id(gate), at) != at:
                raise ConversionError(f"{path}.{at} shares a gate with {path}.{seen[id(gate)]}")
        for plan, below in plans:
            for site in plan.sites:
                if _inside(site.path, f"{below}.{at}") and (problem := _problem(site)):
                    raise ConversionError(f"{path}.{at} {problem}: a copy of it would not be the identity")


def _problem(site: Site) -> str:
    if site.skip_kind in ("projection", "slice"):
        return f"has a {site.skip_kind} as its skip"
    if site.verdict == "refused" and site.code in BLOCKS_LEFT:
        return f"holds a residual block that was not converted ({site.reason})"
    if site.activation is not None and site.activation.action == "keep" and site.edited:
        return "keeps the activation of its sum"
    if site.edited and any(norm.position == "post" and norm.action == "keep" for norm in site.norms):
        return "keeps the norm of its sum"
    return ""


def _plans(model: nn.Module, path: str) -> Iterator[tuple[Plan, str]]:
    """The records of conversion that tell of the blocks, with the path of their list from where the record is."""
    for prefix, module in model.named_modules():
        plan = record(module)
        if plan is not None and _inside(path, prefix):
            yield plan, path[len(prefix) :].lstrip(".")


def _inside(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}.")


def _gates(block: nn.Module) -> Iterator[nn.Parameter]:
    for module in block.modules():
        for name in module.__dict__.get("rezero_gates", ()):
            yield module.get_parameter(name)


# carrying out


def _grown(
    undo: ExitStack, model: nn.Module, path: str, order: Order, weights: str
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Put the new blocks in; returns the new parameters, each with the one that it is a copy of."""
    old = _blocks(model, path)
    made: list[nn.Module] = []
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for source, new in order:
        block = _twin(model, old[source]) if new else old[source]
        made.append(block)
        if new:
            known = {id(parameter) for parameter in old[source].parameters()}
            parameters = zip(block.parameters(), old[source].parameters(), strict=True)
            pairs += [(one, other) for one, other in parameters if id(one) not in known]
            if weights == "fresh":
                _refresh(model, block, old[source], f"{path}.{source}")
            with torch.no_grad():
                for gate in _gates(block):
                    gate.zero_()
    counters = _counters(old)
    for at, block in enumerate(made):
        for below, name, first in counters:
            put(undo, block.get_submodule(below).__dict__, name, first + at)
    replace(undo, model.get_submodule(path)._modules, {str(at): block for at, block in enumerate(made)})
    _configure(undo, model, path, len(old), [source for source, _ in order])
    for prefix, module in model.named_modules():
        plan = record(module)
        if plan is not None and _inside(path, prefix):
            put(undo, module.__dict__, "rezero_plan", _renumbered(plan, path[len(prefix) :].lstrip("."), order))
    return pairs


def _twin(model: nn.Module, block: nn.Module) -> nn.Module:
    """A copy that shares with the model what the block shares with it: a configuration, tied weights, rotary tables."""
    own = {id(module) for module in block.modules()}
    outside = {id(held) for module in model.modules() if id(module) not in own for held in _held(module)}
    inside = [held for module in block.modules() for held in _held(module)]
    memo: dict[int, Any] = {id(held): held for held in inside if id(held) in outside}
    try:
        return rejoined(copy.deepcopy(block, memo), block)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConversionError(f"a {type(block).__qualname__} cannot be copied ({one_line(error)})") from error


def _held(module: nn.Module) -> Iterator[Any]:
    """The objects that a module holds."""
    registered = (module._parameters, module._buffers, module._modules)
    for mapping in (*registered, module.__dict__):
        for value in mapping.values():
            if value is not None and not any(value is one for one in registered):
                yield value


def _refresh(model: nn.Module, block: nn.Module, source: nn.Module, path: str) -> None:
    """Initialize a copy's weights anew, as its modules and the model do it."""
    initialize: Callable[[nn.Module], None] | None = getattr(model, "_init_weights", None)
    for tensor in block.parameters():
        tensor.__dict__.pop("_is_hf_initialized", None)
    for module in block.modules():
        for reset in (getattr(module, name, None) for name in RESETS):
            if callable(reset):
                reset()
        if callable(initialize):
            with torch.no_grad():
                initialize(module)
    for (name, now), before in zip(block.named_parameters(), source.parameters(), strict=True):
        if now.dim() > 1 and now is not before and torch.equal(now, before):
            raise ConversionError(f'{path}: nothing initializes {name} anew; pass weights="copy"')


def _counters(old: Sequence[nn.Module]) -> list[tuple[str, str, int]]:
    """The attributes that count the blocks: submodule, name, and value in the first block."""
    found = []
    for below, module in old[0].named_modules():
        for name, first in module.__dict__.items():
            if type(first) is not int or (len(old) == 1 and name != LAYER_INDEX):
                continue
            if all(_attribute(block, below, name) == first + at for at, block in enumerate(old)):
                found.append((below, name, first))
    return found


def _attribute(block: nn.Module, below: str, name: str) -> Any:
    try:
        return block.get_submodule(below).__dict__.get(name)
    except AttributeError:
        return None


def _configure(undo: ExitStack, model: nn.Module, path: str, count: int, sources: list[int]) -> None:
    """Enter the depth in the configurations of the modules around the blocks."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    configs = {id(one): one for module in around if (one := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, DEPTH, None) != count:
            continue
        if getattr(config, "is_encoder_decoder", False):
            raise ConversionError(f"{path}: the configuration has two depths, for an encoder and a decoder")
        for name in PER_LAYER:
            listed = getattr(config, name, None)
            if isinstance(listed, (list, tuple)) and len(listed) == count:
                _set(undo, config, name, type(listed)(listed[source] for source in sources))
        _set(undo, config, DEPTH, len(sources))


def _set(undo: ExitStack, config: Any, name: str, value: Any) -> None:
    undo.callback(setattr, config, name, getattr(config, name))
    setattr(config, name, value)


def _renumbered(plan: Plan, path: str, order: Order) -> Plan:
    """The record of the conversion, with the sites of new blocks."""
    sites: list[Site] = []
    for site in plan.sites:
        moved = [
            _moved(site, f"{path}.{source}", f"{path}.{at}")
            for at, (source, _) in enumerate(order)
            if _inside(site.path, f"{path}.{source}")
        ]
        sites += moved or [site]
    return dataclasses.replace(plan, sites=tuple(sites))


def _moved(site: Site, old: str, new: str) -> Site:
    def renamed(path: str) -> str:
        return new + path[len(old) :] if path and _inside(path, old) else path

    return dataclasses.replace(
        site,
        path=renamed(site.path),
        norms=tuple(dataclasses.replace(one, path=renamed(one.path), bias=renamed(one.bias)) for one in site.norms),
        repairs=tuple(dataclasses.replace(one, parameter=renamed(one.parameter)) for one in site.repairs),
    )


# checking


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    args, kwargs = resolve_inputs(model, example_inputs)
    try:
        return run_model(model, *copy.deepcopy((args, kwargs)), training=False, gradients=False)[0]
    except Exception as error:  # whatever a model raises
        raise ConversionError(f"the model raised on the example inputs: {one_line(error)}") from error


def _verify(model: nn.Module, before: list[Tensor], example_inputs: Any) -> None:
    after = _outputs(model, example_inputs)
    if len(before) != len(after):  # caches and lists of hidden states have an entry for each layer
        before, after = before[:1], after[:1]
    if not before or not all(identical(one, other) for one, other in zip(before, after, strict=True)):
        raise ConversionError("the deeper model's outputs are not those of before: its blocks are not all in a row")
    check = validate(model, example_inputs)
    if not check.ok:
        raise ConversionError(f"the deeper model does not hold what it should: {check.failures[0]}")


# the optimizer


def _join(
    undo: ExitStack, optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Have an optimizer train the new parameters, each in the group of the one that it is a copy of."""
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    for group in optimizer.param_groups:
        put(undo, group, "params", list(group["params"]))
    for new, source in pairs:
        joined = groups.get(id(source))
        if joined is None:
            continue
        joined["params"].append(new)
        if isinstance(optimizer, torch.optim.Adagrad):  # makes its state when it is constructed, and only then
            start = float(joined.get("initial_accumulator_value", 0.0))
            optimizer.state[new] = {"step": torch.tensor(0.0), "sum": torch.full_like(new, start).detach()}
            undo.callback(optimizer.state.pop, new)
