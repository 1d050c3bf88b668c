"""The zoos: what models there are, and how to build one at full size and small."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import hf
from .made import Attempt, Made, first_that_runs, structural
from .record import Kind


@dataclass(frozen=True)
class Zoo:
    """A library's models: `attempts` are the ways to build one, the most wanted first."""

    names: Callable[[], list[str]]
    attempts: Callable[[str, Kind], Iterable[Attempt]]
    kinds: tuple[Kind, ...] = ("structure", "numbers")
    """transformers has configurations to make models small: there is one kind of run."""

    def make(self, name: str, kind: Kind) -> Made:
        """A model that runs.

        Raises:
            NotRunnable: it does not.
        """
        _declare_torchvision()  # transformers looks for it too
        attempts = self.attempts(name, kind)
        return structural(attempts) if kind == "structure" else first_that_runs(attempts, "cpu")


def _image(*shape: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: torch.randn(2, *shape)


# torch.nn

_X = (2, 5, 16)


def _layer(kind: str, **options: Any) -> Any:
    return getattr(nn, f"Transformer{kind}Layer")(16, 2, 32, **options)


def _stack(kind: str, **options: Any) -> Any:
    return getattr(nn, f"Transformer{kind}")(_layer(kind, **options), 2, nn.LayerNorm(16))


def _nn_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """By name: a model, and how many tensors of shape (2, 5, 16) it takes."""
    found: dict[str, tuple[Callable[[], nn.Module], int]] = {}
    for pre, words in ((False, ""), (True, " pre-norm")):
        for kind, takes in (("Encoder", 1), ("Decoder", 2)):
            for first, act in itertools.product((False, True), ("relu", "gelu")):
                name = f"Transformer{kind}Layer{words} {act}{' batch first, no bias' if first else ''}"
                options = {"norm_first": pre, "batch_first": first, "bias": not first, "activation": act}
                found[name] = partial(_layer, kind, **options), takes
            found[f"Transformer{kind}{words}"] = partial(_stack, kind, norm_first=pre), takes
        found[f"Transformer{words}"] = partial(nn.Transformer, 16, 2, 2, 2, 32, norm_first=pre), 2
    found["MultiheadAttention"] = partial(nn.MultiheadAttention, 16, 2), 3
    found |= {cell.__name__: (partial(cell, 16, 16), 1) for cell in (nn.LSTM, nn.GRU, nn.RNN)}
    found["Bilinear"] = partial(nn.Bilinear, 16, 16, 16), 2
    return found


def _nn_attempts(name: str, kind: Kind) -> Iterator[Attempt]:
    build, takes = _nn_models()[name]
    yield Attempt(build, (lambda model: tuple(torch.randn(_X) for _ in range(takes)),))


# torchvision


def _declare_torchvision() -> None:
    """Let torchvision be imported, and its detection models run, where its C++ operators cannot be loaded."""
    if hasattr(torch.ops.torchvision, "nms"):
        return
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.impl("torchvision::nms", "CPU", _nms)
    from torchvision.ops import boxes

    boxes._assert_has_ops = lambda: None


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression as torchvision documents it; in NumPy, which no capture sees."""
    order = np.argsort(-scores.detach().numpy(), kind="stable")
    corners = boxes.detach().numpy()[order]
    areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    alive = np.ones(len(order), dtype=bool)
    kept = []
    for i in range(len(order)):
        if alive[i]:
            kept.append(order[i])
            low = np.maximum(corners[i, :2], corners[i:, :2])
            high = np.minimum(corners[i, 2:], corners[i:, 2:])
            shared = np.prod(np.clip(high - low, 0, None), axis=1)
            alive[i:] &= ~(shared > iou_threshold * (areas[i] + areas[i:] - shared))
    return torch.tensor(np.array(kept, dtype=np.int64))


def _torchvision_names() -> list[str]:
    """All but the quantizable copies of models that are in the list already."""
    _declare_torchvision()
    from torchvision.models import list_models

    return [name for name in list_models() if not name.startswith("quantized_")]


def classifiers() -> list[str]:
    """torchvision's classification models."""
    _declare_torchvision()
    from torchvision import models

    return models.list_models(module=models)


def _torchvision_attempts(name: str, kind: Kind) -> Iterator[Attempt]:
    from torchvision import models

    package = models.get_model_builder(name).__module__.split(".")[2]
    options: dict[str, Any] = {"weights": None}
    if package in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if package == "detection":
        options |= {"num_classes": 5}

    def build(**more: Any) -> Callable[[], nn.Module]:
        return lambda: models.get_model(name, **options, **more)

    if package == "detection":
        few = {"rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 16}  # regions: pooled in Python, slowly
        yield Attempt(build(min_size=64, max_size=64, **few), (lambda model: _pictures(),), "64 px, 16 regions")
        yield Attempt(build(min_size=64, max_size=64), (lambda model: _pictures(),), "64 px")
        yield Attempt(build(), (lambda model: _pictures(),))  # SSD has one size
        return
    if package == "optical_flow":
        yield Attempt(build(), (lambda model: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)),), "128 px")
        return
    if package == "video":
        shapes = [(3, 8, 64, 64), (3, 16, 64, 64), (3, 16, 224, 224)]
        yield from (Attempt(build(), (_image(*shape),), "x".join(map(str, shape))) for shape in shapes)
        return
    sizes = (64, 128, 224, 299) if kind == "numbers" else (224, 299)
    for size in sizes:
        if size < 224:
            yield Attempt(build(image_size=size), (_image(3, size, size),), f"image_size={size}")  # ViT
            yield Attempt(build(input_size=(size, size)), (_image(3, size, size),), f"input_size={size}")  # MaxViT
        yield Attempt(build(), (_image(3, size, size),), f"{size} px")


def _pictures() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two pictures with one box each, and what else the kinds of detector are trained on."""
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[16.0, 16.0, 1.0]] * 17]),
    }
    return [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, dict(target)]


# timm


def _timm_names() -> list[str]:
    """Models of each file in turn: the first hundred already show what there is."""
    _declare_torchvision()
    import timm

    files: dict[str, list[str]] = {}
    for name in timm.list_models():
        files.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    turns = itertools.zip_longest(*files.values())
    return [name for turn in turns for name in turn if name is not None]


def _timm_attempts(name: str, kind: Kind) -> Iterator[Attempt]:
    import timm

    def image(size: int | None = None) -> Callable[[nn.Module], Tensor]:
        def inputs(model: Any) -> Tensor:
            channels, *sides = model.pretrained_cfg["input_size"]
            return torch.randn(2, channels, *(sides if size is None else (size, size)))

        return inputs

    if kind == "numbers":
        for size in (64, 128):
            yield Attempt(partial(timm.create_model, name, img_size=size), (image(size),), f"img_size={size}")
            yield Attempt(partial(timm.create_model, name), (image(size),), f"{size} px")
    yield Attempt(partial(timm.create_model, name), (image(),), "full size")


def _transformers_names() -> list[str]:
    _declare_torchvision()
    return hf.names()


ZOOS = {
    "nn": Zoo(lambda: list(_nn_models()), _nn_attempts),
    "torchvision": Zoo(_torchvision_names, _torchvision_attempts),
    "timm": Zoo(_timm_names, _timm_attempts),
    "transformers": Zoo(_transformers_names, lambda name, kind: hf.attempts(name), ("numbers",)),
}
