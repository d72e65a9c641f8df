"""Constraints, known by the projection onto the set that they allow; the value is 0 there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.problem import Bounded, Nonsmooth
from implicitlayers.regularizers.base import Pieces, Regularizer, admissible, check_number, nonnegative
from implicitlayers.regularizers.groups import Groups, safe_norm
from implicitlayers.status import MisuseError

__all__ = ["Box", "L1Ball", "L2Ball", "NonNegative", "Simplex"]


class Box(Regularizer):
    """lowerᵢ <= xᵢ <= upperᵢ.

    The projection clamps. Coordinates strictly inside answer as in a problem without bounds whose other coordinates are
    fixed; one that a bound holds moves with the bound, dxᵢ/dlowerᵢ = 1. Solvers that know bounds are handed them.

    Args:
        lower: a number, a 0-d tensor, or a tree like ``x0`` with a scalar or elementwise bounds for every leaf;
            learnable. -inf where there is none.
        upper: likewise; inf where there is none.

    Raises:
        MisuseError: a lower bound is above its upper one.
    """

    smooth = False

    def __init__(self, lower: Tree = -math.inf, upper: Tree = math.inf) -> None:
        why = "a coordinate has no number to be; pass a finite bound, or leave it out"
        check_number("Box", "lower", lower, lambda value: value < math.inf, why)
        check_number("Box", "upper", upper, lambda value: value > -math.inf, why)
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and lower > upper:
            raise MisuseError(f"Box(lower={lower}, upper={upper}): no number lies between; swap them.")
        self.lower, self.upper = lower, upper

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        lower, upper = structure.broadcast(self.lower, "Box's lower"), structure.broadcast(self.upper, "Box's upper")
        ok = lower <= upper
        message = "Box: a lower bound is above its upper one, or NaN, and no number lies between; pass lower <= upper."
        tensors = [admissible(lower, ok, message), admissible(upper, ok, message)]
        return Pieces([], _Clamp((first_slot, first_slot + 1)), tensors)


class NonNegative(Regularizer):
    """xᵢ >= 0: a `Box` that is open above."""

    smooth = False

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        return Box(lower=0.0).pose(structure, start, first_slot)


class Simplex(Regularizer):
    """xᵢ >= 0 and Σ xᵢ = total in every group: mixing weights, probabilities, portfolios.

    The projection subtracts one number a group and clamps at 0 (Held, Wolfe & Crowder 1974; Duchi et al. 2008). With S
    the support of a group its Jacobian is I_S - 11ᵀ/|S|: what one coordinate gains the others of S lose in equal parts.

    Args:
        total: > 0, a number, a 0-d tensor, or a tree like ``x0`` with a number a leaf or a group (the leaf's shape with
            1 in the place of `dim`); learnable.
        dim: a group runs along this dimension of every leaf, as in ``torch.softmax(leaf, dim)``. By default every leaf
            is a group.

    Raises:
        MisuseError: a total is not positive, or a leaf lacks the dimension.
    """

    smooth = False

    def __init__(self, total: Tree = 1.0, *, dim: int | None = None) -> None:
        why = "numbers >= 0 have no such sum but 0; pass total > 0"
        check_number("Simplex", "total", total, lambda value: value > 0, why)
        self.total, self.dim = total, dim

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        groups = Groups.of(structure, self.dim, "Simplex")
        total = groups.broadcast(self.total, "Simplex's total")
        message = "Simplex's total has an entry that is not positive; pass a tensor of numbers > 0."
        return Pieces([], _OntoSimplex((first_slot,), groups), [admissible(total, total > 0, message)])


class L1Ball(Regularizer):
    """Σ |xᵢ| <= r in every group: the constrained form of the lasso.

    Inside, the projection is the identity; outside, a soft threshold at the height that makes the sum r (Duchi et al.
    2008). With s the signs on the support its Jacobian is there I_S - ssᵀ/|S|, and dx/dr = s/|S|.

    Args:
        r: >= 0, a number, a 0-d tensor, or a tree like ``x0`` with a number a leaf or a group (the leaf's shape with 1
            in the place of `dim`); learnable.
        dim: a group runs along this dimension of every leaf. By default every leaf is a group.

    Raises:
        MisuseError: a radius is negative, or a leaf lacks the dimension.
    """

    smooth = False

    def __init__(self, r: Tree, *, dim: int | None = None) -> None:
        _check_radius("L1Ball", r)
        self.r, self.dim = r, dim

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        groups = Groups.of(structure, self.dim, "L1Ball")
        r = nonnegative(groups.broadcast(self.r, "L1Ball's r"), "L1Ball's r")
        return Pieces([], _OntoL1Ball((first_slot,), groups), [r])


class L2Ball(Regularizer):
    """‖x‖₂ <= r in every group: a bound on length, such as that of each neuron's weights with ``dim=1``.

    Inside, the projection is the identity; outside, y r/‖y‖, with Jacobian (r/‖y‖)(I - yyᵀ/‖y‖²) and dx/dr = y/‖y‖.

    Args:
        r: as for `L1Ball`.
        dim: as for `L1Ball`.

    Raises:
        MisuseError: a radius is negative, or a leaf lacks the dimension.
    """

    smooth = False

    def __init__(self, r: Tree, *, dim: int | None = None) -> None:
        _check_radius("L2Ball", r)
        self.r, self.dim = r, dim

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        groups = Groups.of(structure, self.dim, "L2Ball")
        r = nonnegative(groups.broadcast(self.r, "L2Ball's r"), "L2Ball's r")
        return Pieces([], _OntoL2Ball((first_slot,), groups), [r])


def _check_radius(name: str, r: Tree) -> None:
    check_number(name, "r", r, lambda value: value >= 0, "a ball of negative radius is empty; pass a number >= 0")


@dataclass(frozen=True)
class _Clamp(Bounded):
    """lower <= x <= upper with parameters (lower, upper), each 0-d or ``[n]``."""

    slots: tuple[int, ...]

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        # Free on the bound itself, and NaN in y or in a bound stays NaN.
        return torch.clamp(y, params[0].expand_as(y), params[1].expand_as(y))

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(x[0])

    def bounds(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        return params[0].expand_as(x), params[1].expand_as(x)


@dataclass(frozen=True)
class _OntoSimplex(Nonsmooth):
    """x >= 0 and Σ x = total with parameter total, 0-d or one number a group."""

    slots: tuple[int, ...]
    groups: Groups

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        rows, totals = self.groups.rows(y), self.groups.pieces(params[0])
        return self.groups.join([_onto_simplex(r, total) for r, total in zip(rows, totals, strict=True)])

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(x[0])


@dataclass(frozen=True)
class _OntoL1Ball(Nonsmooth):
    """Σ |x| <= r with parameter r, 0-d or one number a group."""

    slots: tuple[int, ...]
    groups: Groups

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        projected = []
        for rows, r in zip(self.groups.rows(y), self.groups.pieces(params[0]), strict=True):
            size = rows.abs()
            inside = size.sum(-1, keepdim=True) <= r
            projected.append(torch.where(inside, rows, rows.sign() * _onto_simplex(size, r)))
        return self.groups.join(projected)

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(x[0])


@dataclass(frozen=True)
class _OntoL2Ball(Nonsmooth):
    """‖x‖₂ <= r with parameter r, 0-d or one number a group."""

    slots: tuple[int, ...]
    groups: Groups

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        projected = []
        for rows, r in zip(self.groups.rows(y), self.groups.pieces(params[0]), strict=True):
            length = safe_norm(rows)
            inside = length <= r
            safe = torch.where(inside, torch.ones_like(length), length)
            projected.append(rows * torch.where(inside, torch.ones_like(length), r / safe))
        return self.groups.join(projected)

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(x[0])


def _onto_simplex(y: Tensor, total: Tensor) -> Tensor:
    """Project every row ``[groups, size]`` onto {x >= 0, Σ x = total}.

    x = max(y - τ, 0), where τ solves Σ max(yᵢ - τ, 0) = total. With u the sorted row and any k,
    Σ_{i<=k} (uᵢ - τ) <= total, with equality where k counts the support: hence τ = max_k (u₁ + … + u_k - total)/k, and
    no search is needed. For the derivative only the support S is kept of this: τ = (Σ_S y - total)/|S| is affine.
    """
    # Shifting a row shifts τ. From the largest entry, which then always belongs to the support, nothing cancels.
    y = y - y.detach().amax(-1, keepdim=True)
    ordered = y.detach().sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    threshold = ((ordered.cumsum(-1) - total.detach()) / count).amax(-1, keepdim=True)
    support = y >= threshold
    inside = torch.where(support, y, torch.zeros_like(y))
    threshold = (inside.sum(-1, keepdim=True) - total) / support.sum(-1, keepdim=True)
    return (y - threshold).clamp_min(0)
