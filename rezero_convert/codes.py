"""The stable codes of verdicts: RZ1xx are blocks, RZ9xx say why an add is not one or stays as it is."""

from __future__ import annotations

CODES: dict[str, str] = {
    "RZ101": "identity skip: the block is x + F(x)",
    "RZ102": "projection shortcut: the block is S(x) + F(x), S without a nonlinearity",
    "RZ103": "skip through a slice: the block is x[...] + F(x)",
    "RZ110": "a learnable gate that was there becomes the ReZero gate",
    "RZ120": "already a ReZero block, left alone",
    "RZ121": "its gate was folded into the branch's weights",
    "RZ122": "its norm is already where the method has it, left alone",
    "RZ130": "long skip: spans blocks of its own stream",
    "RZ131": "interior: inside another block's branch",
    "RZ140": "not executed: on a path that the run did not take",
    "RZ141": "hidden: ran outside Python, seen in the dispatcher only",
    "RZ900": "left out by a pattern, or by a comment `# rezero: skip`",
    "RZ901": "the operands are independent of each other",
    "RZ902": "the branch holds no linear or convolution weight",
    "RZ903": "parallel linear paths, no skip among them",
    "RZ904": "no operand is a skip within the module that adds",
    "RZ905": "merges resolutions: there is upsampling between the operands",
    "RZ906": "the shapes differ: one operand is broadcast",
    "RZ907": "adds a parameter or a constant",
    "RZ908": "has an input-dependent gate that starts at zero: already the identity",
    "RZ909": "the add is not in the model's own code, or its source text cannot be had",
    "RZ910": "adds a tensor to itself",
    "RZ911": "a loop or a shared call: which alpha belongs to it cannot be decided",
    "RZ912": "a form of source text that cannot be edited",
    "RZ913": "the branch cannot be made nonzero, so its alpha would never get a gradient",
    "RZ914": "depends on the skip only through detach, masks, shapes, indices or the size of noise",
    "RZ915": "cannot be decided without running the model: pass --model and --inputs",
    "RZ916": "a merge inside a larger structure: the sum is not what the module returns",
    "RZ917": "shares its text with an instance that cannot be gated",
    "RZ918": "half of a reversible pair of adds",
    "RZ919": "a block that the method's form cannot be written for",
    "RZ920": "an operand comes from a computation that is not seen: whether it depends on the skip cannot be told",
}

BLOCKS_LEFT = frozenset({"RZ900", "RZ909", "RZ911", "RZ912", "RZ913", "RZ918", "RZ919"})
"""Refusals of what is a residual block."""
