"""What is added to an objective: smooth penalties with learnable strengths.

A regularizer is given in the user's terms, trees and strengths, and becomes `Term`s of the optimality condition, whose
derivatives are written down instead of being traced: λ(x - θ) costs one subtraction, not a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.loop import dot
from implicitlayers.problem import Lanes, Nonsmooth, Potential, Term, aligned
from implicitlayers.status import MisuseError

__all__ = ["Pieces", "Proximal", "Regularizer", "Ridge", "Sum"]


class Pieces(NamedTuple):
    """What a regularizer adds to a problem.

    Attributes:
        terms: its smooth terms.
        nonsmooth: its part with kinks or constraints, if it has one.
        tensors: what it depends on.
    """

    terms: list[Term]
    nonsmooth: Nonsmooth | None
    tensors: list[Tensor]


class Regularizer(ABC):
    """A penalty or a constraint on the unknown; regularizers add with ``+`` where at most one has kinks.

    Attributes:
        smooth: whether it has neither kinks nor constraints.
    """

    smooth: bool = True

    @abstractmethod
    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        """What it adds for an unknown of this structure.

        Args:
            structure: of the unknown.
            start: where the solve starts, ``[n]``.
            first_slot: the slot of the first of its tensors; the others follow.
        """

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
        self.smooth = first.smooth and second.smooth

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        one = self.first.pose(structure, start, first_slot)
        two = self.second.pose(structure, start, first_slot + len(one.tensors))
        if one.nonsmooth is not None and two.nonsmooth is not None:
            raise MisuseError(
                f"{type(self.first).__name__} + {type(self.second).__name__}: both have kinks or constraints, and the "
                "proximal map of their sum is not known from theirs; keep one, or write the map of the sum as a Prox."
            )
        nonsmooth = two.nonsmooth if one.nonsmooth is None else one.nonsmooth
        return Pieces(one.terms + two.terms, nonsmooth, one.tensors + two.tensors)


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

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        tensors = [structure.broadcast(self.lam, "Proximal's lam"), structure.flatten(self.anchor, "Proximal's anchor")]
        return Pieces([QuadraticTerm((first_slot, first_slot + 1))], None, tensors)


class Ridge(Regularizer):
    """½ Σ λᵢ xᵢ².

    Args:
        lam: λ > 0, as for `Proximal`; learnable.
    """

    def __init__(self, lam: Tree) -> None:
        _check_strength("Ridge", lam)
        self.lam = lam

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        return Pieces([QuadraticTerm((first_slot,))], None, [structure.broadcast(self.lam, "Ridge's lam")])


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
