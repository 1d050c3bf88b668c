"""With the Trainer of transformers: which gates it decays, how to keep it from doing so, and following them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import BY_NAME

import rezero_convert as rz

DECAY = 0.25


def model() -> nn.Module:
    case = BY_NAME["transformers gpt2"]
    return rz.convert(case.make(), case.inputs())


def trainer(net: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, weight_decay=DECAY, learning_rate=1e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    ids = torch.randint(3, 90, (8, 6))
    return Trainer(net, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids], **options)


def decays(optimizer: torch.optim.Optimizer, net: nn.Module) -> set[float]:
    gates = {id(alpha) for _, alpha in rz.alphas(net)}
    return {group["weight_decay"] for group in optimizer.param_groups for one in group["params"] if id(one) in gates}


def test_left_to_itself_it_decays_the_gates(tmp_path: Path) -> None:
    net = model()
    assert decays(trainer(net, tmp_path).create_optimizer(), net) == {DECAY}


def test_an_optimizer_on_param_groups_does_not_and_is_used(tmp_path: Path) -> None:
    net = model()
    groups = rz.param_groups(net, lr=1e-3, alpha_lr=1e-2, weight_decay=DECAY)
    run = trainer(net, tmp_path, optimizers=(torch.optim.AdamW(groups), None))
    run.train()
    assert decays(run.optimizer, net) == {0.0}
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-2]
    assert all(alpha.item() for _, alpha in rz.alphas(net))


def test_a_class_and_its_arguments_work_as_well(tmp_path: Path) -> None:
    net = model()
    groups = rz.param_groups(net, lr=1e-3, alpha_lr=1e-2, weight_decay=DECAY)
    run = trainer(net, tmp_path, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))
    assert decays(run.create_optimizer(), net) == {0.0}


@pytest.mark.parametrize("every", [1, 2])
def test_the_callback_reads_the_gates_with_their_gradients(tmp_path: Path, every: int) -> None:
    net = model()
    tracker = rz.AlphaTracker(net, every=every)
    trainer(net, tmp_path, callbacks=[tracker.callback()]).train()
    steps = list(dict.fromkeys(reading.step for reading in tracker.readings))
    assert steps == ([1, 2, 3] if every == 1 else [1, 2])
    assert all(reading.effect is not None and reading.ratio is not None for reading in tracker.readings)
    last = [reading for reading in tracker.readings if reading.step == 2]
    assert all(reading.ratio and reading.alpha for reading in last)
    assert not net._forward_pre_hooks
