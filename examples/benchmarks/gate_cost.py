"""What does a gate cost at run time? Time, memory and kernels of original, converted, hand-written ReZero, no gate.

A pre-norm Transformer encoder and a residual net, in float32 and bfloat16, one training step (forward and backward) and
inference, eager and, where a C++ compiler or a GPU is there, under torch.compile. The four take turns in one process;
ratios are those of one round. Memory: the tensors that autograd saves for the backward pass, each storage once,
parameters left out. Kernels: the calls in the code that torch.compile generates for forward and backward.

    python examples/benchmarks/gate_cost.py
    python examples/benchmarks/gate_cost.py --no-compile --rounds 20 --json gates.json
"""

from __future__ import annotations

import argparse
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, ratio, shown, table, write
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

import rezero_convert as rz


def same(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class PreNorm(nn.Module):
    """A pre-norm Transformer layer: the original."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HandWritten(nn.Module):
    """The layer in ReZero form, by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.alpha1, self.alpha2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.alpha1 * self.attention(x)
        return x + self.alpha2 * self.mlp(x)


class NoGate(nn.Module):
    """The layer with neither norms nor gates."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
    )  # fmt: skip


class PostActivation(nn.Module):
    """A residual block of He et al. (2016): the original."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = branch(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


class HandWrittenConv(nn.Module):
    """The block in ReZero form, by hand; as `convert` does, batch norm stays and the activation moves to the branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = branch(width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * torch.relu(self.branch(x))


class NoGateConv(nn.Module):
    """The hand-written block without its gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = branch(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.branch(x))


def models(name: str, layers: int, width: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The four forms of a model, and an input."""
    made: dict[str, nn.Module]
    if name == "transformer":
        example = torch.randn(4, 64, width)
        classes = {"original": PreNorm, "hand-written": HandWritten, "no gate": NoGate}
        made = {key: nn.Sequential(*(cls(width, 4) for _ in range(layers))) for key, cls in classes.items()}
    else:
        example = torch.randn(4, width // 4, 16, 16)
        blocks = {"original": PostActivation, "hand-written": HandWrittenConv, "no gate": NoGateConv}
        made = {key: nn.Sequential(*(cls(width // 4) for _ in range(layers))) for key, cls in blocks.items()}
    return {**made, "converted": rz.convert(made["original"], example)}, example


def saved(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Number and bytes of the storages that autograd saves, without those of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[Tensor, int]] = {}  # the tensors are held, so that no storage is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, same):
        model(x)
    return len(found), sum(size for _, size in found.values())


def kernels(run: Callable[[], Any]) -> int:
    """Kernels that the generated code of forward and backward calls: fused ones and those of libraries."""
    torch._dynamo.reset()
    _, codes = run_and_get_code(run)
    # the wrapper of C++ kernels calls them by name, that of Triton kernels by `.run`
    call = re.compile(r"^\s+(?:\w+ = )?(?:(?:cpp|triton)_\w+(?:\.run)?|extern_kernels\.\w+|torch\.ops\.\S+)\(", re.M)
    return sum(len(call.findall(code)) for code in codes)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(x).sum().backward()

    return run


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def measured(name: str, dtype: torch.dtype, compiled: bool, asked: argparse.Namespace) -> dict[str, Any]:
    forms, x = models(name, asked.layers, asked.width)
    x = x.to(dtype)
    forms = {key: model.to(dtype).train() for key, model in forms.items()}
    wanted = x.detach().requires_grad_()  # the stream has a gradient from the first block on
    found: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch."), "compiled": compiled}
    if compiled:
        found["kernels"] = {key: kernels(step(torch.compile(model), wanted)) for key, model in forms.items()}
        found["kernels_inference"] = {key: kernels(inference(torch.compile(one), x)) for key, one in forms.items()}
    else:
        found["saved"] = {key: saved(model, wanted) for key, model in forms.items()}
        found["gates"] = len(dict(rz.alphas(forms["converted"])))
        found["stream_bytes"] = x.numel() * x.element_size()
    torch._dynamo.reset()
    ready = {key: torch.compile(model) if compiled else model for key, model in forms.items()}
    found["train"], _ = interleaved({key: step(model, wanted) for key, model in ready.items()}, asked.rounds, 1e9)
    for model in forms.values():
        model.eval()
    found["inference"], _ = interleaved({key: inference(model, x) for key, model in ready.items()}, asked.rounds, 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", default="", help="where to write what was measured")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None and not asked.no_compile:
        print("no C++ compiler: torch.compile is skipped")
    results: list[dict[str, Any]] = []
    for name in ("transformer", "resnet"):
        for dtype in asked.dtypes:
            for compiled in (False, True) if compiler and not asked.no_compile else (False,):
                results.append(measured(name, getattr(torch, dtype), compiled, asked))
                if asked.json:
                    write(asked.json, results)
    print("ratios of process CPU time: median (smallest-largest) of the rounds\n")
    others = ("hand-written", "no gate", "original")
    rows = [
        [one["model"], one["dtype"], "compiled" if one["compiled"] else "eager", what]
        + [shown(ratio(one[what], "converted", other)) for other in others]
        for one in results
        for what in ("train", "inference")
    ]
    print(table(["model", "dtype", "mode", "", *[f"converted / {other}" for other in others]], rows))
    print("\nsaved for the backward pass: tensors; and a gate's, in tensors of the stream's size\n")
    forms = ("original", "no gate", "hand-written", "converted")
    rows = []
    for one in (one for one in results if not one["compiled"]):
        extra = (one["saved"]["converted"][1] - one["saved"]["no gate"][1]) / one["gates"] / one["stream_bytes"]
        rows.append([one["model"], one["dtype"], *[str(one["saved"][form][0]) for form in forms], f"{extra:.2f}"])
    print(table(["model", "dtype", *forms, "a gate, x stream"], rows))
    if any(one["compiled"] for one in results):
        print("\nkernels called by what torch.compile generates\n")
        runs = {"forward and backward": "kernels", "inference": "kernels_inference"}
        rows = [
            [one["model"], one["dtype"], what, *[str(one[name][form]) for form in forms]]
            for one in results
            if one["compiled"]
            for what, name in runs.items()
        ]
        print(table(["model", "dtype", "", *forms], rows))


if __name__ == "__main__":
    main()
