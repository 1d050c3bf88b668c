"""The figures of training that are kept: raw runs in `examples/results`, the README's tables, the orders claimed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from statistics import median

import pytest

import rezero_convert as rz

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"


def kept(name: str) -> rz.Race:
    return rz.Race.from_dict(json.loads((RESULTS / f"{name}.json").read_text()))


def steps(race: rz.Race, method: str, lr: float, threshold: float) -> float:
    """Median over at least three seeds; never counts as infinite."""
    runs = race.of(method, lr)
    assert len({run.seed for run in runs}) >= 3
    found = [run.steps_to(threshold) for run in runs]
    return median(math.inf if step is None else step for step in found)


def test_fully_connected_rezero_takes_as_many_steps_at_128_layers_as_at_32() -> None:
    few, many = (steps(kept(f"fc{depth}"), "ReZero", 0.01, 0.1) for depth in (32, 128))
    assert many <= 1.3 * few


def test_the_12_layer_transformer_is_faster_with_gates_than_with_norms() -> None:
    race = kept("char12")
    rezero, pre, post = (steps(race, name, 3e-3, 3.5) for name in ("ReZero", "pre-norm", "post-norm"))
    assert pre >= 1.4 * rezero
    assert post >= 1.5 * rezero


def test_resnet_56_is_faster_with_gates() -> None:
    race = kept("resnet56")
    assert steps(race, "vanilla", 0.1, 0.3) >= 1.8 * steps(race, "ReZero", 0.1, 0.3)


def test_the_readme_has_the_tables_that_the_script_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import reproduce

    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--print"])
    reproduce.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(printed) > 10
    assert [line for line in printed if line not in readme] == []


def test_the_deep_net_is_the_identity_with_gradients_for_all_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import reproduce

    found = reproduce._deep(40, 8, minutes=0)
    assert found["identity"]
    assert found["gradient"]
    assert found["live"] == 40
    assert found["losses"] == []


@pytest.mark.slow
def test_growing_spends_the_same_and_goes_through_all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import grow

    grown, whole = (grow.trained(depths, 192, seed=0) for depths in ((6, 12, 24), (24,)))
    assert sorted({depth for _, depth, _ in grown}) == [6, 12, 24]
    assert grown[-1][0] <= whole[-1][0] == 192


def test_the_readme_has_the_cost_of_conversions_that_the_script_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import convert_cost

    monkeypatch.setattr(sys, "argv", ["convert_cost.py", "--read", str(RESULTS / "convert_cost.json")])
    convert_cost.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(printed) > 10
    assert [line for line in printed if line not in readme] == []


def test_the_readme_has_the_figures_of_growing() -> None:
    kept = json.loads((RESULTS / "grow.json").read_text())
    ends = {name: [run[-1][2] for run in runs] for name, runs in kept["runs"].items()}
    grown, whole = (", ".join(f"{end:.3f}" for end in ends[name]) for name in ("grown 6, 12, 24", "24 from the start"))
    assert f"{grown} grown; {whole} from the start" in (ROOT / "README.md").read_text()
    assert max(ends["grown 6, 12, 24"]) < min(ends["24 from the start"])
