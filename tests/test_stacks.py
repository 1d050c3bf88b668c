"""Converted models in training stacks: the README's table names these tests."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import torch
import torch.multiprocessing as mp
from distributed_workers import IDS, converted, gates, gpt, loss_of, trained
from test_checkpoints import gpt2, llama, moved, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rezero_convert as rz
from examples.gpt import Block
from rezero_convert.rewrite.modules import rezero_gate


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_gradients(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = list(gradients(model).values()), list(gradients(other).values())
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@functools.cache
def _llama() -> Any:
    return moved(rz.convert(llama()))


@pytest.fixture
def converted_llama() -> Any:
    return copy.deepcopy(_llama())


def test_the_table_in_the_readme_names_tests() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text.partition("## Training stacks")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows[1:]]
    assert len(named) > 20
    assert all(named)
    assert {name for names in named for name in names} <= {name for name in globals() if name.startswith("test_")}


# --- two processes ---


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawned(tmp_path_factory.mktemp("two"), workers.TORCH)


def spawned(folder: Path, scenarios: Any) -> dict[str, Any]:
    mp.spawn(workers.work, (folder, scenarios), nprocs=2)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def found(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["found"]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The gates that one process gets with the whole batch."""
    values = trained(converted(), IDS)
    assert min(map(abs, values)) > 1e-6
    return values


def test_ddp(two_processes: dict[str, Any], alone: list[float]) -> None:
    assert "not used in producing loss" in found(two_processes, "ddp_with_an_unused_parameter")
    assert found(two_processes, "ddp") == pytest.approx(alone, rel=1e-3)


def test_fsdp2(two_processes: dict[str, Any], alone: list[float]) -> None:
    assert found(two_processes, "fsdp2") == pytest.approx(alone, rel=1e-3)


def test_fsdp2_in_mixed_precision(two_processes: dict[str, Any]) -> None:
    assert found(two_processes, "fsdp2_in_mixed_precision") == [["torch.bfloat16"], True]


def test_fsdp2_from_the_meta_device(two_processes: dict[str, Any]) -> None:
    assert found(two_processes, "fsdp2_from_the_meta_device") == [0.25] * 4


def test_fsdp2_with_a_distributed_checkpoint(two_processes: dict[str, Any], alone: list[float]) -> None:
    saved, loaded = found(two_processes, "fsdp2_with_a_distributed_checkpoint")
    assert saved == loaded == pytest.approx(alone, rel=1e-3)


def test_fsdp1(two_processes: dict[str, Any], alone: list[float]) -> None:
    wrapped, values = found(two_processes, "fsdp1")
    assert wrapped == [True, True]
    assert values == pytest.approx(alone, rel=1e-3)


