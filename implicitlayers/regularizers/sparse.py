"""Penalties with kinks, which set coordinates or whole groups of them exactly to zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.problem import Nonsmooth
from implicitlayers.regularizers.base import Pieces, Regularizer, check_strength, nonnegative
from implicitlayers.regularizers.groups import Groups, safe_norm

__all__ = ["ElasticNet", "GroupLasso", "Lasso"]


class Lasso(Regularizer):
    """Σ λᵢ |xᵢ|: sets the coordinates exactly to zero that do not pay their price (Tibshirani 1996).

    The proximal map is the soft threshold, sign(y) max(|y| - sλ, 0). With S the support of the solution,
    dx_S/dθ = -(∇²f_SS)⁻¹ ∂(∇f + λ sign(x))_S/∂θ, and dx/dθ = 0 off S. A weight of 0 leaves a leaf, such as an
    intercept, without penalty.

    Args:
        lam: λ >= 0, as a number, a 0-d tensor, or a tree like ``x0`` with a scalar or elementwise weights for every
            leaf; learnable.

    Raises:
        MisuseError: a strength is negative.
    """

    smooth = False

    def __init__(self, lam: Tree) -> None:
        check_strength("Lasso", lam)
        self.lam = lam

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        lam = nonnegative(structure.broadcast(self.lam, "Lasso's lam"), "Lasso's lam")
        return Pieces([], _SoftThreshold((first_slot,)), [lam])


class ElasticNet(Regularizer):
    """Σ λ₁ᵢ |xᵢ| + ½ Σ λ₂ᵢ xᵢ²: a lasso that shares weight among correlated coordinates (Zou & Hastie 2005).

    The proximal map is the soft threshold divided by 1 + sλ₂. The second summand bounds the curvature from below, so
    that the solution is unique and its derivative exists where a lasso has more unknowns than data.

    Args:
        l1: λ₁ >= 0, as for `Lasso`; learnable.
        l2: λ₂ >= 0, likewise.

    Raises:
        MisuseError: a strength is negative.
    """

    smooth = False

    def __init__(self, l1: Tree, l2: Tree) -> None:
        check_strength("ElasticNet", l1, "l1")
        check_strength("ElasticNet", l2, "l2")
        self.l1, self.l2 = l1, l2

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        names = ("ElasticNet's l1", "ElasticNet's l2")
        given = zip((self.l1, self.l2), names, strict=True)
        tensors = [nonnegative(structure.broadcast(strength, name), name) for strength, name in given]
        return Pieces([], _SoftThreshold((first_slot, first_slot + 1)), tensors)


class GroupLasso(Regularizer):
    """Σ_g λ_g ‖x_g‖₂: sets whole groups of coordinates exactly to zero (Yuan & Lin 2006).

    The proximal map shrinks the norm of every group, y_g max(1 - sλ_g/‖y_g‖, 0). Choose it to select features, filters
    or heads rather than single weights: for ``W [features, tasks]``, ``dim=1`` makes a group of each feature.

    Args:
        lam: λ >= 0, as a number, a 0-d tensor, or a tree like ``x0`` with a number a leaf or a group (the leaf's shape
            with 1 in the place of `dim`); learnable.
        dim: a group runs along this dimension of every leaf, as in ``torch.linalg.vector_norm(leaf, dim=dim)``. By
            default every leaf is a group.
        weighted: whether λ_g is multiplied by the square root of the group's size, which makes groups of different
            sizes equally likely to stay.

    Raises:
        MisuseError: a strength is negative, or a leaf lacks the dimension.
    """

    smooth = False

    def __init__(self, lam: Tree, *, dim: int | None = None, weighted: bool = False) -> None:
        check_strength("GroupLasso", lam)
        self.lam, self.dim, self.weighted = lam, dim, weighted

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        groups = Groups.of(structure, self.dim, "GroupLasso")
        lam = nonnegative(groups.broadcast(self.lam, "GroupLasso's lam"), "GroupLasso's lam")
        return Pieces([], _Shrink((first_slot,), groups, self.weighted), [lam])


@dataclass(frozen=True)
class _SoftThreshold(Nonsmooth):
    """Σ λ₁ |x| + ½ Σ λ₂ x² with parameters (λ₁, λ₂), or (λ₁,) for λ₂ = 0."""

    slots: tuple[int, ...]

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        threshold = step * params[0]
        # The strict inequality makes the kink count as support, and a threshold of 0 the identity, also at y = 0.
        x = torch.where(y.abs() < threshold, torch.zeros_like(y), y - threshold * y.sign())
        return x / (1 + step * params[1]) if len(params) > 1 else x

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        value = (params[0] * x.abs()).sum()
        return value + (params[1] * x * x).sum() / 2 if len(params) > 1 else value


@dataclass(frozen=True)
class _Shrink(Nonsmooth):
    """Σ λ_g ‖x_g‖₂ with parameter λ, 0-d or one number a group."""

    slots: tuple[int, ...]
    groups: Groups
    weighted: bool

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        shrunk = []
        for rows, lam in self._priced(y, params[0]):
            length, threshold = safe_norm(rows), step * lam
            off = length < threshold
            # Where the length is 0 a factor is needed only for a threshold of 0, where the map is the identity.
            safe = torch.where(off | (length == 0), torch.ones_like(length), length)
            shrunk.append(rows * torch.where(off, torch.zeros_like(length), 1 - threshold / safe))
        return self.groups.join(shrunk)

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.stack([(lam * safe_norm(rows)).sum() for rows, lam in self._priced(x, params[0])]).sum()

    def _priced(self, x: Tensor, lam: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The groups, each with its strength."""
        rows = self.groups.rows(x)
        weights = [r.shape[-1] ** 0.5 if self.weighted else 1.0 for r in rows]
        return [(r, w * piece) for r, w, piece in zip(rows, weights, self.groups.pieces(lam), strict=True)]
