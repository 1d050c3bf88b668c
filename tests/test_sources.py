"""Texts by file name: what is remembered of a text goes when the text does."""

from __future__ import annotations

import linecache
from pathlib import Path

import torch

import rezero_convert as rz
from rezero_convert import sources, targets

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


def test_a_text_is_known_for_the_length_of_a_call_only(tmp_path: Path) -> None:
    """The code that was imported from a file has that file's text, whatever else was rewritten under its name."""
    file = tmp_path / "rz_registered.py"
    file.write_text(BLOCK.format(name="norm", branch="self.linear(self.norm(x))"))
    model = targets.load(file).Block()
    made = rz.convert_source(file.read_text(), file=str(file))
    assert rz.convert_source(made.text, file=str(file)).text == made.text
    assert rz.audit_source(made.text, file=str(file)).plan.converted == ()
    assert len(rz.audit(model, torch.randn(2, 8)).plan.converted) == 1
    again = rz.convert_source(file.read_text(), file=str(file), model=model, example_inputs=torch.randn(2, 8))
    assert again.text == made.text


def test_a_text_of_no_file_goes_after_the_call() -> None:
    with sources.registered("<nowhere>", "x = 1\n"):
        assert sources.text("<nowhere>") == "x = 1\n"
    assert "<nowhere>" not in linecache.cache
