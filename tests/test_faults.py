"""Models that fail, interfere or are made unusually: it works or one clear error, and nothing else has changed."""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import fault_models as fm
import pytest
import torch
from fault_models import WIDTH, stacked
from left_alone import left_alone
from torch import nn

import rezero_convert as rz

ROOT = Path(__file__).parent.parent


def inputs() -> torch.Tensor:
    return torch.randn(3, WIDTH)


def gates(model: nn.Module) -> int:
    return len(list(rz.alphas(model)))


def verbs(model: nn.Module, x: torch.Tensor, **options: Any) -> None:
    """Audit, convert a copy, convert in place what cannot take its inputs: each leaves everything as it was."""
    with left_alone(model, x):
        rz.audit(model, x, **options)
    with left_alone(model, x):
        converted = rz.convert(model, x, **options)
    assert gates(converted) == 2
    with left_alone(converted, x):
        assert rz.validate(converted, x).ok
    wrong = torch.randn(3, WIDTH + 1)
    with left_alone(model, wrong), pytest.raises(rz.ConversionError, match="raised on the example inputs"):
        rz.convert(model, wrong, inplace=True)


# The oracle itself


def test_the_oracle_sees_changes() -> None:
    model, x = stacked(fm.MutatesAttributes), inputs()
    with pytest.raises(AssertionError, match="helper"), left_alone(model):
        model(x)
    with pytest.raises(AssertionError, match="running_mean"), left_alone(normed := fm.Normed()):
        normed(x)
    with pytest.raises(AssertionError, match="generator"), left_alone(drawing := fm.Random()):
        drawing(x)
    with pytest.raises(AssertionError, match="torch rng"), left_alone():
        torch.rand(1)
    with pytest.raises(AssertionError, match="_forward_hooks"), left_alone(normed):
        normed.register_forward_hook(lambda *_: None)


# What is refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (fm.RaisesHalfway, "the model raised on the example inputs: ValueError: halfway"),
        (fm.Allocates, "the model raised on the example inputs: RuntimeError: .*can't allocate memory"),
        (fm.StrictMetaclass, "StrictMetaclass cannot be derived from: StrictMetaclass has no word"),
        (fm.TaggedParameter, r"cannot be copied \(RuntimeError: .*; pass inplace=True"),
        (fm.Pruned, r"cannot be copied \(RuntimeError: .*; pass inplace=True"),
        (fm.Lazy, r"the lazy parameter 0\.fc\.weight is not initialized: run a forward first"),
    ],
)
def test_one_error_and_no_change(make: Any, said: str) -> None:
    model, x = stacked(make), inputs()
    with left_alone(model, x), pytest.raises(rz.ConversionError, match=said) as raised:
        rz.convert(model, x)
    assert "\n" not in str(raised.value)
    if "inplace" not in said:
        with left_alone(model, x), pytest.raises(rz.ConversionError, match=said):
            rz.convert(model, x, inplace=True)


@pytest.mark.parametrize(
    ("make", "code"),
    [(fm.BranchInThread, "RZ920"), (fm.quantized, "RZ902")],
)
def test_a_branch_that_cannot_be_seen_is_refused_with_its_reason(make: Any, code: str) -> None:
    model, x = stacked(make), inputs()
    with (
        left_alone(model, x),
        pytest.warns(rz.NoEffectWarning, match="nothing was rewritten: no residual block among 2 adds"),
    ):
        converted = rz.convert(model, x)
    assert torch.equal(converted(x), model(x))
    assert [site.code for site in rz.audit(model, x).plan.sites] == [code] * 2


# What works, and leaves everything as it was


@pytest.mark.parametrize(
    "make",
    [
        fm.Block,
        fm.Closed,
        fm.ControlFlow,
        fm.CustomAutograd,
        fm.CustomLayer,
        fm.CustomLayerAsMade,
        fm.CustomOp,
        fm.CustomOpAsMade,
        fm.CustomOpWithoutFake,
        fm.Forwarding,
        fm.Global,
        fm.Item,
        fm.MutatesAttributes,
        fm.MutatesInput,
        fm.NoNewAttributes,
        fm.Normed,
        fm.Parametrized,
        fm.RaisesInTrainMode,
        fm.Random,
        fm.Slotted,
        fm.SparseWeight,
        fm.ThreadBeside,
        fm.TruthRaises,
        fm.WithMetaclass,
        fm.generated,
    ],
)
def test_it_works_and_nothing_else_changes(make: Any) -> None:
    verbs(stacked(make), inputs())


