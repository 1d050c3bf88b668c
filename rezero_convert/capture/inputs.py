"""Example inputs: what the user gave, or what transformers and timm models say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_unflatten

from ..errors import ConversionError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

PASS_INPUTS = "pass example_inputs= (a tensor, a tuple of positional or a dict of keyword arguments)"

_BATCH = 2


def normalize_inputs(example_inputs: Any) -> Inputs:
    """Positional and keyword arguments of a call.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments (a transformers
            `BatchEncoding` is one).

    Raises:
        ConversionError: anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        odd = [key for key in example_inputs if not isinstance(key, str)]
        if odd:
            raise ConversionError(f"example_inputs: keyword arguments need names, got the key {odd[0]!r}")
        return (), dict(example_inputs)
    raise ConversionError(
        "example_inputs: expected a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__} (a single argument of another type: pass a tuple of one)"
    )


def resolve_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """The given inputs, or those that the model describes itself.

    Raises:
        ConversionError: of another form, or neither given nor described.
    """
    if example_inputs is not None:
        return normalize_inputs(example_inputs)
    inferred = infer_inputs(model)
    if inferred is None:
        raise ConversionError(f"{type(model).__name__} does not describe its inputs; {PASS_INPUTS}")
    return inferred


def infer_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs for a model that describes its own: transformers' `dummy_inputs`, timm's `input_size`, a graph
    module's notes at its placeholders.

    None where it does not. Values are random but the same every time, and torch's random state is not used.
    """
    if hasattr(type(model), "dummy_inputs") and hasattr(model, "config"):
        return (), _transformers(model)
    for name in ("pretrained_cfg", "default_cfg"):
        described = getattr(model, name, None)
        if isinstance(described, Mapping) and described.get("input_size"):
            return (_image(model, _timm_size(model, described)),), {}
    return _of_graph(model) if isinstance(model, fx.GraphModule) else None


def _of_graph(module: fx.GraphModule) -> Inputs | None:
    """Inputs of the shapes that a tracer or an earlier pass has noted, in the structure that the module takes."""
    generator = torch.Generator().manual_seed(0)
    flat: list[Tensor] = []
    for node in module.graph.find_nodes(op="placeholder"):
        noted = node.meta.get("val", node.meta.get("tensor_meta", node.meta.get("example_value")))
        shape, dtype = getattr(noted, "shape", None), getattr(noted, "dtype", None)
        if shape is None or not isinstance(dtype, torch.dtype):
            return None
        sizes = [int(size) for size in shape]
        made = (
            torch.randn(sizes, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(sizes, dtype=dtype)
        )
        flat.append(made.to(_device(module)))
    codegen = module.graph._codegen
    if not flat or not isinstance(codegen, _PyTreeCodeGen):
        return (tuple(flat), {}) if flat else None
    args, kwargs = tree_unflatten(flat, codegen.pytree_info.in_spec)
    return tuple(args), dict(kwargs)


def _transformers(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    text = getattr(config, "text_config", None) or config
    if main == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        inputs = {main: _image(model, (int(getattr(vision, "num_channels", 3)), int(height), int(width)))}
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * int(getattr(config, "max_source_positions", 100))
        inputs = {main: _image(model, (int(config.num_mel_bins), frames))}
    elif main == "input_values" and hasattr(config, "num_mel_bins"):
        inputs = {main: _image(model, (int(getattr(config, "max_length", 1024)), int(config.num_mel_bins)))}
    elif main == "input_values":
        inputs = {main: _image(model, (8000,))}
    else:
        described: Any = model.dummy_inputs
        inputs = {name: _tokens(value, text, model) for name, value in described.items()}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        ids = inputs.get("input_ids")
        made = ids if isinstance(ids, Tensor) else torch.tensor([[7, 6, 0, 0, 1]] * _BATCH, device=_device(model))
        inputs["decoder_input_ids"] = _tokens(made, text, model)
    return inputs


def _tokens(value: Any, config: Any, model: nn.Module) -> Any:
    """Token ids that the vocabulary has, on the model's device."""
    size = getattr(config, "vocab_size", None)
    if not isinstance(value, Tensor) or value.is_floating_point():
        return value
    return (value % size if isinstance(size, int) and size > 0 else value).to(_device(model))


def _timm_size(model: nn.Module, described: Mapping[str, Any]) -> tuple[int, ...]:
    """`input_size`, with the channels and the image size that the model was built with where they differ."""
    channels, height, width = (int(size) for size in described["input_size"])
    first = described.get("first_conv")
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if isinstance(first, str):
        try:
            stem = model.get_submodule(first)
        except AttributeError:
            stem = None
        channels = int(getattr(stem, "in_channels", channels))
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = int(size[0]), int(size[1])
    return channels, height, width


def _image(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(_BATCH, *shape, generator=generator).to(_device(model), dtype)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
