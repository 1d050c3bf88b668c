"""Following the gates: against norms taken by hooks, gradients by hand, and the packages that take the readings."""

from __future__ import annotations

import csv
import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nets import Net
from rich.console import Console
from rich.live import Live
from torch import Tensor, nn
from zoo import BY_NAME, call, stack

import rezero_convert as rz


def converted(depth: int = 3, alpha: float = 0.5) -> nn.Module:
    model = rz.convert(stack(depth), torch.randn(4, 8))
    for _, parameter in rz.alphas(model):
        nn.init.constant_(parameter, alpha)
    return model


def train(model: nn.Module, tracker: rz.AlphaTracker, steps: int) -> list[tuple[rz.Reading, ...]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = []
    for _ in range(steps):
        model(torch.randn(4, 8)).square().mean().backward()
        rows.append(tracker.step())
        optimizer.step()
        optimizer.zero_grad()
    return rows


def test_a_model_without_gates_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(rz.ConversionError, match="no gate"):
        rz.AlphaTracker(stack(2))
    with pytest.raises(rz.ConversionError, match="at least 1"):
        rz.AlphaTracker(converted(), every=0)


def test_rows_come_at_the_first_step_and_every_so_many() -> None:
    model = converted()
    tracker = rz.AlphaTracker(model, every=3)
    assert [bool(rows) for rows in train(model, tracker, 7)] == [True, False, True, False, False, True, False]
    assert [reading.step for reading in tracker.readings] == [1] * 3 + [3] * 3 + [6] * 3
    assert [reading.gate for reading in tracker.readings[:3]] == [name for name, _ in rz.alphas(model)]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_resumed_run_keeps_its_numbers_and_measures_at_its_own_steps() -> None:
    model = converted()
    tracker = rz.AlphaTracker(model, every=50)
    rows: tuple[rz.Reading, ...] = ()
    for number, size in ((1048, 1.0), (1049, 1.0), (1050, 100.0)):
        model(size * torch.ones(4, 8)).square().mean().backward()
        rows = tracker.step(number)
    alone = rz.AlphaTracker(model)
    model(100 * torch.ones(4, 8)).square().mean().backward()
    assert [(row.step, row.ratio) for row in rows] == [(1050, row.ratio) for row in alone.step()]


def test_ratio_and_effect_are_those_taken_by_hand() -> None:
    model, x = converted(2, 0.5), torch.randn(4, 8)
    taken: list[tuple[Tensor, Tensor]] = []
    for block in list(model)[1:-1]:
        block.register_forward_hook(lambda module, args, output: taken.append((args[0].detach(), output.detach())))
    tracker = rz.AlphaTracker(model)
    model(x).square().mean().backward()
    rows = tracker.step()
    assert len(rows) == 2
    for row, (before, after), (_, alpha) in zip(rows, taken, rz.alphas(model), strict=True):
        assert row.ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert alpha.grad is not None
        assert row.effect == pytest.approx(-0.5 * alpha.grad.item())
        assert (row.alpha, row.rms, row.ablation) == (0.5, 0.5, None)


def test_what_is_measured_changes_nothing() -> None:
    outputs = []
    for watched in (True, False):
        torch.manual_seed(3)
        model = converted()
        tracker = rz.AlphaTracker(model) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(4, 8)).square().mean().backward()
            if tracker is not None:
                tracker.step()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(model(torch.ones(4, 8)))
    assert torch.equal(*outputs)


def test_the_effect_predicts_the_ablation_and_gates_are_put_back() -> None:
    model, x = converted(3, 1e-3), torch.randn(16, 8)
    for _, alpha in rz.alphas(model):
        alpha.data = torch.tensor([1e-3])
    model = model.double()

    def loss() -> Tensor:
        return model(x.double()).square().mean()

    tracker = rz.AlphaTracker(model, loss=loss, ablate_every=1)
    loss().backward()
    rows = tracker.step()
    assert all(row.ablation == pytest.approx(row.effect, rel=0.02, abs=1e-9) for row in rows)
    assert all(row.ablation for row in rows)
    assert all(alpha.item() == pytest.approx(1e-3) for _, alpha in rz.alphas(model))
    assert model.training


def test_gates_are_put_back_when_the_loss_raises() -> None:
    model = converted()
    values = iter([1.0])

    def loss() -> float:
        return next(values)

    tracker = rz.AlphaTracker(model)
    with pytest.raises(StopIteration):
        tracker.ablate(loss)
    assert all(alpha.item() == 0.5 for _, alpha in rz.alphas(model))
    assert model.training


def test_a_forward_without_gradients_in_between_is_not_measured() -> None:
    model = converted()
    tracker = rz.AlphaTracker(model)
    with torch.no_grad():
        model(torch.zeros(4, 8))
    model(torch.randn(4, 8)).square().mean().backward()
    assert all(row.ratio is not None and row.ratio > 0 for row in tracker.step())


def test_a_forward_that_raises_leaves_no_mode_behind() -> None:
    model = converted()
    rz.AlphaTracker(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 7))
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize(
    "name", ["encoder post-norm", "transformer pre-norm", "torchvision resnet18", "torchvision convnext_tiny",
             "timm vit_tiny", "transformers gpt2", "transformers llama"],
)  # fmt: skip
def test_every_gate_of_other_peoples_models_has_a_ratio(name: str) -> None:
    case = BY_NAME[name]
    inputs = case.inputs()
    model = rz.convert(case.make(), inputs)
    for _, alpha in rz.alphas(model):
        nn.init.constant_(alpha, 0.1)
    tracker = rz.AlphaTracker(model)
    call(model.train(), inputs).square().mean().backward()
    rows = tracker.step()
    assert len(rows) == case.blocks
    assert [row.gate for row in rows if row.ratio is None or not 0 < row.ratio < 100] == []


