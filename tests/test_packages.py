"""Models of packages that nothing here was made for: gates counted against the architecture, all oracles on each.

Counts are layers x sub-layers of the arguments, read off the model's definition, not from the detector.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import nn


def _vit(module: str, name: str, blocks: int, size: int = 32, **options: Any) -> Any:
    return _case(f"vit_pytorch.{module}", name, blocks, size, options, num_classes=5)


def _smp(name: str, encoder: str, blocks: int) -> Any:
    return _case("segmentation_models_pytorch", name, blocks, 64, {"encoder_name": encoder}, encoder_weights=None)


def _case(module: str, name: str, blocks: int, size: int, options: dict[str, Any], **more: Any) -> Any:
    inputs = zoo._image(size)
    return pytest.param(zoo.Case(name, _make(module, name, **options, **more), inputs, blocks), id=f"{module}.{name}")


def _make(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = getattr(importlib.import_module(module), name)(**options)
        assert isinstance(model, nn.Module)
        return model

    return make


_VIT = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 3, "heads": 2, "mlp_dim": 32}
_TWINS = {
    f"s{stage}_{key}": value
    for stage in (1, 2, 3, 4)
    for key, value in {
        "emb_dim": 16, "patch_size": 2, "depth": 1, "local_patch_size": 2 if stage < 4 else 1,
        "global_k": 2 if stage < 4 else 1,
    }.items()
}  # fmt: skip

CASES = [
    _vit("vit", "ViT", 2 * 3, **_VIT),  # adds in a loop over pairs
    _vit("cait", "CaiT", 2 * 3 + 2 * 2, cls_depth=2, **_VIT),  # the same, with LayerScale in the branches
    _vit("xcit", "XCiT", 3 * 3 + 2 * 2, cls_depth=2, **_VIT),
    _vit(  # three stages; the two that shrink between them have a feed-forward block only, and start at zero
        "levit", "LeViT", 3 * 2 * 2 + 2, 64, image_size=64, dim=(16, 24, 32), depth=2, heads=2, mlp_mult=2, dim_key=8,
        dim_value=8, stages=3,
    ),
    _vit(  # per stage: four, the position generator, four; no local attention and its feed-forward in the last
        "twins_svt", "TwinsSVT", 3 * (4 + 1 + 4) + (2 + 1 + 2), 64, **{**_TWINS, "s1_patch_size": 4},
    ),
    _vit(  # a layer's convolution (but for the first, which widens); attention and feed-forward, in blocks and grid
        "max_vit", "MaxViT", (0 + 4) + (1 + 4) + (0 + 4), dim_conv_stem=8, dim=16, dim_head=8, depth=(2, 1),
        window_size=4,
    ),
    _smp("Unet", "resnet18", 2 + 2 + 2 + 2),
    _smp("MAnet", "resnet18", 2 + 2 + 2 + 2 + 1),  # and the decoder's position attention
    _smp("Segformer", "mit_b0", 2 * (2 + 2 + 2 + 2)),
    pytest.param(  # half a feed-forward, attention, convolution, half a feed-forward
        zoo.Case(
            "Conformer",
            _make("conformer", "Conformer", dim=32, depth=2, heads=2, conv_kernel_size=3),
            lambda: torch.randn(2, 16, 32),
            4 * 2,
        ),
        id="conformer.Conformer",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_model_of_another_package(case: zoo.Case) -> None:
    zoo.check(case)
