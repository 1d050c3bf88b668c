"""Models that others wrote, small where they come in sizes, with the number of residual blocks that their architecture
has by its own configuration (layers x sub-layers), and hand-written ones of known shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import rezero_convert as rz


class Block(nn.Module):
    """x + relu(W x), as in the authors' fully connected notebook."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(x))


def stack(depth: int = 100, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), *(Block(width) for _ in range(depth)), nn.Linear(width, 4))


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its number of residual branches."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    blocks: int
    generates: bool = False


def _image(size: int) -> Callable[[], Any]:
    return lambda: torch.randn(2, 3, size, size)


def _ids() -> Any:
    return {"input_ids": torch.randint(3, 90, (2, 8))}


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return make


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


_LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, **options)


CASES = (
    Case("fc stack", stack, lambda: torch.randn(3, 8), 100),
    Case("encoder post-norm", lambda: nn.TransformerEncoder(_layer(batch_first=True), 2),
        lambda: torch.randn(2, 5, 16), 4),
    Case(
        "encoder pre-norm",
        lambda: nn.TransformerEncoder(_layer(norm_first=True), 2, enable_nested_tensor=False),
        lambda: torch.randn(5, 2, 16),
        4,
    ),
    Case(
        "transformer post-norm",
        lambda: nn.Transformer(16, 2, 2, 2, 32),
        lambda: (torch.randn(5, 2, 16), torch.randn(4, 2, 16)),
        2 * 2 + 2 * 3,
    ),
    Case(
        "transformer pre-norm",
        lambda: nn.Transformer(16, 2, 2, 2, 32, norm_first=True, batch_first=True),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 4, 16)),
        2 * 2 + 2 * 3,
    ),
    Case("torchvision resnet18", _torchvision("resnet18"), _image(64), 8),
    Case("torchvision resnet50", _torchvision("resnet50"), _image(64), 16),
    Case("torchvision resnet50 zero-init", _torchvision("resnet50", zero_init_residual=True), _image(64), 16),
    Case("torchvision convnext_tiny", _torchvision("convnext_tiny"), _image(64), 3 + 3 + 9 + 3),
    Case("torchvision vit_b_16", _torchvision("vit_b_16", image_size=32), _image(32), 2 * 12),
    Case("torchvision efficientnet_b0", _torchvision("efficientnet_b0"), _image(64), 9),
    Case("timm resnet18", _timm("resnet18"), _image(64), 8),
    Case("timm vit_tiny", _timm("vit_tiny_patch16_224", img_size=32), _image(32), 2 * 12),
    Case("timm swinv2_tiny", _timm("swinv2_tiny_window8_256", img_size=64, window_size=2), _image(64), 2 * 12),
    Case(
        "transformers gpt2",
        _transformers("GPT2LMHeadModel", "GPT2Config", n_layer=2, n_embd=32, n_head=2, vocab_size=99, **_TOKENS),
        _ids,
        2 * 2,
        generates=True,
    ),
    Case(
        "transformers llama",
        _transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **_LLAMA, **_TOKENS),
        _ids,
        2 * 2,
        generates=True,
    ),
    Case(
        "transformers vit",
        _transformers(
            "ViTForImageClassification", "ViTConfig", num_hidden_layers=2, hidden_size=32, intermediate_size=64,
            num_attention_heads=2, image_size=32, patch_size=16,
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
        2 * 2,
    ),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The first tensor that a model returns."""
    if isinstance(inputs, dict):
        result = model(**inputs)
    else:
        result = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if not isinstance(result, torch.Tensor):
        result = next(value for value in (result.values() if hasattr(result, "values") else result))
    assert isinstance(result, torch.Tensor)
    return result


def check(case: Case) -> None:
    """Preserve mode equals the original, in eval and train; conversion holds, with a gate a block; a second finds none.

    Raises:
        AssertionError: one of these fails.
        ConversionError: the conversion does not hold.
    """
    model, inputs = case.make(), case.inputs()
    preserved = rz.convert(model, inputs, alpha_init="preserve", verify=False)
    for train in (False, True):
        outputs = []
        for one in (model, preserved):
            torch.manual_seed(1)
            outputs.append(call(copy.deepcopy(one).train(train), inputs))
        assert torch.equal(*outputs)
    converted = rz.convert(model, inputs)  # verified: identity, VJP identity, liveness
    found = len(list(rz.alphas(converted)))
    assert found == case.blocks, f"{found} gates, but {case.blocks} blocks"
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha, std=0.1)
    with pytest.warns(rz.NoEffectWarning):
        rz.convert(converted, inputs)
