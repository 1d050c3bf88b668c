"""Adds that look residual in models that others wrote: each kind refused with its code and its own reason.

`test_detect` has the same kinds as small modules of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import rezero_convert as rz

_SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_TEXT = {**_SMALL, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_WEIGHT = "no linear or convolution weight"


@dataclass(frozen=True)
class Kind:
    """A kind of add, where a model has it, and what is said of it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    function: str
    """Qualified name of the function whose text has the add."""
    text: str
    """Part of the line."""
    code: str
    reason: str
    """Part of it."""
    blocks: int
    """Residual branches of the model, which are found all the same."""


def _ids() -> Any:
    return {"input_ids": torch.randint(3, 90, (2, 8))}


def _ids_and_types() -> Any:
    return {**_ids(), "token_type_ids": torch.zeros(2, 8, dtype=torch.long)}


def _masked() -> Any:
    return {**_ids(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def _hf(model: str, **options: Any) -> Callable[[], nn.Module]:
    config = options.pop("config", model.removesuffix("ForCausalLM").removesuffix("Model") + "Config")
    return zoo._transformers(model, config, **{**_TEXT, **options})


def _eager_t5() -> nn.Module:
    import transformers

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
    config = transformers.T5Config(**sizes, attn_implementation="eager")
    return transformers.T5EncoderModel._from_config(config)


def _pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)


def _images() -> Any:
    return torch.randn(2, 3, 64, 64)


def _frames() -> Any:
    return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)


_EXPERTS = {
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_HYPER = {
    "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16,
    "o_lora_rank": 16, "o_groups": 2, "hc_mult": 2, "index_n_heads": 2, "index_head_dim": 16, "sliding_window": 8,
    "qk_rope_head_dim": 8,
}  # fmt: skip
_FUNNEL = {
    "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64,
    "vocab_size": 99,
}  # fmt: skip
_RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_context = zoo._timm("resnet18", block_args={"attn_layer": "gca"})
_pools = zoo._timm("resnet18", block_args={"attn_layer": "cbam"})
_swin = zoo._timm("swinv2_cr_tiny_ns_224", img_size=64, window_size=2)
_deit = zoo._timm("deit_tiny_distilled_patch16_224", img_size=32, depth=2)

KINDS = [
    Kind("rotary", _hf("LlamaForCausalLM"), _ids, "apply_rotary_pos_emb", "q * cos", "RZ902",
        "parts of the skip times given factors, as in a rotation", 4),
    Kind("relative position bias", _swin, _images,
        "WindowMultiHeadAttention.forward", "_relative_positional_encodings", "RZ907", "does not depend on the input",
        2 * (2 + 2 + 6 + 2)),
    Kind("relative position scores", _hf("DebertaV2Model", **_DISENTANGLED), _ids,
        "DisentangledSelfAttention.forward", "rel_att", "RZ901", "the scores of an attention", 4),
    Kind("polynomial activation", _hf("GPT2LMHeadModel", config="GPT2Config"), _ids,
        "NewGELUActivation.forward", "0.044715", "RZ902", "a pointwise function of the skip", 4),
    Kind("scores plus bias", _eager_t5, _masked,
        "eager_attention_forward", "position_bias", "RZ907", "does not depend on the input", 4),
    Kind("scores plus mask", _hf("BloomForCausalLM", n_layer=2, n_head=2), _ids,
        "BloomAttention.forward", "attention_mask", "RZ907", "does not depend on the input", 4),
    Kind("position embeddings", _hf("BertModel"), _ids_and_types,
        "BertEmbeddings.forward", "+ position_embeddings", "RZ907", "embeddings.position_embeddings", 4),
    Kind("token and type embeddings", _hf("BertModel"), _ids_and_types,
        "BertEmbeddings.forward", "+ token_type_embeddings", "RZ901", "they come from different inputs", 4),
    Kind("routed and shared experts", _hf("Qwen2MoeForCausalLM", **_EXPERTS), _ids,
        "Qwen2MoeSparseMoeBlock.forward", "shared_expert_output", "RZ901",
        "by routing: rows chosen by their scores", 4),
    Kind("context added to all places", _context, _images,
        "GlobalContext.forward", "x + mlp_x", "RZ131", "inside the branch of the block", 8),
    Kind("two pools of a squeeze", _pools, _images,
        "ChannelAttn.forward", "x_avg + x_max", "RZ901", "all are computed from", 8),
    Kind("linear paths to be merged", zoo._timm("repvgg_a0"), _images,
        "RepVggBlock.forward", "self.conv_1x1(x) + self.conv_kxk(x)", "RZ903", "parallel linear paths", 0),
    Kind("feature pyramid", _pyramid, _images,
        "FeaturePyramidNetwork.forward", "inner_top_down", "RZ905", "merges resolutions", 8),
    Kind("exchange of resolutions", zoo._timm("hrnet_w18_small"), _images,
        "HighResolutionModule.forward", "y + f(x[j])", "RZ901", "none from another, at several resolutions", 23),
    Kind("merge with an earlier resolution", zoo._transformers("FunnelModel", "FunnelConfig", **_FUNNEL), _ids,
        "FunnelDecoder.forward", "upsampled_hidden + first_block_hidden", "RZ905", "merges resolutions", 6),
    Kind("distillation heads", _deit, lambda: torch.randn(2, 3, 32, 32),
        "VisionTransformerDistilled.forward_head", "x + x_dist", "RZ903", "parallel linear paths: head and head_dist",
        4),
    Kind("response normalization", zoo._timm("convnextv2_atto"), _images,
        "GlobalResponseNorm.forward", "x + torch.addcmul", "RZ902", "scaled by statistics of its own", 12),
    Kind("hyper-connections", _hf("DeepseekV4ForCausalLM", **_HYPER), _ids,
        "DeepseekV4DecoderLayer.forward", "mlp_output.unsqueeze", "RZ901", "all are computed from split", 0),
    Kind("highway gate", zoo._torchvision("raft_small"), _frames,
        "ConvGRU.forward", "(1 - z) * h + z * q", "RZ901", "a mean of two values, with sigmoid(...) and its complement",
        13),
    Kind("state space recurrence", _hf("MambaForCausalLM", **_RECURRENT), _ids,
        "mamba_selective_scan", "ssm_state = ", "RZ901", "all are computed from softplus", 2),
    Kind("state space skip", _hf("MambaForCausalLM", **_RECURRENT), _ids,
        "mamba_selective_scan", "scan_output = scan_output +", "RZ902", _NO_WEIGHT, 2),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in KINDS])
def test_a_kind_of_add_is_refused_for_its_own_reason(kind: Kind) -> None:
    model = kind.make().eval()
    found = rz.audit(model, kind.inputs()).plan
    sites = [s for s in found.sites if s.place and s.place.qualname == kind.function and kind.text in s.text]
    assert sites, {(site.place.qualname, site.text) for site in found.sites if site.place}
    assert {site.code for site in sites if kind.reason in site.reason} == {kind.code}, [s.reason for s in sites]
    assert all(site.verdict in ("refused", "interior") for site in sites)
    assert sum(len(site.gates) for site in found.converted) == kind.blocks
