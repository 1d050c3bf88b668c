"""Branches that a file starts at zero, where alpha would get no gradient: what the text tells is undone, or told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rezero_convert as rz

BLOCK = """\
import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.norm = nn.BatchNorm1d(width)
        INIT

    METHOD

    def forward(self, x):
        return x + self.net(x)
"""
PARAMETER = BLOCK.replace("self.net(x)", "F.relu(x @ self.first) @ self.last")
APPLIED = "self.apply(self.fill)"


def block(init: str, method: str = "", text: str = BLOCK) -> str:
    lines = [line if line == method.splitlines()[0] else f"    {line}" for line in method.splitlines()]
    return text.replace("INIT", init.replace("\n", "\n        ")).replace("METHOD", "\n".join(lines))


def method(body: str) -> str:
    return f"def fill(self, m):\n    {body}"


DECIDED = {
    "an index": "nn.init.zeros_(self.net[-1].weight)\nnn.init.zeros_(self.net[-1].bias)",
    "a gain": "nn.init.orthogonal_(self.net[2].weight, 0.0)\nnn.init.zeros_(self.net[2].bias)",
    "a deviation": "nn.init.normal_(self.net[2].weight, std=0)\nnn.init.normal_(self.net[2].bias, 0, 0)",
    "a product": "self.net[2].weight.data.mul_(0)\nself.net[2].bias.data.mul_(0)",
    "a loop": "for p in self.net[-1].parameters():\n    nn.init.zeros_(p)",
    "a variable": "last = nn.Linear(width, width)\nfor p in last.parameters():\n    p.detach().zero_()\n"
    "self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)",
}
UNDECIDED = {
    "a function for all modules": (APPLIED, method("if isinstance(m, nn.Linear): nn.init.zeros_(m.weight)"), 14),
    "no test of the class": ("self.net[-1].apply(self.fill)", method("nn.init.zeros_(m.weight)"), 14),
    "a lambda": ("self.net[-1].apply(lambda m: nn.init.zeros_(m.weight))", "", 11),
    "a loop over modules": ("for m in self.net.modules():\n    if m: m.weight.data.zero_()", "", 12),
    "a list": ("made = list(self.net)\nnn.init.zeros_(made[-1].weight)", "", 12),
    "another weight": ("self.net[-1].weight = nn.Parameter(torch.zeros(width, width))", "", 11),
}  # fmt: skip
PARAMETERS = {
    "zeros": "self.last = nn.Parameter(torch.zeros(width, width))",
    "filled later": "self.last = nn.Parameter(torch.empty(width, width))\nnn.init.zeros_(self.last)",
    "a deviation": "self.last = nn.Parameter(torch.empty(width, width))\nnn.init.normal_(self.last, std=0)",
}
ALIVE = {
    "biases only": (APPLIED, method("if m.bias is not None: nn.init.zeros_(m.bias)")),
    "norms only": (APPLIED, method("if isinstance(m, nn.BatchNorm1d): nn.init.zeros_(m.weight)")),
    "by the name of the class": (APPLIED, method("if 'Norm' in type(m).__name__: nn.init.zeros_(m.weight)")),
    "one row": (APPLIED, method("if isinstance(m, nn.Linear): m.weight.data[0].zero_()")),
    "a deviation that is not 0": (APPLIED, method("nn.init.normal_(m.weight, std=0.02)")),
    "a mean of 0": (APPLIED, method("nn.init.normal_(m.weight, 0.0)")),
    "another attribute": ("self.norm.apply(self.fill)", method("nn.init.zeros_(m.weight)")),
    "another variable": ("last = nn.Linear(width, width)\nnn.init.zeros_(last.weight)\nself.head = last", ""),
    "a function that nobody applies": ("", method("nn.init.zeros_(m.weight)")),
}


def doubts(result: Any) -> list[str]:
    return [note for note in result.report.plan.notes if "may start at zero" in note]


FIRST = "self.first = nn.Parameter(torch.ones(width, width))\n"
ZERO = {
    **{name: block(init) for name, init in DECIDED.items()},
    **{f"a parameter: {name}": block(FIRST + init, text=PARAMETER) for name, init in PARAMETERS.items()},
}


@pytest.mark.parametrize("text", ZERO.values(), ids=ZERO)
def test_what_the_text_tells_is_undone_and_alpha_trains(text: str) -> None:
    gate = "super().__init__()\n        self.alpha = nn.Parameter(torch.zeros(1))"
    assert not is_trained(text.replace("super().__init__()", gate).replace("return x + ", "return x + self.alpha * "))
    result = rz.convert_source(text)
    assert is_trained(result.text)
    assert not doubts(result)


def is_trained(text: str) -> bool:
    """Whether the alpha of a block has a gradient after some steps."""
    space: dict[str, Any] = {}
    exec(text, space)
    model: nn.Module = space["Block"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(4, 8)) * torch.randn(4, 8)).sum().backward()
        optimizer.step()
    return bool(dict(model.named_parameters())["alpha"].grad)


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_the_text_leaves_open_is_told_with_its_line(name: str) -> None:
    init, more, line = UNDECIDED[name]
    (note,) = doubts(rz.convert_source(block(init, more), file="net.py"))
    assert note == (
        f"net.py:{line}: the branch of Block may start at zero by this; then neither it nor alpha ever gets a "
        "gradient: --model and --inputs decide it"
    )


@pytest.mark.parametrize("name", ALIVE)
def test_what_fills_no_branch_is_not_told(name: str) -> None:
    assert doubts(rz.convert_source(block(*ALIVE[name]))) == []
