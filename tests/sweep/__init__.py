"""The zoo sweep: every model of torch.nn, torchvision, timm and transformers is built, converted and checked.

`python -m tests.sweep --zoo timm --out DIR` from the root of the repository; see `--help`.
"""

from __future__ import annotations
