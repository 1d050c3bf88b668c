"""transformers: classes of its auto mappings, from shrunk configurations.

A configuration is shrunk by the names and defaults of its fields, sub-configurations included; what that gets wrong is
in `EXCEPTIONS`. Where the small model cannot be built or does not run, one with only its depth and vocabulary shrunk is
tried, then the default configuration.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rezero_convert.capture import infer_inputs

from .made import Attempt

MAPPINGS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC",
    "SPEECH_SEQ_2_SEQ", "ZERO_SHOT_IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
)  # fmt: skip

Rules = tuple[tuple[str, int | None], ...]

DEPTH = r"(^|_)layers?$|^depth$|^num_blocks$"
VOCABULARY: Rules = ((r"^type_vocab_size$", None), (r"^vocab_size$|^\w+_vocab_size$", 128))
WIDTH: Rules = (
    (r"(^|_)kv_heads?$|num_key_value_heads$|^n_head_kv$|^multi_query_group_num$", 2),
    (r"^mamba_(d_head|head_dim|headdim)$|^qk_head_dim$", 32),
    (r"(^|_)d_head$|head_dim$|^d_kv$|attention_head_size$|^head_size$|^rotary_dim$", 16),
    (r"(^|_)(heads|head)$", 4),
    (r"lora_rank$", 32),
    (r"(intermediate_size|ffn_dim|d_ff|mlp_dim|ffn_hidden_size|feed_forward\w*)$|^n_inner$|^hidden_dim_ff$", 128),
    (r"(^|_)hidden_size$|^d_model$|^n_embd$|^embed_dim$|embedding_size$|^projection_dim$|^dim$|^projection_size$", 64),
    (r"^hidden_dim$|^encoder_hidden_dim$|^projection_hidden_dim$|^d_embed$|^lm_hidden_size$|^embedding_dim$", 64),
    (r"^num_(local_|routed_)?experts$|^n_routed_experts$|^moe_num_experts$", 4),
    (r"^num_experts_per_tok(en)?$|^moe_topk$|^moe_k$", 2),
    (r"^n_group$|^topk_group$|^(mamba_)?n_groups$", 1),
    (r"^max_source_positions$", 32),
    (r"^rnn_hidden_size$|^lru_width$|^mamba_d_state$|^ssm_state_size$|^state_size$", 16),
)
"""Names of integer fields and what they are set to if their default is larger; the first match counts."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},  # both kinds in 2 layers
    "Mamba2Config": {"head_dim": 32},  # heads x head_dim = 2 x hidden_size
    "BambaConfig": {"attn_layer_indices": [1]},  # both kinds in 2 layers
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},  # defaults to None
    "XmodConfig": {"default_language": "en_XX"},  # else the language must be set on the model
    "HunYuanDenseV1Config": {"rope_parameters": _ROPE, "head_dim": 16},  # no defaults
    "HunYuanMoEV1Config": {"rope_parameters": _ROPE, "head_dim": 16},
    "MinistralConfig": {"rope_parameters": _ROPE, "head_dim": 16},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},  # None
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},  # both kinds in 2 layers
    "xLSTMConfig": {"qk_dim_factor": 1.0},  # its states have the shape of the values
    "PerceiverConfig": {  # odd widths that heads must divide; 26 layers of 256 latents
        "num_cross_attention_heads": 1,
        "num_self_attention_heads": 1,
        "num_self_attends_per_block": 2,
        "num_latents": 16,
        "d_latents": 64,
    },
    "Qwen4ExpTextConfig": {  # defaults to None
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "NemotronConfig": {"num_key_value_heads": 2},  # None is not replaced
    "Dots1Config": {  # defaults to None
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},  # defaults to None
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},  # must add up to the layers
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},  # of 2 layers none can share
    "AlignVisionConfig": {"image_size": 64},  # 600 takes gigabytes of activations
    "EfficientNetConfig": {"image_size": 64},
    "MimiConfig": {"upsample_groups": 64},  # as many as channels
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},  # a quarter of the text model's width
    "BltConfig": {"use_cache": False},  # its cache asks for the layers of a configuration that has none
    "VJEPA2Config": {"crop_size": 64, "frames_per_clip": 4},
    "VideoPrismVisionConfig": {"image_size": 36, "num_frames": 4},  # patches of 18
    "Blip2QFormerConfig": {"use_qformer_text_input": True},  # else it has no feed-forward
    "ReformerConfig": {"axial_pos_embds_dim": (32, 32), "is_decoder": True},  # must add up to hidden_size
}
"""Fields of configurations, by class, that the rules get wrong, each with its reason."""


def names() -> list[str]:
    """Every model class of the mappings once, of each mapping in turn."""
    from transformers.models.auto import modeling_auto

    listed: list[list[str]] = []
    for mapping in MAPPINGS:
        entries = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        listed.append([name for one in entries for name in ([one] if isinstance(one, str) else one)])
    turns = itertools.zip_longest(*listed)
    return list(dict.fromkeys(name for turn in turns for name in turn if name is not None))


def attempts(name: str) -> Iterator[Attempt]:
    import transformers

    cls: Any = getattr(transformers, name)
    small = (*VOCABULARY, *WIDTH)
    ladder: tuple[tuple[str, Rules, int], ...] = (
        ("small", small, 2), ("small, 4 layers", small, 4), ("shallow", VOCABULARY, 2), ("default", (), 0),
    )  # fmt: skip
    for title, rules, depth in ladder:
        build = lambda r=rules, d=depth: cls._from_config(shrunk(cls.config_class, r, d))  # noqa: E731
        yield Attempt(build, (_inferred, _required, _all, _stacked, _still), title)