def test_tensor_parallel(two_processes: dict[str, Any], alone: list[float]) -> None:
    assert found(two_processes, "tensor_parallel") == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_the_tensor_parallel_plan_of_transformers(tmp_path: Path) -> None:
    results = spawned(tmp_path, workers.TRANSFORMERS)
    (apart, ours), (apart_later, _), expected = found(results, "transformers_tensor_parallel")
    assert apart < 1e-5
    assert apart_later < 1e-5
    assert ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_distributed_example_resumes_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/distributed.py", "--steps", "6", "--save-every", "2"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}

    def launch(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    whole = launch("--checkpoints", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    killed = launch("--checkpoints", str(tmp_path / "killed"), "--die-at", "5")
    assert killed.returncode != 0
    assert "step 5:" not in killed.stdout
    resumed = launch("--checkpoints", str(tmp_path / "killed"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 4" in resumed.stdout
    assert "step 3:" not in resumed.stdout
    assert [line for line in whole.stdout.splitlines() if line.startswith("step")][-2:] == [
        line for line in resumed.stdout.splitlines() if line.startswith("step")
    ]


# --- one process ---


def test_activation_checkpointing() -> None:
    model = moved(converted())
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
    assert all(isinstance(block, CheckpointWrapper) for block in wrapped.blocks)
    runs: list[int] = []
    wrapped.blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for one in (model, wrapped, by_hand):
        loss_of(one, IDS).backward()
    assert len(runs) == 2
    assert_equal_gradients(wrapped, model)
    assert_equal_gradients(by_hand, model)


def test_what_a_gate_keeps_for_its_gradient_goes_under_checkpointing() -> None:
    """Its branch's output: the add alone keeps nothing."""

    def kept(model: Any) -> int:
        outputs: list[StorageWeakRef] = []
        for block in model.blocks:
            for branch in (block.attn, block.mlp):
                branch.register_forward_hook(lambda _, args, out: outputs.append(StorageWeakRef(out.untyped_storage())))
        loss = loss_of(model, IDS)
        assert len(outputs) == 4
        alive = sum(not output.expired() for output in outputs)
        loss.backward()
        return alive

    saving = moved(converted())
    apply_activation_checkpointing(saving, check_fn=lambda module: isinstance(module, Block))
    assert (kept(gpt()), kept(moved(converted())), kept(saving)) == (0, 4, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 6 is to rename it
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(converted_llama: Any, reentrant: bool) -> None:
    model, saving = converted_llama, copy.deepcopy(converted_llama)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    runs: list[int] = []
    saving.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for one in (model, saving):
        one.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(runs) == 2
    assert_equal_gradients(saving, model)


def test_gradient_accumulation() -> None:
    model = moved(converted())
    parts = copy.deepcopy(model)
    loss_of(model, IDS).backward()
    for half in IDS.chunk(2):
        (loss_of(parts, half) / 2).backward()
    assert_equal_gradients(parts, model)


def test_the_gate_sums_its_gradient_in_single_precision() -> None:
    branch, alpha, plain = torch.ones(400, 400, dtype=torch.float16), torch.zeros(1), torch.zeros(1)
    alpha.requires_grad_()
    plain.requires_grad_()
    rezero_gate(alpha, branch).backward(torch.ones_like(branch))
    (plain.half() * branch).backward(torch.ones_like(branch))
    assert alpha.grad is not None
    assert plain.grad is not None
    assert alpha.grad.item() == 160000
    assert plain.grad.isinf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (400,)])
def test_without_gradients_a_gate_gives_the_same_numbers_in_one_operation(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    branch, alpha = torch.randn(300, 400, dtype=dtype), torch.randn(shape, dtype=dtype).requires_grad_()
    kept = rezero_gate(alpha, branch)
    with torch.no_grad(), torch.profiler.profile() as profile:
        plain = rezero_gate(alpha, branch)
    assert torch.equal(kept, plain)
    assert kept.requires_grad
    assert [event.name for event in profile.events() or () if event.name.startswith("aten::")] == ["aten::mul"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    model, reference = moved(converted()), moved(converted())
    original, types = gpt(), []
    for one in (original, model):
        seen: list[torch.dtype] = []
        types.append(seen)
        for block in one.blocks:
            block.register_forward_hook(lambda _, args, out, seen=seen: seen.extend([args[0].dtype, out.dtype]))
    optimizer = torch.optim.AdamW(rz.param_groups(model, lr=1e-3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=dtype):
        original(IDS)
        loss = loss_of(model, IDS)
    loss_of(reference, IDS).backward()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert types[0] == types[1]
    for (_, alpha), (_, exact) in zip(rz.alphas(model), rz.alphas(reference), strict=True):
        torch.testing.assert_close(alpha.grad, exact.grad, rtol=0.05, atol=1e-3)
    before = gates(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    assert gates(model) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_stream(dtype: torch.dtype) -> None:
    model = converted().to(dtype)
    for _, alpha in rz.alphas(model):
        alpha.data = alpha.data.float()  # a gate of its own precision
    assert model(IDS).dtype == dtype


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_makes_one_graph_for_all_lengths_and_gates() -> None:
    counts = []
    for model in (gpt(), moved(converted())):
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for length in (15, 8, 12):
            other, some = copy.deepcopy(model), IDS[:, :length].contiguous()
            loss_of(compiled, some).backward()
            loss_of(other, some).backward()
            assert_equal_gradients(compiled, other)
            model.zero_grad()
            with torch.no_grad():
                for _, alpha in rz.alphas(model):
                    alpha.add_(0.125)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_inductor() -> None:
    model = moved(converted())
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS), model(IDS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["transformer", "resnet"])
def test_compiled_gates_call_no_kernel_of_their_own_but_the_sum_of_their_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "benchmarks"))
    import gate_cost

    forms, x = gate_cost.models(name, layers=1, width=16)
    number = len(dict(rz.alphas(forms["converted"])))
    wanted = x.clone().requires_grad_()
    train = {key: gate_cost.kernels(gate_cost.step(torch.compile(form), wanted)) for key, form in forms.items()}
    runs = {key: gate_cost.kernels(gate_cost.inference(torch.compile(form), x)) for key, form in forms.items()}
    assert runs["converted"] == runs["no gate"] > 1
    assert train["converted"] == train["hand-written"]
    assert runs["no gate"] < train["no gate"] <= train["converted"] <= train["no gate"] + number


def test_export_with_a_dynamic_length() -> None:
    model = moved(converted()).eval()
    length = torch.export.Dim("length", min=2, max=16)
    exported = torch.export.export(model, (IDS,), dynamic_shapes=({1: length},))
    assert {name for name, _ in rz.alphas(model)} <= set(exported.state_dict)
    for some in (IDS, IDS[:, :5]):
        torch.testing.assert_close(exported.module()(some), model(some))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention has no batching rule on CPU
def test_functional_call_and_vmap() -> None:
    model = moved(converted())
    others = {name: value + 0.5 for name, value in rz.alphas(model)}
    assert not torch.equal(functional_call(model, others, (IDS,)), model(IDS))
    models = [moved(converted(), value) for value in (0.25, 0.75)]
    stacked, _ = stack_module_state(models)
    outputs = vmap(lambda parameters: functional_call(model, parameters, (IDS,)))(stacked)
    for one, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(output, one(IDS))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],)).square().mean()

    per_sample = vmap(grad(loss), (None, 0))(parameters, IDS)
    loss(parameters, IDS[1]).backward()
    for name, alpha in rz.alphas(model):
        torch.testing.assert_close(per_sample[name][1], alpha.grad)


def test_averaged_model() -> None:
    model = moved(converted(), 0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)
    start = gates(model)
    with torch.no_grad():
        for _, alpha in rz.alphas(model):
            alpha.add_(1.0)
    average.update_parameters(model)
    assert gates(average) == pytest.approx([value + 0.25 for value in start])


def test_parametrizations_before_and_after_conversion() -> None:
    def parametrized(model: Any) -> Any:
        for block in model.blocks:
            parametrizations.weight_norm(block.mlp.proj)
            parametrizations.spectral_norm(block.attn.proj)
        return model.eval()

    model = parametrized(gpt())
    assert torch.equal(rz.convert(model, IDS, alpha_init="preserve")(IDS), model(IDS))
    for one in (rz.convert(model, IDS), parametrized(converted())):
        assert len(dict(rz.alphas(one))) == 4
        assert rz.validate(one, IDS).ok
        moved(one).train()
        loss_of(one, IDS).backward()
        assert all(alpha.grad is not None and alpha.grad.any() for _, alpha in rz.alphas(one))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by names that 6 is to rename
def test_lora_on_a_converted_model(converted_llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    base, expected = copy.deepcopy(converted_llama), run(converted_llama)
    model = peft.get_peft_model(converted_llama, config)
    assert torch.equal(run(model), expected)
    assert not any(alpha.requires_grad for _, alpha in rz.alphas(model))  # peft freezes all but its own
    assert any("frozen" in failure for failure in rz.validate(model, {"input_ids": IDS}).failures)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(run(loaded), run(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), run(loaded))
    assert len(dict(rz.alphas(merged))) == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gates_go_beside_the_adapter(converted_llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    base = copy.deepcopy(converted_llama)
    model = peft.get_peft_model(converted_llama, config)
    for _, alpha in rz.alphas(model):
        alpha.requires_grad_(True)
    assert rz.validate(model, {"input_ids": IDS}).ok
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    start = gates(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(one != other for one, other in zip(gates(model), start, strict=True))
    model.save_pretrained(tmp_path)
    torch.save(dict(rz.alphas(model)), tmp_path / "alphas.pt")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert gates(loaded) == start
    assert not loaded.load_state_dict(torch.load(tmp_path / "alphas.pt"), strict=False).unexpected_keys
    assert torch.equal(run(loaded), run(model))
    assert gates(loaded.merge_and_unload()) == gates(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_conversion_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    model = peft.get_peft_model(llama(), config)
    made = rz.convert(model, {"input_ids": IDS}, alpha_init="preserve")
    assert isinstance(made, peft.PeftModel)
    assert torch.equal(run(made), run(model))
    assert len(dict(rz.alphas(made))) == 4
    assert all(alpha.requires_grad for _, alpha in rz.alphas(made))


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = converted()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(rz.param_groups(model, lr=1e-2)))
    for half in (*IDS.chunk(2), *IDS.chunk(2)):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, half))
            optimizer.step()
            optimizer.zero_grad()
    values = gates(model)
    assert all(values)
    accelerator.save_state(str(tmp_path))
    moved(accelerator.unwrap_model(model))
    accelerator.load_state(str(tmp_path))
    assert gates(model) == values


@pytest.mark.filterwarnings("ignore")  # of Trainer and its data loaders
def test_trainer_resumes_and_its_checkpoints_load(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = rz.convert(gpt2(layers=1))
    data = [{"input_ids": row, "labels": row} for row in IDS] * 4
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(str(tmp_path), **settings, use_cpu=True, report_to=[], disable_tqdm=True)
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    Trainer(model, arguments, train_dataset=data).train()
    assert all(gates(model))
    Trainer(other, arguments, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert gates(other) == gates(model)
    loaded = rz.from_pretrained(type(gpt2()), tmp_path / "checkpoint-4")
    assert gates(loaded) == gates(model)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("folded", [True, False])
def test_quantization(converted_llama: Any, folded: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own imports
        quantization = pytest.importorskip("torchao.quantization")
    model = rz.fold(converted_llama) if folded else copy.deepcopy(converted_llama)
    assert len(dict(rz.alphas(model))) == (0 if folded else 4)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.down_proj.weight.data).__name__ == "Int8Tensor"
    expected = run(converted_llama)
    assert (run(model) - expected).abs().max() < 0.02 * expected.abs().max()
