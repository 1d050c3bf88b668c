"""The race: tiny ones, against training written out here, and the shipped tasks' models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import stack

import rezero_convert as rz

EXAMPLES = Path(__file__).parent.parent / "examples"


def batches(seed: int, count: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        yield x, (x[:, :1] * x[:, 1:2]).sign().squeeze(1).add(1).long()


def short(methods: Any = ("original", "rezero"), **options: Any) -> rz.Race:
    given: dict[str, Any] = {"lrs": [0.01], "thresholds": [2.0, 0.9], "steps": 6, "seeds": [0, 1]}
    return rz.race(partial(stack, 2), batches, methods, **given | options)


def test_a_factory_that_gives_one_model_twice_is_refused() -> None:
    model = stack(2)
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(rz.ConversionError, match="same weights twice"):
        rz.race(lambda: model, batches, lrs=[0.01], thresholds=[2.0], steps=6, seeds=[0])
    assert all(map(torch.equal, model.parameters(), before))


def test_a_method_that_changes_nothing_is_no_entrant() -> None:
    with pytest.raises(rz.ConversionError, match=r"rezero: nothing was rewritten"):
        rz.race(lambda: nn.Linear(8, 2), batches, ["original", "rezero"], lrs=[0.01], thresholds=[2.0], seeds=[0])


def test_arguments_out_of_range_are_refused() -> None:
    for wrong in ({"lrs": []}, {"seeds": []}, {"thresholds": []}, {"steps": 0}, {"every": 0}, {"methods": []}):
        with pytest.raises(rz.ConversionError, match="a race takes"):
            short(**wrong)


def test_a_method_that_cannot_be_written_is_refused_before_anything_is_trained() -> None:
    runs: list[rz.Run] = []
    with pytest.raises(rz.ConversionError, match="zeroed: "):
        short({"original": None, "zeroed": {"method": "highway", "alpha_init": "preserve"}}, on_run=runs.append)
    assert not runs


def test_batches_that_run_out_are_told() -> None:
    with pytest.raises(rz.ConversionError, match="ran out before step 6"):
        rz.race(partial(stack, 2), partial(batches, count=3), lrs=[0.01], thresholds=[1.0], steps=6)


def test_a_file_of_other_runs_is_refused_and_left_alone(tmp_path: Path) -> None:
    keep = tmp_path / "race.json"
    keep.write_text("[]")
    with pytest.raises(rz.ConversionError, match="does not hold a race"):
        short(keep=keep)
    keep.unlink()
    short(keep=keep)
    text = keep.read_text()
    with pytest.raises(rz.ConversionError, match="of 6 steps"):
        short(keep=keep, steps=7)
    assert keep.read_text() == text


def test_it_is_the_training_that_it_says() -> None:
    """The curve, against a loop written out: the same weights, Adam, mean of ten steps, clipped, a warm-up."""
    run = short(["rezero"], seeds=[3], steps=12, clip=0.1, schedule=lambda done: (done + 1) / 4).runs[0]
    torch.manual_seed(3)
    model = rz.convert(stack(2), torch.randn(4, 8))
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(model.parameters())
    losses, wanted = [], []
    for step, (x, y) in zip(range(12), batches(3), strict=False):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) / 4
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
        wanted.append(mean(losses[-10:]))
    assert [step for step, _ in run.curve] == list(range(1, 13))
    assert [value for _, value in run.curve] == pytest.approx(wanted, rel=1e-4)
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_frozen_gate_is_not_counted_as_trained_and_all_methods_start_from_the_same_weights() -> None:
    seen: dict[str, Tensor] = {}

    def first(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        seen.setdefault(name, torch.cat([p.detach().flatten() for p in model.parameters() if p.numel() > 1]))
        return torch.optim.SGD(model.parameters(), lr=lr)

    runs = [short([name], seeds=[0], optimizer=partial(first, name)).runs[0] for name in ("original", "rezero", "beta")]
    assert torch.equal(seen["original"], seen["rezero"])
    assert torch.equal(seen["original"], seen["beta"])
    assert runs[1].parameters == runs[0].parameters + len(dict(rz.alphas(rz.convert(stack(2), torch.randn(4, 8)))))
    assert runs[2].parameters == runs[0].parameters


def test_divergence_is_a_result(tmp_path: Path) -> None:
    keep = tmp_path / "race.json"
    result = short(lrs=[1e30, 0.01], optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr), keep=keep)
    (gone, _), (fine, _) = result.of("original", 1e30), result.of("original", 0.01)
    assert gone.diverged is not None
    assert gone.diverged <= 6
    assert gone.last == math.inf
    assert gone.steps_to(0.0) is None
    assert fine.diverged is None
    assert result.best_lr("original") == 0.01
    assert "diverged" in str(rz.Race("loss", 6, (0.9,), result.of("original", 1e30)))
    assert rz.Race.from_dict(json.loads(keep.read_text())).runs == result.runs  # strict JSON, no NaN


def test_an_evaluation_is_in_eval_mode_at_its_steps_and_the_metric_at_the_end() -> None:
    modes = []

    def halves(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return 1 / len(modes)

    result = short(["rezero"], seeds=[0], evaluate=halves, every=2, thresholds=[0.6, 0.4], metric=lambda model: 7.0)
    assert result.measured == "halves"
    assert result.runs[0].curve == ((2, 1.0), (4, 0.5), (6, 0.33333))
    assert [result.runs[0].steps_to(one) for one in (*result.thresholds, 0.1)] == [4, 6, None]
    assert result.runs[0].metric == 7.0
    assert modes == [(False, False)] * 3


def test_the_best_rate_is_the_one_that_gets_there_on_most_seeds_then_soonest() -> None:
    def run(lr: float, seed: int, *values: float) -> rz.Run:
        return rz.Run("a", lr, seed, tuple(enumerate(values, 1)), None, None, 1, 1.0)

    most = (run(0.1, 0, 5.0, 0.5), run(0.1, 1, 5.0, 3.0), run(0.2, 0, 5.0, 5.0, 0.5), run(0.2, 1, 5.0, 5.0, 0.5))
    assert rz.Race("loss", 3, (1.0,), most).best_lr("a") == 0.2
    sooner = (run(0.1, 0, 5.0, 0.5), run(0.2, 0, 5.0, 0.9, 0.1))
    assert rz.Race("loss", 3, (1.0, 0.7), sooner).best_lr("a") == 0.1
    with pytest.raises(rz.ConversionError, match="no run of 'b'"):
        rz.Race("loss", 3, (1.0,), sooner).best_lr("b")


def test_a_race_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    keep, new = tmp_path / "race.json", []

    def stop(run: rz.Run) -> None:
        if len(new) == 1:
            raise KeyboardInterrupt
        new.append(run)

    with pytest.raises(KeyboardInterrupt):
        short(keep=keep, on_run=stop)
    assert len(json.loads(keep.read_text())["runs"]) == 2
    done: list[rz.Run] = []
    result = short(keep=keep, on_run=done.append)
    assert [(run.method, run.seed) for run in done] == [("rezero", 0), ("rezero", 1)]
    assert [(run.method, run.seed) for run in result.runs] == [
        (name, seed) for name in ("original", "rezero") for seed in (0, 1)
    ]
    assert result.runs[0] == new[0]


def test_a_race_is_drawn_and_printed(tmp_path: Path) -> None:
    result = short(lrs=[0.01, 0.02])
    path = result.plot(tmp_path / "race.png", "a race")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = str(result)
    assert text.count("rezero") == 2  # in the table, and in the grid of learning rates
    assert "0.01 ┃ 0.02" in text


def test_the_shipped_tasks_take_every_method_that_they_name() -> None:
    """One step each, of the nets that are quick to build."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import tasks
    finally:
        sys.path.remove(str(EXAMPLES))
    for task in (tasks.dense_task(2), tasks.char_task(1), tasks.resnet_task(8)):
        settings = {**task.settings, "evaluate": None, "every": 1}
        result = rz.race(
            task.make_model, task.batches, task.methods, lrs=[1e-4], thresholds=[0.1], steps=1, seeds=[0], **settings
        )
        assert result.methods == tuple(task.methods)
        assert all(run.diverged is None for run in result.runs)


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = f"race.py fc32 --methods pre-norm rezero --seeds 1 --steps 3 --lrs 0.01 --out {tmp_path / 'r.json'}"
    found = subprocess.run([sys.executable, *command.split()], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert "rezero" in found.stdout
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 2
