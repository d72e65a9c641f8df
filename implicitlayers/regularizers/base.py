"""The contract of regularizers, their sums, and how strengths, radii and bounds are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitlayers.closure import Watch
from implicitlayers.flat import Structure
from implicitlayers.functorch import all_lanes
from implicitlayers.problem import Nonsmooth, Term
from implicitlayers.status import MisuseError

__all__ = ["Pieces", "Regularizer", "Sum", "admissible", "check_number", "check_strength", "nonnegative"]


class Pieces(NamedTuple):
    """What a regularizer adds to a problem.

    Attributes:
        terms: its smooth terms.
        nonsmooth: its part with kinks or constraints, if it has one.
        tensors: what it depends on.
        watches: over user functions that it is made of.
    """

    terms: list[Term]
    nonsmooth: Nonsmooth | None
    tensors: list[Tensor]
    watches: tuple[Watch, ...] = ()


class Regularizer(ABC):
    """A penalty r(x) on the unknown, or a constraint on it; regularizers add with ``+`` where at most one has kinks.

    Strengths, radii, bounds and anchors are numbers or tensors; gradients reach the tensors, elementwise or not.
    Numbers that cannot be are refused when the regularizer is made.

    What has kinks or constraints enters through its proximal map, prox(y, s) = argmin_x r(x) + ‖x - y‖²/(2s), which for
    a constraint is the projection. A solution fulfils x = prox(x - ∇f(x), 1), and its derivative follows from that of
    the map: the coordinates that a kink or a constraint holds stay held, the others answer as in a smooth problem. At a
    point where both would be right (a coordinate that is held by a force of zero) no derivative exists; the
    one returned is that of the side on which the coordinate is free. Its tensors are looked at when a problem is posed,
    where that waits for no device and concerns no lane alone: on the CPU, outside of vmap. Elsewhere a lane with a
    negative strength or an empty set ends NON_FINITE.

    To write one, return from `pose` the smooth `Term`s, the `Nonsmooth` part, and the tensors that these depend on.
    `Penalty` and `Prox` make regularizers of plain functions, and need no class.

    Attributes:
        smooth: whether it has neither kinks nor constraints, so that any solver for minima will do.
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
        return Pieces(one.terms + two.terms, nonsmooth, one.tensors + two.tensors, one.watches + two.watches)


def check_number(name: str, argument: str, value: Any, ok: Callable[[float], bool], why: str) -> None:
    """Raise `MisuseError` for a number that is not ok; tensors and trees pass, they are checked when posed."""
    if isinstance(value, (int, float)) and not ok(value):
        raise MisuseError(f"{name}({argument}={value}): {why}.")


def check_strength(name: str, strength: Any, argument: str = "lam") -> None:
    """Refuse a negative number, and NaN, as a strength."""
    why = "a negative strength rewards distance; pass a number >= 0"
    check_number(name, argument, strength, lambda value: value >= 0, why)


def admissible(t: Tensor, ok: Tensor, message: str) -> Tensor:
    """Raise `MisuseError` where `ok` can be looked at for nothing, else return `t` with NaN where it is not ok.

    NaN reaches the unknown through the proximal map, so that a lane that cannot be ends NON_FINITE, alone.
    """
    seen = all_lanes(ok)
    if seen.device.type == "cpu" and seen.ndim == ok.ndim:
        if not bool(seen.all()):
            raise MisuseError(message)
        return t
    return torch.where(ok, t, torch.full_like(t, torch.nan))


def nonnegative(t: Tensor, name: str) -> Tensor:
    """`admissible` for a tensor none of whose entries may be negative."""
    return admissible(t, t >= 0, f"{name} has an entry that is negative or NaN; pass a tensor of numbers >= 0.")
