"""Singular values of a Jacobian that is known by its products with vectors only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConversionError
from .stream import End, Stream

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """Weighted singular values: a distribution over the directions of the stream's beginning."""

    values: Tensor
    weights: Tensor

    @property
    def mean_squared(self) -> float:
        return float((self.values.square() * self.weights).sum() / self.weights.sum())

    def share(self, chosen: Tensor) -> float:
        """The weight of the chosen ones (booleans)."""
        return float(self.weights[chosen].sum() / self.weights.sum())


def exact(stream: Stream) -> Sample:
    """All singular values, by one vector-Jacobian product for each element of the stream's end.

    Directions that the end does not depend on, where it has fewer elements than the beginning, count as zeros.
    """
    rows, columns = stream.end.shape.numel(), stream.begin.shape.numel()
    back = _backward(stream)
    jacobian = torch.stack([back(unit) for unit in torch.eye(rows, dtype=torch.float64)])
    values = torch.linalg.svdvals(jacobian)
    values = torch.cat([values[:columns], values.new_zeros(max(0, columns - len(values)))])
    return Sample(values, torch.ones_like(values))


def lanczos(stream: Stream, *, steps: int, generator: torch.Generator) -> Sample:
    """Stochastic Lanczos quadrature from one random unit vector.

    Golub-Kahan bidiagonalization J V = U B (Golub & Kahan 1965, with full reorthogonalization): the singular values of
    B are the nodes, the squared first components of its right singular vectors the weights (Ubaru, Chen & Saad 2017).
    In expectation, sums over the sample of polynomials in the squared singular value up to degree 2 `steps` - 1 are
    those over the whole spectrum; the first is |J v|^2 = Hutchinson's estimate.
    """
    columns = stream.begin.shape.numel()
    back = _backward(stream)
    forward = _forward(stream)
    vector = torch.randn(columns, dtype=torch.float64, generator=generator)
    rights, lefts = [vector / vector.norm()], list[Tensor]()
    diagonal, above = list[Tensor](), list[Tensor]()
    for step in range(min(steps, columns, stream.end.shape.numel())):
        left = _orthogonal(forward(rights[-1]), lefts)
        diagonal.append(left.norm())
        if _is_small(diagonal[-1], diagonal):
            break
        lefts.append(left / diagonal[-1])
        right = _orthogonal(back(lefts[-1]), rights)
        if step + 1 == steps or _is_small(right.norm(), diagonal):
            break
        above.append(right.norm())
        rights.append(right / above[-1])
    size = len(diagonal)
    bidiagonal = torch.diag(torch.stack(diagonal))
    for at, value in enumerate(above[: size - 1]):
        bidiagonal[at, at + 1] = value
    _, values, vectors = torch.linalg.svd(bidiagonal)
    return Sample(values, vectors[:, 0].square())


def _is_small(value: Tensor, seen: list[Tensor]) -> bool:
    """Nothing but rounding is left: the vectors span an invariant space."""
    return bool(value <= 1e-6 * max(float(one) for one in seen))


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2 if basis else 0):
        vectors = torch.stack(basis)
        vector = vector - vectors.T @ (vectors @ vector)
    return vector


def _backward(stream: Stream) -> Product:
    """u -> J^T u, in double precision outside."""

    def product(vector: Tensor) -> Tensor:
        return _pulled(stream, _like(vector, stream.end)).detach().flatten().double().cpu()

    return product


def _pulled(stream: Stream, cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
    (found,) = torch.autograd.grad(
        stream.end.edge, stream.begin.edge, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    if found is None:
        return torch.zeros(stream.begin.shape, dtype=stream.begin.dtype, device=stream.begin.device)
    return found


def _forward(stream: Stream) -> Product:
    """v -> J v, as the derivative of u -> J^T u, which is linear in u."""
    cotangent = torch.zeros(stream.end.shape, dtype=stream.end.dtype, device=stream.end.device, requires_grad=True)
    with torch.enable_grad():
        pulled = _pulled(stream, cotangent, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros(cotangent.numel(), dtype=torch.float64)
        like = _like(vector, stream.begin)
        try:
            (found,) = torch.autograd.grad(pulled, cotangent, like, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise ConversionError(f"an operation of the model cannot be differentiated twice: {error}") from error
        return torch.zeros(cotangent.numel(), dtype=torch.float64) if found is None else found.flatten().double().cpu()

    return product


def _like(vector: Tensor, end: End) -> Tensor:
    return vector.reshape(end.shape).to(end.device, end.dtype)
