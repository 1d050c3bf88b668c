"""The one graph that every capture produces: a `torch.fx.Graph` whose nodes know where they come from.

A capture yields a `Trace`. Its graph is at one granularity on every route: a leaf module of torch.nn is one
`call_module` node, other modules are inlined and appear as `Call`s, torch functions are `call_function` nodes, tensor
methods `call_method` nodes, parameters and buffers `get_attr` nodes. `origin(node)` is what the detector reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..plan import Place, Span
from .facts import Facts


class Frame(NamedTuple):
    """One level of the Python stack of model code at the moment of an operation or a module call."""

    place: Place
    """The outermost function holding the text (a nested function or comprehension belongs to its method)."""
    span: Span
    """The expression being evaluated."""
    owner: str | None
    """Path of the module that is the method's `self`; None for a plain function."""
    callers: tuple[Frame, ...] = ()
    """Of a method that methods of its own module have called: where they did, innermost first."""


@dataclass(eq=False, slots=True)
class Call:
    """One execution of a module (static route: of an analysed class)."""

    path: str
    """Module path from the root; "" for the root. A module outside the tree has path "<unregistered ClassName>"."""
    cls: str
    """Qualified name of the module's class."""
    facts: Facts
    parent: Call | None
    frames: tuple[Frame, ...] = ()
    """Where it was called: innermost frame first, up to and including the first that belongs to a module's method."""
    module: nn.Module | None = None
    inputs: list[fx.Node] = field(default_factory=list)
    """Nodes of the tensors among its arguments, in order."""
    outputs: list[fx.Node] = field(default_factory=list)
    """Nodes of the tensors it returned, in order."""
    bare: bool = True
    """Returned one tensor as it is, not in a tuple or the like, as far as is known."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from and what is known of its value. Stored in `node.meta["origin"]`."""

    call: Call
    """The innermost module execution around the operation; for a `call_module` node, around the leaf's call."""
    frames: tuple[Frame, ...]
    """Innermost first, up to and including the first that belongs to a module's method (as in `Call.frames`)."""
    facts: Facts
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    """None where unknown (static route) or where the value is a tuple."""
    written: Span | None = None
    """The line of the code that a graph was traced from, where its tracer has noted it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A captured model."""

    graph: fx.Graph
    root: Call
    calls: tuple[Call, ...]
    """Every module execution except leaves', in order of entry; the root first."""
    route: str
    """"recorded (fake tensors)", "recorded (meta tensors)", "recorded (real tensors)", "symbolic", "static"."""
    model: nn.Module | None = None
    notes: tuple[str, ...] = ()
    scalars: int = 0
    """Adds seen that involve no pair of tensors (number plus tensor)."""
    hidden: tuple[tuple[Frame, ...], ...] = ()
    """Where adds ran that no recorded call explains: code compiled by TorchScript, C++."""
    generated: Mapping[Span, Span] = field(default_factory=dict)
    """The expressions in code that torch.fx generated, each with the one that stands for all which were one text in
    the module's class."""
    classes: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    """The classes of the modules that generated code came from, by name."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that no recorded call made, by the names of their nodes: attributes that are no buffers, globals; a fake
    one is the result of a computation that was not seen. Not kept of a run on real tensors."""


def origin(node: fx.Node) -> Origin:
    found = node.meta["origin"]
    assert isinstance(found, Origin)
    return found
