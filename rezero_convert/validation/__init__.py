"""Does a converted model hold what ReZero promises? Measured on its own activations and gradients.

For every block, with all gates set to 0 (and restored afterwards), in eval and in train mode: the sum equals the skip
(identity), the gradient that leaves the block equals the one that comes in (vjp: a ReLU left after the add passes the
first check and fails this one), the branch is finite and not zero, the gate gets a gradient from a random cotangent at
the block's own output (alive), and the branch's weights get one from the branch (branch-alive). For the whole: every
gate is a trainable parameter and is read as the gate of a branch, every dropped norm is gone, and what is reached
through gates only does not change with the branches' weights (sealed).

`equality` and `idempotence` are the two oracles that take more than the converted model, or another look at it.
"""

from __future__ import annotations

from .equality import equality, idempotence
from .results import BlockResult, Check, Validation
from .whole import validate

__all__ = ["BlockResult", "Check", "Validation", "equality", "idempotence", "validate"]
