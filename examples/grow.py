"""Growing a network while it trains: 6, then 12, then 24 layers, against 24 layers from the start, at equal compute.

Compute is counted in layer-steps (a step of 24 layers is 24 of them), a third of it for each depth. A character
Transformer without norms on Python's own text, Adam 0.002, no warm-up. `--out` keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from tasks import CharTransformer, bits_per_character, char_loss, text_batches
from torch import nn

import rezero_convert as rz

DEPTHS = (6, 12, 24)
IDS = torch.zeros(1, 8, dtype=torch.long)


def trained(depths: tuple[int, ...], total: int, seed: int) -> list[tuple[int, int, float]]:
    """(layer-steps, layers, bits a character on held-out text), eight times per depth."""
    torch.manual_seed(seed)
    model = rz.convert(CharTransformer(depths[0]), IDS, inplace=True, verify=False)
    optimizer = torch.optim.Adam(rz.param_groups(model, lr=2e-3, optimizer=torch.optim.Adam))
    batches, spent, curve = text_batches(seed), 0, []
    for depth in depths:
        if depth > len(model.layers):
            rz.grow(model, "layers", depth // len(model.layers), IDS, optimizer=optimizer, inplace=True)
        steps = total // len(depths) // depth
        for step in range(1, steps + 1):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            char_loss(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            spent += depth
            if step % max(1, steps // 8) == 0:
                with torch.no_grad():
                    curve.append((spent, depth, round(bits_per_character(model), 4)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="of 24 layers, to spend on each (default 120)")
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args()
    total = asked.steps * DEPTHS[-1]
    runs = {}
    for name, depths in (("grown 6, 12, 24", DEPTHS), ("24 from the start", DEPTHS[-1:])):
        runs[name] = [trained(depths, total, seed) for seed in range(asked.seeds)]
        ends = [run[-1][2] for run in runs[name]]
        print(f"{name}: bits a character after {total} layer-steps {mean(ends):.3f} ({', '.join(map(str, ends))})")
    if asked.out:
        asked.out.write_text(json.dumps({"total": total, "runs": runs}) + "\n")


if __name__ == "__main__":
    main()
