"""How fast should the gates learn? Steps to a training loss, by optimizer and by the gates' share of the learning rate.

A fully connected ReZero net of 16 layers, 32 wide, learns sin(x W) from fresh samples; three seeds; about a minute on
one core. Run it: `python examples/alpha_rates.py`.
"""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor, nn

import rezero_convert as rz

RATES = {"SGD": 0.1, "Adagrad": 0.01, "AdamW": 1e-3, "RMSprop": 1e-3, "Adafactor": 0.01}
TIMES = (0.1, 1, 10, 30, 100)
GOAL, STEPS = 0.1, 300


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def steps(name: str, times: float, seed: int) -> tuple[int | None, float]:
    """Steps until the running mean of the loss is below the goal, None if it never is, and the mean |alpha| then."""
    torch.manual_seed(seed)
    target = 0.4 * torch.randn(8, 4)
    plain = nn.Sequential(nn.Linear(8, 32), *(Block(32) for _ in range(16)), nn.Linear(32, 4))
    model = rz.convert(plain, torch.randn(4, 8), verify=False)
    rate = RATES[name]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(rz.param_groups(model, lr=rate, alpha_lr=times * rate), **options)
    running, found = 1.0, None
    for step in range(STEPS):
        x = torch.randn(64, 8)
        loss = (model(x) - torch.sin(x @ target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running = 0.9 * running + 0.1 * loss.item()
        if running < GOAL or running != running:
            found = step if running < GOAL else None
            break
    return found, mean(abs(alpha.item()) for _, alpha in rz.alphas(model))


if __name__ == "__main__":
    print(f"steps to a loss of {GOAL}, '-' if not in {STEPS}; mean |alpha| at the end")
    print("optimizer   rate   " + "".join(f"{f'gates x {times:g}':>26}" for times in TIMES))
    for name, rate in RATES.items():
        print(f"{name:10}  {rate:<6g}", end=" ", flush=True)
        for times in TIMES:
            runs = [steps(name, times, seed) for seed in range(3)]
            shown = ",".join("-" if found is None else str(found) for found, _ in runs)
            print(f"{shown + f'  ({mean(size for _, size in runs):.3f})':>26}", end="", flush=True)
        print()
