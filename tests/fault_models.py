"""Models that do in their `forward`, or are made of, what a tool that runs and rewrites models may trip over."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

WIDTH = 4


class Block(nn.Module):
    """x + F(x), with a place for a fault before the add."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def fault(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.fault(x)
        return x + self.fc(x)


class RaisesHalfway(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x)
        self.seen = x
        raise ValueError("halfway")


class RaisesInTrainMode(Block):
    def fault(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("in train mode")
        return x


class MutatesInput(Block):
    def fault(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Helper:
    """An object of the user's among a module's attributes."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: Tensor | None = None
        self.log: list[Any] = [[]]
        self.inner: Helper | None = None


class MutatesAttributes(Block):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.log: list[Any] = []
        self.nested: dict[str, Any] = {"a": [1], "b": {"c": set()}}
        self.helper = Helper()
        self.helper.inner = Helper()
        self.register_buffer("count", torch.zeros(()))

    def fault(self, x: Tensor) -> Tensor:
        assert self.helper.inner is not None
        self.steps += 1
        self.log.append(x)
        self.nested["a"].append(x)
        self.nested["b"]["c"].add("seen")
        self.helper.calls += 1
        self.helper.last = x
        self.helper.log[0].append(x)
        self.helper.inner.last = x
        self.count += 1
        self.fresh = x
        return x


class Random(Block):
    """Draws from the global generators and from its own."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_generator = torch.Generator().manual_seed(1)
        self.python_generator = random.Random(1)
        self.numpy_generator = numpy.random.default_rng(1)

    def fault(self, x: Tensor) -> Tensor:
        scale = random.random() + numpy.random.rand() + self.python_generator.random() + self.numpy_generator.random()
        torch.rand(1)
        torch.rand(2, generator=self.torch_generator, device="cpu")
        return x * scale if torch.rand(1).device.type == "meta" else x * (1 + torch.rand(1).abs())


class Global(Block):
    """Changes the state of the process."""

    def fault(self, x: Tensor) -> Tensor:
        torch.manual_seed(7)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", False)
        return x


class ControlFlow(Block):
    def fault(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Item(Block):
    def fault(self, x: Tensor) -> Tensor:
        return x * float(x.max().item() > 100)


class BranchInThread(Block):
    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            branch = pool.submit(self.fc, x).result()
        return x + branch


class ThreadBeside(Block):
    """Something else is computed in another thread at the same time."""

    def fault(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: torch.ones(3) + torch.ones(3))
        thread.start()
        thread.join()
        return x


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class CustomAutograd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + _Square.apply(self.fc(x))  # type: ignore[no-any-return,no-untyped-call]  # as torch has it


@torch.library.custom_op("rezero_convert_tests::double", mutates_args=())
def _double(x: Tensor) -> Tensor:
    return x * 2


@_double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


torch.library.register_autograd("rezero_convert_tests::double", lambda ctx, grad: grad * 2)


@torch.library.custom_op("rezero_convert_tests::opaque", mutates_args=())
def _opaque(x: Tensor) -> Tensor:
    """Without a fake implementation, as most are."""
    return x * 2


torch.library.register_autograd("rezero_convert_tests::opaque", lambda ctx, grad: grad * 2)


class CustomOp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ops.rezero_convert_tests.double(self.fc(x))  # type: ignore[no-any-return]


class CustomOpAsMade(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + _double(self.fc(x))


class CustomOpWithoutFake(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ops.rezero_convert_tests.opaque(self.fc(x))  # type: ignore[no-any-return]


@torch.library.custom_op("rezero_convert_tests::fused", mutates_args=())
def _fused(x: Tensor, weight: Tensor) -> Tensor:
    """A layer with its activation, in one operator."""
    return torch.tanh(x @ weight)


@_fused.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def _fused_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, out = ctx.saved_tensors
    inner = grad * (1 - out * out)
    return inner @ weight.T, x.T @ inner


torch.library.register_autograd(
    "rezero_convert_tests::fused",
    _fused_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


class CustomLayer(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ops.rezero_convert_tests.fused(x, self.fc.weight)  # type: ignore[no-any-return]


class CustomLayerAsMade(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + _fused(x, self.fc.weight)


class Tagged(Tensor):
    """A plain subclass: it goes through every operation."""


class TaggedParameter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fc.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).as_subclass(Tagged))  # type: ignore[arg-type]


class SparseWeight(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sparse", torch.eye(WIDTH).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sparse.mm(self.sparse, self.fc(x).t()).t()  # type: ignore[arg-type,no-untyped-call]


class Normed(nn.Module):
    """The norm's statistics are state as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.fc(x))


class Parametrized(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fc = parametrizations.spectral_norm(self.fc)


class Pruned(Block):
    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.fc, "weight", 0.5)  # type: ignore[no-untyped-call]


class Slotted(Block):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = 3


class Forwarding(nn.Module):
    """Attributes that are not there come from the inner module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class _Meta(type):
    made = 0

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        _Meta.made += 1
        return super().__call__(*args, **kwargs)


class WithMetaclass(Block, metaclass=_Meta):
    pass


class _Strict(type):
    """Wants a word in the body of every class."""

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if "word" not in body:
            raise TypeError(f"{name} has no word")
        return super().__new__(mcs, name, bases, body)


class StrictMetaclass(Block, metaclass=_Strict):
    word = 1


class Closed(Block):
    """Cannot be derived from."""

    def __init_subclass__(cls) -> None:
        raise TypeError("closed")


class NoNewAttributes(Block):
    def __init__(self) -> None:
        super().__init__()
        self.done = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "done", False) and name not in self.__dict__:
            raise AttributeError(f"no new attribute {name}")
        super().__setattr__(name, value)


def generated() -> nn.Module:
    """Of a class made by `type`, its forward a function of this file."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.fc(x)  # type: ignore[no-any-return]

    return type("Generated", (Block,), {"forward": forward})()  # type: ignore[no-any-return]


def quantized() -> nn.Module:
    """Weights of eight bits, by torch's own dynamic quantization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks to move to torchao
        return torch.ao.quantization.quantize_dynamic(Block(), {nn.Linear})  # type: ignore[no-any-return,no-untyped-call]


class Lazy(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(WIDTH)


class Allocates(Block):
    """Would take a terabyte."""

    def fault(self, x: Tensor) -> Tensor:
        return x * torch.ones(1 << 38, dtype=torch.float32)[:1]


class Huge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1 << 20, 1 << 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class TruthRaises(Block):
    """Its truth value raises."""

    def __bool__(self) -> bool:
        raise RuntimeError("ambiguous")


def stacked(cls: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(cls(), cls())
