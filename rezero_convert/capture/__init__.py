"""Captures: a live model becomes a `Trace`, by running it once, by tracing it symbolically or by reading its source."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError
from .graphs import unflattened
from .inputs import PASS_INPUTS, infer_inputs, normalize_inputs, resolve_inputs
from .live import trace_live
from .recorded import one_line, record, record_on
from .stand_ins import stand_ins
from .symbolic import trace_symbolically
from .trace import Trace

__all__ = ["capture", "check_model", "infer_inputs", "normalize_inputs", "resolve_inputs", "without_inputs"]


def capture(model: nn.Module, example_inputs: Any = None, *, training: bool = False) -> Trace:
    """The graph of `model`, which is left as it was.

    With example inputs, given or described by the model itself (transformers, timm), the model is run once: on fake
    tensors, else on meta tensors, else on real ones. Without, it is traced symbolically; if that fails, the source of
    its classes is read with the values of its instances. All in eval mode, or with `training` in train mode.

    Raises:
        ConversionError: `model` is not a plain module (the message says how to get at one), the example inputs are
            not of the right form, the model raises on them, or there are none and both tracing and reading fail.
    """
    check_model(model)
    with stand_ins(model) as (held, notes):
        try:
            trace = _captured(model, example_inputs, training)
        except ConversionError as error:
            if not held:
                raise
            failure = error
        else:
            return dataclasses.replace(trace, notes=(*notes, *trace.notes))
    trace = _captured(model, example_inputs, training)
    note = f"{held[0]} has no source text, and what torch.fx traces of it does not do what it does: {failure}"
    return dataclasses.replace(trace, notes=(note, *trace.notes))


def _captured(model: nn.Module, example_inputs: Any, training: bool) -> Trace:
    if example_inputs is not None:
        args, kwargs = normalize_inputs(example_inputs)
        return record(model, args, kwargs, training=training)
    inferred = infer_inputs(model)
    if inferred is None:
        return without_inputs(model, training=training)
    try:
        return record(model, *inferred, training=training)
    except ConversionError as error:
        return without_inputs(model, training=training, before=f"on inputs inferred from its configuration {error}; ")


def check_runs(model: nn.Module, example_inputs: Any) -> None:
    """Refuse inputs that the model itself cannot take: fake tensors do not see an index out of range.

    Raises:
        ConversionError: gives the model's exception.
    """
    inputs = normalize_inputs(example_inputs) if example_inputs is not None else infer_inputs(model)
    if inputs is None or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    try:
        record_on("real", model, *inputs)
    except ConversionError:
        raise
    except Exception as error:  # whatever the model raises
        raise ConversionError(f"the model raised on the example inputs: {one_line(error)}") from error


def check_model(model: object) -> None:
    """Refuse what cannot be converted as it is.

    Raises:
        ConversionError: says what it is and what to pass instead.
    """
    name = type(model).__name__
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ConversionError(f"the model is a TorchScript {name}: convert it before scripting or tracing")
    if isinstance(model, torch.export.ExportedProgram):
        raise ConversionError("the model is an ExportedProgram: pass the graph module that its .module() gives")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}: pass an instance" if isinstance(model, type) else f"a {name}"
        raise ConversionError(f"the model must be a torch.nn.Module, got {what}")
    modules = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if "torch._dynamo.eval_frame.OptimizedModule" in modules:
        raise ConversionError("the model is compiled (torch.compile): convert model._orig_mod, then compile")
    if modules & _WRAPPERS:
        raise ConversionError(f"the model is wrapped in {name}: convert model.module before wrapping")
    for path, module in model.named_modules():
        bases = {f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
        if bases & _SHARDED:
            raise ConversionError(f"the model is sharded by FSDP (at {path or 'the root'}): convert it before wrapping")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                where = f"{path}.{key}" if path else key
                raise ConversionError(f"the lazy parameter {where} is not initialized: run a forward first")


_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
}
_SHARDED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp.FSDPModule",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule",
}


def without_inputs(model: nn.Module, *, training: bool = False, before: str = "") -> Trace:
    """The graph of a model that is not run: traced symbolically, else read from the source of its classes.

    Args:
        before: what was tried first, for the message.

    Raises:
        ConversionError: neither works; the message says why, and what to pass.
    """
    try:
        return trace_symbolically(model, training=training)
    except ConversionError as error:
        traced = error
    try:
        return unflattened(trace_live(model, training=training))
    except ConversionError as error:
        raise ConversionError(f"{before}{traced}; {error}; {PASS_INPUTS}") from error
