"""Texts by file name: what is remembered of a text goes when the text does."""

from __future__ import annotations

import rezero_convert as rz
from rezero_convert import sources

BLOCK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.{name} = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + {branch}
"""


def test_another_text_under_the_same_name_is_read_anew() -> None:
    first = BLOCK.format(name="norm", branch="self.linear(self.norm(x))")
    second = BLOCK.format(name="other_norm", branch="torch.relu(self.linear(self.other_norm(x)))")
    for text in (first, second, first):
        result = rz.convert_source(text)
        assert "LayerNorm" not in result.text
        assert "self.alpha * " in result.text
        assert rz.convert_source(result.text).text == result.text


def test_lines_end_at_line_feeds_only() -> None:
    text = 'a = "\u2028\x0c"\nb = 1\n'
    sources.register("<line feeds>", text)
    assert sources.text("<line feeds>") == text
    assert sources.lines("<line feeds>")[1] == "b = 1\n"
