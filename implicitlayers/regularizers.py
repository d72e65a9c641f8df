"""What is added to an objective: smooth penalties with learnable strengths.

A regularizer is given in the user's terms, trees and strengths, and becomes `Term`s of the optimality condition, whose
derivatives are written down instead of being traced: λ(x - θ) costs one subtraction, not a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.loop import dot
from implicitlayers.problem import Lanes, Potential, Term, aligned
from implicitlayers.status import MisuseError

__all__ = ["Proximal", "Regularizer", "Ridge", "Sum"]


class Regularizer(ABC):
    """A penalty on the unknown; regularizers add with ``+``."""

    @abstractmethod
    def terms(self, structure: Structure, first_slot: int) -> tuple[list[Term], list[Tensor]]:
        """The terms for an unknown of this structure, and their tensors, which take the slots from `first_slot` on."""

    def __add__(self, other: Regularizer) -> Regularizer:
        """The sum of both penalties."""
        return Sum(self, other)


class Sum(Regularizer):
    """The sum of two regularizers."""

    def __init__(self, first: Regularizer, second: Regularizer) -> None:
        for part in (first, second):
            if not isinstance(part, Regularizer):
                raise MisuseError(f"{part!r} is no regularizer and cannot be added to one.")
        self.first, self.second = first, second

    def terms(self, structure: Structure, first_slot: int) -> tuple[list[Term], list[Tensor]]:
        terms, tensors = self.first.terms(structure, first_slot)
        more_terms, more_tensors = self.second.terms(structure, first_slot + len(tensors))
        return terms + more_terms, tensors + more_tensors


class Proximal(Regularizer):
    """½ Σ λᵢ (xᵢ - θᵢ)²: keeps the solution near an anchor θ. The regularizer of iMAML.

    Args:
        anchor: θ, a tree like ``x0``; learnable.
        lam: λ > 0, as a number, a 0-d tensor, or a tree like ``x0`` with a scalar or elementwise weights for every
            leaf; learnable.
    """

    def __init__(self, anchor: Tree, lam: Tree) -> None:
        _check_strength("Proximal", lam)
        self.anchor, self.lam = anchor, lam

    def terms(self, structure: Structure, first_slot: int) -> tuple[list[Term], list[Tensor]]:
        tensors = [structure.broadcast(self.lam, "Proximal's lam"), structure.flatten(self.anchor, "Proximal's anchor")]
        return [QuadraticTerm((first_slot, first_slot + 1))], tensors


class Ridge(Regularizer):
    """½ Σ λᵢ xᵢ².

    Args:
        lam: λ > 0, as for `Proximal`; learnable.
    """

    def __init__(self, lam: Tree) -> None:
        _check_strength("Ridge", lam)
        self.lam = lam

    def terms(self, structure: Structure, first_slot: int) -> tuple[list[Term], list[Tensor]]:
        return [QuadraticTerm((first_slot,))], [structure.broadcast(self.lam, "Ridge's lam")]


def _check_strength(name: str, lam: Any) -> None:
    if isinstance(lam, (int, float)) and not lam >= 0:
        raise MisuseError(f"{name}(lam={lam}): a negative strength rewards distance; pass a number >= 0.")


@dataclass(frozen=True)
class QuadraticTerm(Potential):
    """½ Σ λᵢ (xᵢ - θᵢ)² with parameters (λ, θ), or (λ,) for θ = 0; λ is 0-d or ``[n]``."""

    slots: tuple[int, ...]

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        away = self._away(x, params)
        return (params[0] * away * away).sum() / 2

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return params[0] * self._away(x, params)

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