def shrunk(cls: Any, rules: Rules, depth: int, start: Any = None) -> Any:
    """A configuration with its integers cut by rules, and its layers to `depth` of as many kinds as there are."""
    default = cls() if start is None else start
    if not depth:
        return default
    values = {field.name: vars(default).get(field.name) for field in dataclasses.fields(cls)}
    limits = {name: depth if re.search(DEPTH, name) else _limit(name, values, rules) for name in values}
    layers = {value for name, value in values.items() if type(value) is int and re.search(DEPTH, name)}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        limit = limits[name]
        if hasattr(value, "model_type") and dataclasses.is_dataclass(value):
            changed[name] = shrunk(type(value), rules, depth, value)
        elif isinstance(value, (list, tuple)) and len(value) > depth and len(value) in layers:
            changed[name] = type(value)(_few(value, depth))
        elif type(value) is int and value >= 128 and re.search(r"token_(id|index)$", name):
            changed[name] = 4 + len(changed)
        elif (limit is not None and type(value) is int and value > limit) or (name == "vocab_size" and value is None):
            changed[name] = limit  # None: of a CTC head
    config = cls(**(changed | EXCEPTIONS.get(cls.__name__, {})))
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    return config


def _limit(name: str, values: dict[str, Any], rules: Rules) -> int | None:
    limit = next((to for pattern, to in rules if re.search(pattern, name)), None)
    as_many = "head" in name and values[name] == values.get("num_attention_heads")
    return 4 if limit == 2 and as_many else limit  # key and value heads, as many as there are query heads


def _few(values: Any, number: int) -> list[Any]:
    """Some of the values, in order, of as many kinds as possible."""
    first = {str(value): index for index, value in reversed(list(enumerate(values)))}
    chosen = sorted([*sorted(first.values()), *(i for i in range(len(values)) if i not in first.values())][:number])
    return [values[index] for index in chosen]


# Inputs


def _inferred(model: Any) -> Any:
    """What the package itself infers."""
    found = infer_inputs(model)
    if found is None:
        raise ValueError("no inputs are inferred")
    return found[1]


def _required(model: Any) -> dict[str, Any]:
    """The main input, arguments without a default, and the decoder's."""
    parameters = inspect.signature(model.forward).parameters
    wanted = [model.main_input_name]
    wanted += [
        name
        for name, one in parameters.items()
        if one.default is inspect.Parameter.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if getattr(model.config, "is_encoder_decoder", False):
        wanted += [name for name in ("decoder_input_ids",) if name in parameters]
    return {name: _MAKERS[name](model) for name in dict.fromkeys(wanted)}


def _all(model: Any) -> dict[str, Any]:
    """Every argument that is known how to make."""
    parameters = inspect.signature(model.forward).parameters
    return {name: make(model) for name, make in _MAKERS.items() if name in parameters}


def _stacked(model: Any) -> dict[str, Any]:
    """With frames of audio in stacks of four."""
    return _required(model) | {"input_features": torch.cat([_features(model)] * 4, dim=-1)}


def _still(model: Any) -> dict[str, Any]:
    """A picture where the configuration also tells of films."""
    return {"inputs": _pixels(model)[:, 0]}


def _part(model: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(model.config, name, None)) is not None), model.config)


def _ids(model: Any) -> Tensor:
    size = getattr(model.config.get_text_config(), "vocab_size", None) or 100
    books = getattr(model.config, "num_codebooks", None)  # of audio, beside the text
    return torch.randint(min(20, size // 2), min(size, 100), (2, 8) if books is None else (2, 8, books + 1))


def _decoder_ids(model: Any) -> Tensor:
    """Tokens, (batch, length), or (batch, length, codebooks) where the decoder reads several at once."""
    decoder = getattr(model.config, "decoder_config", None)
    books = getattr(decoder, "num_channels", None)
    return _ids(model) if books is None else torch.randint(0, decoder.vocab_size, (2, 8, books))


def _pixels(model: Any) -> Tensor:
    vision = _part(model, "vision_config")
    if "spatial_shapes" in inspect.signature(model.forward).parameters:  # patches, not pictures
        return torch.randn(2, 16, int(vision.num_channels) * int(vision.patch_size) ** 2)
    size = getattr(vision, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = getattr(vision, "num_frames", None)
    channels = int(getattr(vision, "num_channels", 3))
    return torch.randn(2, *([frames] if isinstance(frames, int) else []), channels, int(height), int(width))


def _videos(model: Any) -> Tensor:
    """Frames of a film: (batch, frames, channels, height, width)."""
    vision = _part(model, "vision_config")
    frames, size = (
        next(int(n) for name in names if isinstance(n := getattr(vision, name, None), int))
        for names in (("frames_per_clip", "num_frames"), ("crop_size", "image_size"))
    )
    return torch.randn(2, frames, int(getattr(vision, "num_channels", getattr(vision, "in_chans", 3))), size, size)


def _features(model: Any) -> Tensor:
    """Frames of audio: (batch, frames, bins); Whisper's other order is inferred."""
    audio = _part(model, "audio_config", "encoder_config")
    fields = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "feature_size", "input_dim")
    bins = next((int(n) for name in fields if isinstance(n := getattr(audio, name, None), int)), 80)
    return torch.randn(2, 64, bins)


def _boxes(model: Any) -> Tensor:
    return torch.tensor([[10, 20, 30, 40]]).repeat(2, 8, 1)


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "input_features": _features,
    "pixel_attention_mask": lambda model: torch.ones(2, 16, dtype=torch.long),
    "spatial_shapes": lambda model: torch.tensor([[4, 4]] * 2),
    "input_values": lambda model: torch.randn(2, 8000),
    "bbox": _boxes,
}
