"""What does a conversion cost? CPU time of `audit` and `convert`, as ratios to one forward and to other tools' graphs.

All models are on the meta device, so a forward computes nothing: what is measured is Python. All tools take turns in
one process, and a ratio is that of two times of one round; the table gives the median, smallest and largest. A second
table says where the time of `convert` goes, by differences: it records the given model and, in eval and in train mode,
the converted one; an audit is a recording and detection; `verify=False` adds the copy and the rewriting.

    python examples/benchmarks/convert_cost.py                              # all models: long
    python examples/benchmarks/convert_cost.py --only resnet50 gpt2-12 fc-100 --json cost.json
    python examples/benchmarks/convert_cost.py --only llama-405b            # its memory is that of the process

Torch-Pruning is measured if it is installed (`pip install --no-deps torch-pruning`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import Times, interleaved, ratio, shown, table, write
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rezero_convert as rz
from rezero_convert.capture import capture

Built = tuple[nn.Module, dict[str, Tensor]]

DEPTHS = (100, 200, 400, 800, 1_000, 1_250, 2_500, 5_000, 10_000)
OWN = ("recording", "audit", "convert, verify=False", "convert")
TOOLS = ("symbolic_trace", "Torch-Pruning", "make_fx", "torch.export")
LARGE = ("llama-405b", "fc-2500", "fc-5000", "fc-10000")
"""Models that only the conversion is measured on."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def fc(depth: int) -> Callable[[], Built]:
    return lambda: (nn.Sequential(*(Block(16) for _ in range(depth))), {"input": torch.randn(4, 16)})


def vision(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        return torchvision.models.get_model(name), {"x": torch.randn(1, 3, 224, 224)}

    return build


def gpt2(layers: int) -> Callable[[], Built]:
    def build() -> Built:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=layers)
        return GPT2LMHeadModel(config), {"input_ids": torch.zeros(1, 64, dtype=torch.long)}

    return build


def llama(layers: int, width: int, inner: int, heads: int) -> Callable[[], Built]:
    def build() -> Built:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=128_256,
        )  # fmt: skip
        return LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 64, dtype=torch.long)}

    return build


MODELS: dict[str, Callable[[], Built]] = {
    "resnet50": vision("resnet50"),
    "resnet152": vision("resnet152"),
    "vit-b": vision("vit_b_16"),
    "vit-l": vision("vit_l_16"),
    "swin-t": vision("swin_t"),
    "convnext-t": vision("convnext_tiny"),
    "gpt2-12": gpt2(12),
    "gpt2-48": gpt2(48),
    "llama-8b": llama(32, 4096, 14_336, 32),
    "llama-405b": llama(126, 16_384, 53_248, 128),
    **{f"fc-{depth}": fc(depth) for depth in DEPTHS},
}


def actions(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What takes turns, by name."""
    names, values = list(inputs), tuple(inputs.values())
    given = values if len(values) == 1 and names[0] in ("x", "input") else inputs

    def forward() -> Any:
        with torch.no_grad():
            return model(**inputs)

    def called(*tensors: Tensor) -> Any:
        found = model(**dict(zip(names, tensors, strict=True)))
        return found if isinstance(found, Tensor) else found[0]

    def pruning() -> Any:
        import torch_pruning

        graph = torch_pruning.DependencyGraph()
        return graph.build_dependency(model, values, forward_fn=lambda _, tensors: called(*tensors))

    made: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "recording": lambda: capture(model, given),
        "audit": lambda: rz.audit(model, given),
        "convert, verify=False": lambda: rz.convert(model, given, verify=False),
        "convert": lambda: rz.convert(model, given),
    }
    if name in LARGE:
        return made
    made["symbolic_trace"] = lambda: fx.symbolic_trace(model)
    if importlib.util.find_spec("torch_pruning") is not None:
        made["Torch-Pruning"] = pruning
    made["make_fx"] = lambda: make_fx(called)(*values)
    made["torch.export"] = lambda: torch.export.export(model, (), inputs)
    return made


def measured(name: str, rounds: int, limit: float, without: list[str]) -> dict[str, Any]:
    with torch.device("meta"):
        model, inputs = MODELS[name]()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {tool: action for tool, action in actions(name, model, inputs).items() if tool not in without}
        times, failed = interleaved(made, rounds, limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"model": name, "times": times, "failed": failed, "peak_gib_of_process": round(peak, 3)}


PARTS = ("three recordings", "detection", "copy and rewriting", "the rest of the check")


def parts(times: Times) -> list[str]:
    """Shares of the time of a conversion."""
    recording, audit, unchecked, whole = (median(times[name]) for name in OWN)
    shares = (3 * recording, audit - recording, unchecked - audit, whole - unchecked - 2 * recording)
    return [f"{round(100 * share / whole)} %" for share in shares]


def report(results: list[dict[str, Any]]) -> None:
    """Print the tables."""
    ran = [found for found in results if not {"forward", *OWN} & found["failed"].keys()]
    rows = []
    for found in ran:
        times: dict[str, list[float]] = found["times"]
        columns = [shown(ratio(times, one, "forward")) for one in (*OWN, *TOOLS)]
        against = shown(ratio(times, "convert", "Torch-Pruning"))
        forward = f"{1e3 * median(times['forward']):.0f}"
        rows.append([found["model"], forward, *columns, against, f"{found['peak_gib_of_process']:.2f}"])
    print("ratios of process CPU time to one forward on meta: median (smallest-largest) of the rounds\n")
    print(table(["model", "forward, ms", *OWN, *TOOLS, "convert / Torch-Pruning", "peak memory so far, GiB"], rows))
    print("\nwhere the time of convert goes, of medians\n")
    again = [found for found in ran if len(found["times"]["convert"]) > 1]  # the first time there is more to do
    print(table(["model", *PARTS], [[found["model"], *parts(found["times"])] for found in again]))
    depths = [found for found in ran if found["model"].startswith("fc-")]
    steps = [(one, two) for one in depths for two in depths if int(two["model"][3:]) == 2 * int(one["model"][3:])]
    rows = [
        [f"{one['model']} -> {two['model']}"]
        + [f"{median(two['times'][what]) / median(one['times'][what]):.2f}" for what in ("forward", *OWN)]
        for one, two in steps
    ]
    if rows:
        print("\nratio of the times of twice the depth (medians)\n")
        print(table(["depth", "forward", *OWN], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="the models to measure")
    parser.add_argument("--without", nargs="+", choices=TOOLS, default=[], help="tools that are not measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds above which a tool has one round")
    parser.add_argument("--json", default="", help="where to write the times")
    parser.add_argument("--read", default="", help="print the tables of a file that --json wrote; nothing is measured")
    asked = parser.parse_args()
    if asked.read:
        report(json.loads(Path(asked.read).read_text())["results"])
        return
    torch.set_num_threads(1)
    if importlib.util.find_spec("torch_pruning") is None:
        print("Torch-Pruning is not installed: skipped")
    results = []
    for name in asked.only:
        found = measured(name, asked.rounds, asked.limit, asked.without)
        results.append(found)
        print(name, *[f"{tool} failed: {why}" for tool, why in found["failed"].items()], sep="\n  ", flush=True)
        if asked.json:
            write(asked.json, results)
    print()
    report(results)


if __name__ == "__main__":
    main()
