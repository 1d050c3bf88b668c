"""One of the processes of a small FSDP2 run, on CPU: prints what its tracker reads."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from zoo import stack

import rezero_convert as rz


def main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = rz.convert(stack(3), torch.randn(4, 8))
    for number, (_, alpha) in enumerate(rz.alphas(model)):
        alpha.data.fill_(0.25 * (number + 1))
    x = torch.randn(4, 8)
    plain = rz.AlphaTracker(model)
    model(x).square().mean().backward()
    wanted = plain.step()
    model.zero_grad()
    for block in list(model)[1:-1]:
        fully_shard(block)
    fully_shard(model)
    tracker = rz.AlphaTracker(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert all(isinstance(alpha, DTensor) for _, alpha in rz.alphas(model))
    for _ in range(2):
        model(x).square().mean().backward()
        got = tracker.step()
        optimizer.step()
        optimizer.zero_grad()
        for one, other in zip(got, wanted, strict=True):
            values = (one.gate, one.alpha, one.ratio, one.effect)
            assert values == (other.gate, other.alpha, *(approx(v) for v in (other.ratio, other.effect)))
    changes = tracker.ablate(lambda: model(x).square().mean())
    assert min(map(abs, changes.values())) > 0
    assert [float(alpha.full_tensor()) for _, alpha in rz.alphas(model)] == [0.25, 0.5, 0.75]
    print(json.dumps({"rank": rank, "gates": len(got)}))
    dist.destroy_process_group()


def approx(value: float | None) -> object:
    import pytest

    return pytest.approx(value, rel=1e-4)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
