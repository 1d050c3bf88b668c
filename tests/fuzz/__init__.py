"""Random architectures whose truth is known, through every route; and real files, mutated.

`python -m tests.fuzz --examples N --seed S` from the root of the repository draws N models, checks each and prints what
failed, with its text; `--mutants N` does the same for N mutations of model files of timm and torchvision. See `--help`.

- `writing`, `branches`, `blocks`, `decoys`, `models`: the generator. It writes the text of a file and knows of each add
  what it is.
- `oracles`: what must hold for every model and route.
- `mutations`: statements of real files deleted, doubled, swapped.
"""

from __future__ import annotations
