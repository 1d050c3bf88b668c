"""Shared set-up: torchvision without its C++ operators, one thread, fixed seeds."""

from __future__ import annotations

import pytest
import torch

torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
