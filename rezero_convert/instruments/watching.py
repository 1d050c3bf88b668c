"""What the branches weigh against the stream, read off an ordinary forward pass of training."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..rewrite.modules import record

_PRODUCTS = frozenset({"mul", "multiply", "mul_", "multiply_"})
_SUMS = frozenset({"add", "add_", "sub", "sub_"})
_FUSED = frozenset({"addcmul", "addcmul_"})
_SAME = frozenset(
    "to type type_as float double half bfloat16 view reshape unsqueeze expand contiguous clone dropout alpha_dropout "
    "feature_dropout permute transpose flatten unflatten getitem div div_ neg "
    "_to_copy movedim squeeze view_as expand_as detach roll slice narrow".split()
)
"""Operations that pass a gate, or a gated branch, on."""


def blocks_of(model: nn.Module) -> dict[str, object]:
    """The gates of a model by name, with what tells their block: gates of parallel branches have the same."""
    found: dict[str, object] = {}
    for prefix, module in model.named_modules():
        plan = record(module)
        for site in plan.sites if plan is not None else ():
            for gate in site.gates:
                for name in gate.parameters():
                    parts = (prefix, site.path, name)
                    found.setdefault(".".join(part for part in parts if part), (prefix, site.path, site.span))
    return found


class Watch(TorchFunctionMode):
    """While it is on, notes |gated branch| / |skip| of each residual add, the norms of all elements (Frobenius).

    A gate is followed from its parameter to the product, the product to the add: three to five more kernels a block. A
    gate that is used in several adds (a tied module, one alpha a layer) has the root mean square of their ratios.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, object]) -> None:
        super().__init__()
        self._where = {name: _holder(model, name) for name in names}
        self._blocks = names
        self._gates: dict[int, tuple[Tensor, str]] = {}
        self._others: dict[int, Tensor] = {}
        self._products: dict[int, tuple[Tensor, str, Tensor]] = {}
        """Gated branches, with their norms, on their way to the add."""
        self._last: tuple[Tensor, Tensor, str] | None = None
        """The last sum, the norm of its skip, and a gate of its block."""
        self._found: dict[str, list[Tensor]] = {}

    def ratios(self) -> dict[str, Tensor]:
        """By gate, 0-d tensors; a gate that was in no add of this form is left out."""
        return {name: torch.stack(found).square().mean().sqrt() for name, found in self._found.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).partition(".")[0].strip("_")
        name = name.removeprefix("r" if name in ("radd", "rmul", "rsub") else "")
        name = name.removeprefix("i" if name in ("iadd", "imul", "isub") else "")
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if name in _SUMS and len(tensors) == 2:
            return self._sum(tensors, lambda: func(*args, **kwargs))
        if name in _FUSED and len(tensors) == 3:
            return self._fused(tensors, lambda: func(*args, **kwargs))
        gates = [gate for value in tensors if (gate := self._gate(value)) is not None] if name in _ALL else []
        single = len(tensors) == 1 or name in _PRODUCTS  # stochastic depth multiplies by its mask
        carried = next((self._products[id(value)] for value in tensors if id(value) in self._products), None)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if gates and len(tensors) == 1:
            self._gates[id(result)] = (result, gates[0])
        elif gates and name in _PRODUCTS:
            self._products[id(result)] = (result, gates[0], _norm(result))
        elif carried is not None and single and name in _ALL:
            self._products[id(result)] = (result, *carried[1:])
        return result

    def _gate(self, value: Tensor) -> str | None:
        """The gate that a tensor is; sharded models have other tensors in the place of parameters while they run."""
        if id(value) in self._gates:
            return self._gates[id(value)][1]
        if not isinstance(value, nn.Parameter) or id(value) in self._others:
            return None
        for name, (holder, attribute) in self._where.items():
            parameter = getattr(holder, attribute)
            self._gates[id(parameter)] = (parameter, name)
        if id(value) not in self._gates:
            self._others[id(value)] = value
            return None
        return self._gates[id(value)][1]

    def _sum(self, tensors: list[Tensor], run: Any) -> Any:
        held = [self._products.pop(id(value), None) for value in tensors]
        if (held[0] is None) == (held[1] is None):
            return run()
        product = held[0] or held[1]
        assert product is not None
        return self._noted(tensors[held[0] is not None], product[1], product[2], run)

    def _fused(self, tensors: list[Tensor], run: Any) -> Any:
        gates = [gate for value in tensors[1:] if (gate := self._gate(value)) is not None]
        return self._noted(tensors[0], gates[0], _norm(tensors[1] * tensors[2]), run) if gates else run()

    def _noted(self, skip: Tensor, gate: str, added: Tensor, run: Any) -> Any:
        norm = _norm(skip)  # before the add may overwrite it
        if self._last is not None and self._last[0] is skip and self._is_parallel(gate, self._last[2]):
            norm = self._last[1]
        result = run()
        self._found.setdefault(gate, []).append(added / norm)
        self._last = (result, norm, gate)
        return result

    def _is_parallel(self, gate: str, other: str) -> bool:
        return gate != other and self._blocks[gate] is not None and self._blocks[gate] == self._blocks[other]


_ALL = _PRODUCTS | _SAME


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return functools.reduce(getattr, path.split("."), model) if path else model, attribute


def _norm(value: Tensor) -> Tensor:
    return whole(torch.linalg.vector_norm(value.detach(), dtype=torch.promote_types(value.dtype, torch.float32)))


def whole(value: Tensor) -> Tensor:
    """A sharded tensor (DTensor) gathered; collective, so that all ranks have to come here."""
    gather = getattr(value, "full_tensor", None)
    gathered = gather() if gather is not None else value
    assert isinstance(gathered, Tensor)
    return gathered


def gates_now(model: nn.Module, names: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """The gates as they are held now."""
    for name in names:
        holder, attribute = _holder(model, name)
        yield name, getattr(holder, attribute)
