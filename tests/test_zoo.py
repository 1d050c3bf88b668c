"""Forms of residual block as the zoos write them: gates counted against the architecture, all oracles on each.

Counts are layers x sub-layers of the configuration (three for a decoder layer with cross attention), read off the
model's definition, not from the detector.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import rezero_convert as rz

_T = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 99}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99, **_IDS,
}  # fmt: skip


def _ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 90, (2, 8))}


def _pair() -> dict[str, Any]:
    return {**_ids(), "decoder_input_ids": torch.randint(3, 90, (2, 6))}


def _hf(name: str, blocks: int, inputs: Any = _ids, **config: Any) -> Any:
    kind = name.removesuffix("Model").removesuffix("ForCausalLM")
    make = zoo._transformers(name, f"{kind}Config", **config)
    return pytest.param(zoo.Case(name, make, inputs, blocks), id=name)


def _timm(name: str, blocks: int, size: int, **options: Any) -> Any:
    return pytest.param(zoo.Case(name, zoo._timm(name, **options), zoo._image(size), blocks), id=name)


CASES = [
    _timm("cait_xxs24_224", 2 * 24 + 2 * 2, 32, img_size=32),  # self-attention and class-attention layers
    _timm("xcit_nano_12_p16_224", 3 * 12 + 2 * 2, 32),
    _timm("nf_regnet_b0", 1 + 3 + 6 + 6, 64),
    _timm("regnety_004", 1 + 3 + 6 + 6, 64),
    _timm("mvitv2_tiny", 2 * 10, 224),
    _timm("hiera_tiny_224", 2 * (1 + 2 + 7 + 2), 224),  # at the head of three stages the attention's skip is pooled
    _timm(  # a block's five; two before and two after each merge
        "efficientvit_m0", 5 * (1 + 2 + 3) + 2 * (2 + 2), 64, img_size=64
    ),
    _timm("levit_128s", 2 * (2 + 3 + 4) + 2, 224),
    _timm("fastvit_t8", 2 * (2 + 2 + 4 + 2), 64),
    _timm("res2net50_14w_8s", 16, 64),
    _timm("convnextv2_atto", 2 + 2 + 6 + 2, 64),
    _timm("resnetv2_50", 16, 64),
    _timm("xception41", 12, 96),
    _timm("crossvit_tiny_240", 3 * (2 * 1 + 2 * 4 + 2), 240),
    _hf("GPTNeoXForCausalLM", 4, **_T, **_IDS),
    _hf("CohereForCausalLM", 4, num_key_value_heads=2, **_T, **_IDS),
    _hf("FalconForCausalLM", 4, **{k: v for k, v in _T.items() if k != "intermediate_size"}, **_IDS),
    _hf("PhiForCausalLM", 4, **_T, **_IDS),
    _hf("BloomForCausalLM", 4, n_layer=2, hidden_size=32, n_head=2, vocab_size=99),
    _hf("BertModel", 4, **_T),
    _hf("DistilBertModel", 4, n_layers=2, dim=32, hidden_dim=64, n_heads=2, vocab_size=99),
    _hf("AlbertModel", 2, embedding_size=16, **_T),
    _hf("BartModel", 2 * 2 + 2 * 3, **_SEQ2SEQ),
    _hf("T5Model", 2 * 2 + 2 * 3, _pair, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=99),
    _hf(
        "WhisperModel",
        2 * 2 + 2 * 3,
        lambda: {"input_features": torch.randn(2, 80, 60), "decoder_input_ids": torch.randint(3, 90, (2, 6))},
        max_source_positions=30, **_SEQ2SEQ,
    ),
    _hf("Gemma2ForCausalLM", 4, num_key_value_heads=2, head_dim=16, **_T, **_IDS),
    _hf("GraniteForCausalLM", 4, num_key_value_heads=2, residual_multiplier=0.5, **_T, **_IDS),
    _hf("MixtralForCausalLM", 4, num_key_value_heads=2, num_local_experts=2, **_T, **_IDS),
    _hf("MambaForCausalLM", 2, hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4),
    _hf(  # two a layer, and the positional convolution
        "Wav2Vec2Model", 2 * 2 + 1, lambda: {"input_values": torch.randn(2, 8000)}, apply_spec_augment=False, **_T
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_zoo_model(case: zoo.Case) -> None:
    zoo.check(case)


def test_gates_that_are_there_and_zero_are_left_alone() -> None:
    model, inputs = zoo._timm("dm_nfnet_f0")(), torch.randn(2, 3, 64, 64)
    found = rz.audit(model, inputs).plan.sites
    assert len(found) == 1 + 2 + 6 + 3
    assert {(site.verdict, site.code) for site in found} == {("gated", "RZ120")}
    with pytest.warns(rz.NoEffectWarning, match="gated already"):
        converted = rz.convert(model, inputs)
    assert [name.rpartition(".")[2] for name, _ in rz.alphas(converted)] == ["skipinit_gain"] * 12
    assert converted.state_dict().keys() == model.state_dict().keys()