def test_parallel_branches_are_weighed_against_the_same_skip() -> None:
    class Parallel(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.a(x)) + torch.relu(self.b(x))

    model, x = rz.convert(Parallel(a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(3, 8)), torch.randn(3, 8)
    for _, alpha in rz.alphas(model):
        nn.init.constant_(alpha, 3.0)
    tracker = rz.AlphaTracker(model)
    model(x).sum().backward()
    rows = {row.gate: row.ratio for row in tracker.step()}
    wanted = {"alpha_a": torch.tanh(model.a(x)).detach(), "alpha_b": torch.relu(model.b(x)).detach()}
    assert rows == {name: pytest.approx(3 * float(value.norm() / x.norm()), rel=1e-4) for name, value in wanted.items()}


def test_compiled_models_are_followed_and_compiled_again_afterwards() -> None:
    model = converted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.randn(4, 8)).sum().backward()
    tracker = rz.AlphaTracker(compiled, every=2)
    for step in (1, 2, 3):
        compiled(torch.randn(4, 8)).sum().backward()
        rows = tracker.step()
        assert bool(rows) == (step < 3)
        assert all(row.ratio for row in rows)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_half_precision_and_channel_gates() -> None:
    class Scale(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.a(x)

    model = rz.convert(Scale(a=nn.Linear(8, 8), gamma=nn.Parameter(torch.full((8,), 0.1))), torch.randn(2, 8))
    model = model.bfloat16()
    nn.init.constant_(model.get_parameter("gamma"), -0.5)
    tracker = rz.AlphaTracker(model)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    model(x).sum().backward()
    (row,) = tracker.step()
    assert (row.alpha, row.rms) == (-0.5, 0.5)
    assert row.ratio == pytest.approx(0.5 * float(model.a(x).detach().float().norm() / x.float().norm()), rel=0.05)


def test_csv_json_and_the_table_on_screen(tmp_path: Path) -> None:
    model = converted()
    tracker = rz.AlphaTracker(model)
    train(model, tracker, 2)
    with tracker.to_csv(tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["alpha"]) for row in rows] == [reading.alpha for reading in tracker.readings]
    assert rows[0]["ablation"] == ""
    assert json.loads(tracker.to_json(tmp_path / "a.json").read_text()) == tracker.to_dict()
    console = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
    with Live(tracker, console=console, auto_refresh=False) as live:
        train(model, tracker, 49)
        live.refresh()
    assert "step 50" in console.export_text()


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = converted(12)
    tracker = rz.AlphaTracker(model, every=1)
    with pytest.raises(rz.ConversionError, match="not measured"):
        tracker.plot(tmp_path / "no.png")
    train(model, tracker, 4)
    with pytest.raises(rz.ConversionError, match="what must be"):
        tracker.plot(tmp_path / "no.png", "gamma")
    with pytest.raises(rz.ConversionError, match="not measured"):
        tracker.plot(tmp_path / "no.png", "ablation")
    for kind in ("lines", "heatmap"):
        text = tracker.plot(tmp_path / f"{kind}.svg", kind=kind).read_text()
        assert text.startswith("<?xml")
    assert not (tmp_path / "no.png").exists()


def test_tensorboard_has_the_values(tmp_path: Path) -> None:
    boards = pytest.importorskip("torch.utils.tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    model = converted()
    with boards.SummaryWriter(tmp_path) as writer:
        tracker = rz.AlphaTracker(model, every=2, on_record=(rz.tensorboard(writer),))
        train(model, tracker, 4)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    name, _ = next(rz.alphas(model))
    scalars = [(event.step, pytest.approx(event.value)) for event in read.Scalars(f"rezero/alpha/{name}")]
    assert scalars == [(row.step, row.alpha) for row in tracker.readings if row.gate == name]
    assert f"rezero/ratio/{name}" in read.Tags()["scalars"]
    assert f"rezero/ablation/{name}" not in read.Tags()["scalars"]


@pytest.mark.slow
def test_sharded_gates_are_gathered(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharded.py")
    runs = [
        subprocess.Popen([sys.executable, script, str(rank), "2", str(tmp_path / "store")], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    for rank, run in enumerate(runs):
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {"rank": rank, "gates": 3}


@pytest.mark.slow
def test_overhead_is_below_one_percent_at_every_50_steps(capsys: pytest.CaptureFixture[str]) -> None:
    model = rz.convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 256), 12, enable_nested_tensor=False),
                       torch.randn(5, 2, 64))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(64, 16, 64)

    def seconds(tracker: rz.AlphaTracker | None) -> float:
        begin = time.process_time()
        model(x).square().mean().backward()
        if tracker is not None:
            tracker.step()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begin

    plain, watched = [], []
    for _ in range(8):
        plain.append(seconds(None))
        tracker = rz.AlphaTracker(model)
        watched.append(seconds(tracker))
        tracker.close()
    overhead = (min(watched) - min(plain)) / (50 * min(plain))
    with capsys.disabled():
        print(f"\na watched step takes {min(watched):.4f} s, another {min(plain):.4f} s: {overhead:.2%} at every=50")
    assert overhead < 0.01
