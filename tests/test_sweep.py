"""The zoo sweep: that its checks and its pool can fail, and a fast slice of it."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import pytest
import torch
from sweep import checks, hf, pool, record, table
from sweep.__main__ import distinct, main
from sweep.made import Attempt, NotRunnable, first_that_runs
from sweep.record import Kind, Record
from torch import nn

import rezero_convert as rz
from rezero_convert.rewrite import modules


def crash_or_hang(zoo: str, name: str, kind: Kind) -> Record:
    if name == "crash":
        os._exit(7)
    if name == "hang":
        time.sleep(600)
    return Record(zoo, name, kind, "ok")


def test_a_crash_and_a_hang_are_failures_and_the_rest_goes_on(tmp_path: Path) -> None:
    tasks: list[pool.Task] = [("x", name, "numbers") for name in ("crash", "one", "hang", "two")]
    records = {one.name: one for one in pool.run(tasks, crash_or_hang, 2, 20, 16, tmp_path / "log")}
    assert {name: one.status for name, one in records.items()} == {
        "crash": "failed", "one": "ok", "hang": "failed", "two": "ok",
    }  # fmt: skip
    assert records["crash"].reasons == ("crash: exit code 7",)
    assert records["hang"].reasons == ("timeout: 20 s",)


_PREPARED: list[str] = []


def prepare() -> None:
    _PREPARED.append("once")


def prepared(zoo: str, name: str, kind: Kind) -> Record:
    return Record(zoo, name, kind, "ok", tuple(_PREPARED))


def test_a_process_is_prepared_once_for_all_its_tasks(tmp_path: Path) -> None:
    tasks: list[pool.Task] = [("x", "one", "text"), ("x", "two", "text")]
    records = pool.run(tasks, prepared, 1, 60, 16, tmp_path / "log", prepare)
    assert [one.reasons for one in records] == [("once",), ("once",)]


def _accounts(model: nn.Module, converted: nn.Module) -> list[str]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = modules.record(converted)
    assert plan is not None
    return list(checks._accounted(model, before, converted, plan))


def _encoder() -> tuple[nn.Module, torch.Tensor]:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)


def test_state_dict_accounting_sees_what_the_plan_does_not_say() -> None:
    model, x = _encoder()
    converted = rz.convert(model, x)
    assert _accounts(model, converted) == []
    more = copy.deepcopy(converted)
    more.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert _accounts(model, more) == ["extra was added, the plan does not say so"]
    less = copy.deepcopy(converted)
    del less.linear1
    assert any(line.startswith("linear1.weight is gone") for line in _accounts(model, less))
    other = copy.deepcopy(converted)
    nn.init.ones_(other.linear1.weight)
    assert _accounts(model, other) == ["linear1.weight has another value or form"]
    kept = copy.deepcopy(converted)
    kept.norm1 = nn.LayerNorm(8)
    assert "norm1.weight of a dropped norm is there" in _accounts(model, kept)
    gone = copy.deepcopy(converted)
    del gone.alpha_linear2
    assert _accounts(model, gone) == ["alpha_linear2 is in the plan and was not added"]


def test_a_given_model_that_changes_is_told() -> None:
    model, _ = _encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nn.init.ones_(model.linear1.weight)
    assert list(checks._unchanged(model, before)) == ["linear1.weight of the given model changed"]


def test_what_does_not_run_is_no_failure() -> None:
    def broken() -> nn.Module:
        raise ValueError("no such size")

    with pytest.raises(NotRunnable, match="first: ValueError: no such size"):
        first_that_runs([Attempt(broken, (lambda model: torch.ones(1),), "first")], "cpu")


def test_results_are_resumed_from_their_latest_record(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for status in ("failed", "ok"):
        record.append(file, Record("nn", "LSTM", "numbers", status, reasons=("a", "b")))
    with file.open("a") as stream:
        stream.write('{"zoo": "nn", "na')  # cut off
    found = record.load(file)
    assert found == {("nn", "LSTM", "numbers"): Record("nn", "LSTM", "numbers", "ok", reasons=("a", "b"))}


def test_the_table_counts_what_runs_and_names_every_failure() -> None:
    records = [
        Record("timm", "a", "numbers", "ok", gates=3),
        Record("timm", "b", "numbers", "failed", ("preserve: output 0 differs",)),
        Record("timm", "c", "numbers", "does not run", ("no kernel",)),
    ]
    text = table.markdown(records)
    assert "| timm | numbers (all oracles) | 1/2 | 50.0 % | 3 | 0.0 | 1 |" in text
    assert "| timm b | numbers | preserve: output 0 differs |" in text
    assert "| timm c | numbers | no kernel |" in text


def test_one_model_a_signature_is_run_with_numbers() -> None:
    sizes = {"big": ("s", 9), "small": ("s", 3), "other": ("t", 5)}
    records = [
        Record("timm", name, "structure", "ok", signature=signature, parameters=size, gates=1)
        for name, (signature, size) in sizes.items()
    ]
    assert distinct(records) == ["other", "small"]


def test_kinds_of_layers_are_kept_when_a_configuration_is_shrunk() -> None:
    assert hf._few(["linear", "linear", "full", "linear"], 2) == ["linear", "full"]
    assert hf._few([1, 1, 1], 2) == [1, 1]


SLICE = [
    ("nn", "TransformerDecoderLayer pre-norm gelu", "numbers", 3),
    ("torchvision", "resnet18", "numbers", 8),
    ("torchvision", "resnet152", "structure", 50),
    ("timm", "levit_128s", "structure", 2 * (2 + 3 + 4) + 2),
    ("timm", "vit_huge_patch14_224", "structure", 2 * 32),
    ("transformers", "LlamaForCausalLM", "numbers", 2 * 2),
    ("transformers", "CLIPModel", "numbers", 2 * 2 * 2),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("source", "name", "kind", "gates"), SLICE, ids=[one[1] for one in SLICE])
def test_slice(source: str, name: str, kind: Kind, gates: int) -> None:
    found = checks.examine(source, name, kind)
    assert (found.status, found.reasons, found.gates) == ("ok", (), gates)


def test_the_command_writes_results_and_table(tmp_path: Path) -> None:
    arguments = ["--zoo", "nn", "--only", "LSTM", "--numbers", "only", "--out", str(tmp_path), "--resume"]
    assert main(arguments) == 0
    assert main(arguments) == 0  # nothing left to do
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert "| nn | numbers (all oracles) | 1/1 |" in (tmp_path / "coverage.md").read_text()
