"""Train a converted GPT under FSDP2, with checkpoints by torch.distributed.checkpoint; started again, it resumes.

    torchrun --nproc-per-node 2 examples/distributed.py --checkpoints /somewhere

It runs on CPU (gloo), or on a GPU for each process (nccl). `--die-at N` kills the first process at step N.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, Block, GPTConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import rezero_convert as rz

CONFIG = GPTConfig(context=32, layers=4, heads=2, width=64)


def make_model(device: torch.device) -> nn.Module:
    """Converted on the meta device, sharded, and only then given memory: no process ever holds the whole model."""
    with torch.device("meta"):
        model = GPT(CONFIG)
    model = rz.convert(model, (torch.zeros(1, CONFIG.context, dtype=torch.long),))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        assert isinstance(block, Block)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)  # the gates are at 0 again; everything else is up to the model's own initialization
    # on CPU each process draws its own shards; on CUDA torch.distributed.tensor keeps one random stream for all
    torch.manual_seed(0 if device.type == "cuda" else dist.get_rank())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    model.apply(model._init_weights)
    return model


def batch_of(step: int, device: torch.device) -> torch.Tensor:
    """This process's part of a step's batch: token ids (8, context + 1)."""
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(0, len(text) - CONFIG.context - 1, (8,), generator=generator)
    return torch.stack([text[start : start + CONFIG.context + 1] for start in starts.tolist()]).to(device)


def checkpoints(folder: Path) -> list[Path]:
    """Finished ones, oldest first: the metadata is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder / f"step-{step:06d}")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def gates(model: nn.Module) -> Iterator[float]:
    for _, alpha in rz.alphas(model):
        value = alpha.full_tensor() if isinstance(alpha, DTensor) else alpha
        yield value.detach().item()


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    model = make_model(device)
    optimizer = torch.optim.AdamW(rz.param_groups(model, lr=2e-3, alpha_lr=1e-2, weight_decay=0.1))
    done, start = checkpoints(arguments.checkpoints), 0
    if done:
        start = load(done[-1], model, optimizer)
        say(f"resumed at step {start}")
    for step in range(start, arguments.steps):
        if step == arguments.die_at and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = batch_of(step, device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        mean = sum(map(abs, values := list(gates(model)))) / len(values)
        say(f"step {step}: loss {total.item() / dist.get_world_size():.4f}, mean|alpha| {mean:.5f}")
        if (step + 1) % arguments.save_every == 0:
            save(arguments.checkpoints, model, optimizer, step + 1)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="where they are written and found"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--die-at", type=int, default=-1, help="kill the first process at this step, to try resuming")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(arguments, torch.device("cuda" if cuda else "cpu"))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
