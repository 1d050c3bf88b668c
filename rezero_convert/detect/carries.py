"""Highway networks: `x + T(x) * (F(x) - x)`, where `T(x) = sigmoid(W x + b)` carries the rest of the skip past F.

Source: Srivastava et al., "Training Very Deep Networks", 2015, eq. 3: `T(x) * F(x) + (1 - T(x)) * x`, with b < 0 at the
start.
"""

from __future__ import annotations

import ast

from torch import fx

from ..plan import Operand
from . import code
from .blocks import Block, Branch
from .flow import Flow
from .sums import Term


def problem(flow: Flow, block: Block, operands: dict[Term, Operand]) -> str | None:
    """Why the form has no place in the text of a block."""
    if len(block.branches) > 1:
        return "several branches are added to one skip, of which each would carry a part"
    (branch,) = block.branches
    add = flow.nodes[branch.term.add]
    if branch.term.negative or flow.name(branch.term.add) != "add" or "alpha" in add.kwargs or block.sum.inner:
        return "the branch is not added as it is, so that the skip cannot be taken from it"
    skip, at = operands[block.shortcut], operands[branch.term]
    written = code.operand(skip)
    while isinstance(written, ast.Attribute):
        written = written.value
    generated = skip.span in flow.trace.generated
    if skip.span != at.span or not (generated or isinstance(written, ast.Name)):
        return "the skip is not a variable at the add: its gate would compute it again"
    return None


def unread(flow: Flow, branch: Branch, trailing: int) -> str | None:
    """Why no layer can read the channels that so many dimensions follow; None if one can."""
    shape = flow.shape(branch.term.value)
    if not trailing or shape is None or (trailing + 2 == len(shape) and trailing < 4):
        return None
    return f"no layer of torch.nn has its channels in dimension {len(shape) - 1 - trailing} of {len(shape)}"


def layer(flow: Flow, block: Block) -> str | None:
    """The path of the layer that computes the carry gate of a block which has one."""
    if len(block.branches) > 1 or flow.name(block.branches[0].term.value) != "mul":
        return None
    product = flow.nodes[block.branches[0].term.value]
    gate, rest = (value if isinstance(value, fx.Node) else None for value in product.args[:2])
    if gate is None or rest is None or not _is(flow, gate, "sigmoid") or not _is(flow, rest, "sub"):
        return None
    (read,) = flow.inputs[flow.index[gate]]
    skip = block.shortcut.value
    if flow.facts[read].kind != "linear" or skip not in flow.inputs[read] or rest.args[1] is not flow.nodes[skip]:
        return None
    if flow.nodes[read].op == "call_module":
        return str(flow.nodes[read].target)
    paths = (flow.parameter(source) for source in flow.inputs[read])
    return next((path.rpartition(".")[0] for path in paths if path), None)


def _is(flow: Flow, node: fx.Node, name: str) -> bool:
    return flow.name(flow.index[node]) == name