@pytest.mark.parametrize("make", [fm.TaggedParameter, fm.Pruned])
def test_what_cannot_be_copied_is_converted_in_place(make: Any) -> None:
    model, x = stacked(make), inputs()
    rz.convert(model, x, inplace=True)
    assert gates(model) == 2
    rz.unconvert(model, inplace=True)
    assert {type(block) for block in model.children()} == {make}


def test_mixed_training_modes_frozen_weights_and_hooks_stay() -> None:
    model, x = stacked(fm.Normed), inputs()
    frozen, running = model.children()
    frozen.eval()
    frozen.requires_grad_(False)
    running.register_forward_hook(lambda *_: None)
    model(x).sum().backward()  # gradients are there, too
    running.register_full_backward_hook(lambda *_: None)
    with torch.no_grad():
        verbs(model, x)


def test_inputs_that_a_model_fills_stay_empty() -> None:
    class Cached(fm.Block):
        def forward(self, x: torch.Tensor, cache: list[Any], helper: fm.Helper) -> torch.Tensor:  # type: ignore[override]
            cache.append(x)
            helper.last = x
            return super().forward(x)

    given = {"x": inputs(), "cache": [], "helper": fm.Helper()}
    with left_alone(model := Cached(), given):
        converted = rz.convert(model, given)
    with left_alone(converted, given):
        assert rz.validate(converted, given).ok


def test_auditing_allocates_nothing() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = nn.Sequential(fm.Huge(), fm.Huge())  # 8 TB
    report = rz.audit(model, torch.empty(1 << 10, 1 << 20, device="meta"))
    assert report.counts["converted"] == 2
    assert rz.audit(stacked(fm.Allocates), inputs()).counts["converted"] == 2  # 1 TB in its forward
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # KB


# Where the source is

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        assert x.dim() == 2
        return x + self.fc(self.norm(x))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_module_in_a_zip_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / "lib.zip", "w") as archive:
        archive.writestr("fault_zipped.py", NET)
    monkeypatch.syspath_prepend(folder / "lib.zip")
    model = imported("fault_zipped", monkeypatch).Net()
    converted = rz.convert(model, inputs())
    assert rz.validate(converted, inputs()).ok
    assert rz.audit(model).plan.route == "static (live attributes)"


@pytest.mark.parametrize(
    ("old", "new"),
    [("x + self", "x - self"), ("self.fc(", "self.ff("), ("self.fc(self.norm(x))", "self.norm(self.fc(x))")],
)
def test_source_edited_since_import_is_not_mixed_with_what_runs(
    old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "fault_edited.py").write_text(NET)
    model = imported("fault_edited", monkeypatch).Net()
    (folder / "fault_edited.py").write_text(NET.replace(old, new))
    x = inputs()
    with left_alone(model), pytest.raises(rz.ConversionError, match="is not what was imported; restart Python"):
        rz.convert(model, x, inplace=True)


def test_lines_moved_since_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "fault_moved.py").write_text(NET)
    model, x = imported("fault_moved", monkeypatch).Net(), inputs()
    (folder / "fault_moved.py").write_text("# a line more\n" + NET)
    with left_alone(model), pytest.warns(rz.NoEffectWarning, match="nothing was rewritten"):
        rz.convert(model, x)


def test_under_a_tracer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a debugger, or of coverage."""
    (folder / "fault_traced.py").write_text(NET)
    model, x = imported("fault_traced", monkeypatch).Net(), inputs()
    seen: set[str] = set()

    def trace(frame: types.FrameType, event: str, arg: Any) -> Any:
        seen.add(frame.f_code.co_name)
        return trace if frame.f_code.co_filename.endswith("fault_traced.py") else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with left_alone(model, x):
            converted = rz.convert(model, x)
    finally:
        sys.settrace(before)
    assert "forward" in seen
    assert gates(converted) == 1


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_with_assertions_and_docstrings_left_out(flag: str, folder: Path) -> None:
    (folder / "net.py").write_text(NET.replace("        assert", '        """Says what it does."""\n        assert'))
    code = (
        "import torch, net, rezero_convert as rz\n"
        "x, model = torch.randn(3, 4), net.Net()\n"
        "converted = rz.convert(model, x)\n"
        "preserved = rz.convert(model, x, alpha_init='preserve')\n"
        "print(rz.validate(converted, x).ok, torch.equal(preserved(x), model(x)), __debug__)\n"
    )
    run = subprocess.run(
        [sys.executable, flag, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "True True False\n", run.stderr


def test_the_first_call_draws_no_random_number() -> None:
    code = (
        "import random, torch\n"
        "import rezero_convert as rz\n"
        "random.seed(1)\n"
        "state = random.getstate()\n"
        "rz.audit(torch.nn.Linear(2, 2), torch.ones(1, 2))\n"
        "print(random.getstate() == state)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
