"""Quadratic penalties. Their derivatives are written down, not traced: λ(x - θ) costs one subtraction, not a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.loop import dot
from implicitlayers.problem import Lanes, Potential, aligned
from implicitlayers.regularizers.base import Pieces, Regularizer, check_strength

__all__ = ["Proximal", "QuadraticTerm", "Ridge"]


class Proximal(Regularizer):
    """½ Σ λᵢ (xᵢ - θᵢ)²: keeps the solution near an anchor θ. The regularizer of iMAML.

    Args:
        anchor: θ, a tree like ``x0``; learnable.
        lam: λ > 0, as a number, a 0-d tensor, or a tree like ``x0`` with a scalar or elementwise weights for every
            leaf; learnable.
    """

    def __init__(self, anchor: Tree, lam: Tree) -> None:
        check_strength("Proximal", lam)
        self.anchor, self.lam = anchor, lam

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        tensors = [structure.broadcast(self.lam, "Proximal's lam"), structure.flatten(self.anchor, "Proximal's anchor")]
        return Pieces([QuadraticTerm((first_slot, first_slot + 1))], None, tensors)


class Ridge(Regularizer):
    """½ Σ λᵢ xᵢ².

    Args:
        lam: λ > 0, as for `Proximal`; learnable.
    """

    def __init__(self, lam: Tree) -> None:
        check_strength("Ridge", lam)
        self.lam = lam

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        return Pieces([QuadraticTerm((first_slot,))], None, [structure.broadcast(self.lam, "Ridge's lam")])


@dataclass(frozen=True)
class QuadraticTerm(Potential):
    """½ Σ λᵢ (xᵢ - θᵢ)² with parameters (λ, θ), or (λ,) for θ = 0; λ is 0-d or ``[n]``."""

    slots: tuple[int, ...]

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        away = self._away(x, params)
        return (params[0] * away * away).sum() / 2

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return params[0] * self._away(x, params)

    def value_and_residual(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> tuple[Tensor, Tensor]:
        return self.accumulate(torch.zeros_like(x[..., 0]), torch.zeros_like(x), x, params, lanes)

    def accumulate(
        self, value: Tensor, F: Tensor, x: Tensor, params: Sequence[Tensor], lanes: Lanes
    ) -> tuple[Tensor, Tensor]:
        away = x if len(params) == 1 else x - aligned(params[1], [level[1] for level in lanes])
        weights = self.diagonal(x, params, lanes)
        if weights.shape[-1] == 1:
            return value + weights.squeeze(-1) * dot(away, away) / 2, torch.addcmul(F, weights, away)
        pull = weights * away
        return value + dot(away, pull) / 2, F + pull

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return params[0] * y

    def diagonal(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Tensor:
        has = [level[0] for level in lanes]
        scalar = params[0].ndim == len(has) - has.count(None)
        weights = aligned(params[0].unsqueeze(-1) if scalar else params[0], has)
        return weights.expand(*x.shape[:-1], weights.shape[-1])

    @staticmethod
    def _away(x: Tensor, params: Sequence[Tensor]) -> Tensor:
        return x - params[1] if len(params) > 1 else x
