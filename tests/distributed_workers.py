"""What two processes do for `test_stacks.py`: each function trains a converted GPT in one way, and returns findings."""

from __future__ import annotations

import copy
import functools
import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 - torchvision's operators, which transformers may import
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard, wrap
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rezero_convert as rz
from examples.gpt import GPT, Block, GPTConfig

IDS = torch.arange(64).reshape(4, 16) % 50
TIMEOUT = timedelta(seconds=30)
CONFIG = GPTConfig(vocab_size=50, context=16, layers=2, heads=2, width=16)


def gpt() -> GPT:
    """A small one, always the same."""
    torch.manual_seed(0)
    return GPT(CONFIG)


@functools.cache
def _converted() -> nn.Module:
    return rz.convert(gpt(), IDS)


def converted() -> nn.Module:
    return copy.deepcopy(_converted())


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained(model: nn.Module, ids: Tensor) -> list[float]:
    """Gates after a few steps."""
    train(model, ids)
    return gates(model)


def train(model: nn.Module, ids: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()


def gates(model: nn.Module) -> list[float]:
    return [whole(alpha).item() for _, alpha in rz.alphas(model)]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def mine() -> Tensor:
    """This process's half of the batch."""
    return IDS[2 * dist.get_rank() :][:2]


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def ddp(folder: Path) -> Any:
    return trained(DistributedDataParallel(converted()), mine())


def ddp_with_an_unused_parameter(folder: Path) -> Any:
    """What the scenario above must be able to show."""
    model = converted()
    model.unused = nn.Parameter(torch.zeros(1))
    try:
        train(DistributedDataParallel(model), mine())
    except RuntimeError as error:
        return str(error)
    return ""


def fsdp2(folder: Path) -> Any:
    model = sharded(converted())
    assert all(isinstance(block, FSDPModule) and isinstance(block, Block) for block in model.blocks)
    return trained(model, mine())


def fsdp2_in_mixed_precision(folder: Path) -> Any:
    model = sharded(converted(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen: set[str] = set()
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.update(str(x.dtype) for x in (*args, out)))
    loss_of(model, mine()).backward()
    finite = all(bool(whole(alpha.grad).isfinite().all()) for _, alpha in rz.alphas(model))
    return [sorted(seen), finite]


def fsdp2_from_the_meta_device(folder: Path) -> Any:
    with torch.device("meta"):
        model = GPT(CONFIG)
    model = sharded(rz.convert(model, IDS, alpha_init=0.25))
    model.to_empty(device="cpu")
    return gates(model)


def fsdp2_with_a_distributed_checkpoint(folder: Path) -> Any:
    model = sharded(converted())
    expected = trained(model, mine())
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "dcp")
    again = sharded(converted())
    assert gates(again) != expected
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(again, state)
    return [expected, gates(again)]


def fsdp1(folder: Path) -> Any:
    policy = functools.partial(wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block})
    model = FullyShardedDataParallel(
        converted(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    wrapped = [isinstance(block, FullyShardedDataParallel) for block in model.blocks]
    train(model, mine())
    with FullyShardedDataParallel.summon_full_params(model):
        return [wrapped, gates(model)]


def tensor_parallel(folder: Path) -> Any:
    model, mesh = converted(), init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"mlp.fc": ColwiseParallel(), "mlp.proj": RowwiseParallel()})
    assert isinstance(model.blocks[0].mlp.fc.weight, DTensor)
    return trained(model, IDS)


TORCH: tuple[Callable[[Path], Any], ...] = (
    ddp,
    ddp_with_an_unused_parameter,
    fsdp2,
    fsdp2_in_mixed_precision,
    fsdp2_from_the_meta_device,
    fsdp2_with_a_distributed_checkpoint,
    fsdp1,
    tensor_parallel,
)


def transformers_tensor_parallel(folder: Path) -> Any:
    """A converted Llama loaded under its own tensor-parallel plan, and one that is converted under it."""
    from test_checkpoints import IDS, llama, moved, run
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    plain, found = llama(), []
    model = moved(rz.convert(plain))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "converted")
        plain.save_pretrained(folder / "plain")
    dist.barrier()
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    loaded = rz.from_pretrained(LlamaForCausalLM, folder / "converted", **plan)
    later = LlamaForCausalLM.from_pretrained(folder / "plain", **plan)
    rz.convert(later, alpha_init="preserve", inplace=True)
    for one, expected in ((loaded, run(model)), (later, run(plain))):
        assert isinstance(one.model.layers[0].mlp.down_proj.weight, DTensor)
        difference = (run(one) - expected).abs().max().item()
        one(input_ids=IDS, labels=IDS).loss.backward()
        found.append([difference, [alpha.grad.item() for _, alpha in rz.alphas(one)]])
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [*found, [alpha.grad.item() for _, alpha in rz.alphas(model)]]


TRANSFORMERS: tuple[Callable[[Path], Any], ...] = (transformers_tensor_parallel,)


def work(rank: int, folder: Path, scenarios: tuple[Callable[[Path], Any], ...]) -> None:
    """Run the scenarios in one of two processes; the first writes what came out, or the traceback, to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=TIMEOUT)
    results: dict[str, Any] = {}
    for scenario in scenarios:
        try:
            results[scenario.__name__] = {"found": scenario(folder)}
        except Exception:  # the other scenarios are to run all the same
            results[scenario.__name__] = {"error": traceback.format_exc(limit=-6)}
        dist.barrier()
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
