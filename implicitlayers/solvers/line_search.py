"""Line searches, and the descent step that solvers build on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import Algorithm, dot, freeze, iterate
from implicitlayers.problem import Bound
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["Armijo", "LineSearch", "Point", "descend"]


class Point(NamedTuple):
    """An evaluated point: x ``[*lanes, n]``, objective ``[*lanes]``, F ``[*lanes, n]``."""

    x: Tensor
    objective: Tensor
    F: Tensor


class LineSearch(ABC):
    """Chooses how far to go along a descent direction."""

    @abstractmethod
    def search(self, problem: Bound, at: Point, direction: Tensor, first: Tensor, look: bool) -> tuple[Point, Tensor]:
        """Return the accepted point and the mask of lanes in which one was found; the others stay where they are.

        Args:
            problem: evaluates the objective.
            at: where the line starts.
            direction: ``[*lanes, n]``, of descent.
            first: ``[*lanes]``, the step size to try first.
            look: whether values may be looked at; if not, all trials are evaluated.
        """


class _Trial(NamedTuple):
    t: Tensor
    point: Point
    accepted: Tensor


@dataclass(frozen=True)
class Armijo(LineSearch):
    """Backtracking until f(x + t d) ≤ f(x) + c t ∇f·d (Armijo 1966).

    In contrast to the textbook the right-hand side is relaxed by ten machine epsilons of |f|: next to the minimum the
    decrease drowns in the rounding of f while the gradient is still accurate, and the last Newton steps, which make the
    derivative accurate, would be refused (Hager & Zhang 2005, section 4, "approximate Wolfe").

    Args:
        sufficient_decrease: c, in (0, 1).
        shrink: factor on t after a refusal, in (0, 1).
        max_steps: refusals before the search fails.
    """

    sufficient_decrease: float = 1e-4
    shrink: float = 0.5
    max_steps: int = 30

    def __post_init__(self) -> None:
        for name in ("sufficient_decrease", "shrink"):
            if not 0 < getattr(self, name) < 1:
                raise MisuseError(f"Armijo({name}={getattr(self, name)}): pass a number between 0 and 1.")
        if self.max_steps < 1:
            raise MisuseError(f"Armijo(max_steps={self.max_steps}): pass a positive integer.")

    def search(self, problem: Bound, at: Point, direction: Tensor, first: Tensor, look: bool) -> tuple[Point, Tensor]:
        trial: _Trial = iterate(_Backtracking(self, at, direction), problem, first, self.max_steps, look=look).state
        return freeze(trial.accepted, trial.point, at), trial.accepted


@dataclass(frozen=True)
class _Backtracking(Algorithm[Bound, _Trial]):
    search: Armijo
    at: Point
    direction: Tensor

    def init(self, problem: Bound, x: Tensor) -> _Trial:
        return self._try(problem, x)

    def step(self, problem: Bound, state: _Trial) -> _Trial:
        return freeze(~state.accepted, self._try(problem, state.t * self.search.shrink), state)

    def terminate(self, problem: Bound, state: _Trial) -> Tensor:
        running = torch.full_like(state.accepted, RUNNING, dtype=torch.int64)
        return torch.where(state.accepted, torch.full_like(running, Status.CONVERGED), running)

    def _try(self, problem: Bound, t: Tensor) -> _Trial:
        x = self.at.x + t.unsqueeze(-1) * self.direction
        objective, F = problem.value_and_residual(x)
        slack = 10 * torch.finfo(objective.dtype).eps * self.at.objective.abs()
        bound = self.at.objective + self.search.sufficient_decrease * t * dot(self.direction, self.at.F) + slack
        # False for NaN, so that a point outside the domain is refused.
        return _Trial(t, Point(x, objective, F), (objective <= bound) & torch.isfinite(F).all(-1))


def descend(
    problem: Bound, at: Point, direction: Tensor, first: Tensor, line_search: LineSearch, look: bool
) -> tuple[Point, Tensor]:
    """Search along `direction`, or along -F in lanes where that is no descent direction.

    Returns:
        The new point, and int64 ``[*lanes]``: RUNNING where a step was found, else STALLED (the decrease to be expected
        is below the rounding of the objective) or LINE_SEARCH_FAILED.
    """
    slope = dot(direction, at.F)
    downhill = (slope < 0) & torch.isfinite(direction).all(-1)
    direction = torch.where(downhill.unsqueeze(-1), direction, -at.F)
    slope = torch.where(downhill, slope, -dot(at.F, at.F))
    point, found = line_search.search(problem, at, direction, first, look)
    eps = torch.finfo(at.objective.dtype).eps
    hopeless = slope.abs() * first <= 32 * eps * at.objective.abs()
    status = torch.full_like(found, Status.LINE_SEARCH_FAILED, dtype=torch.int64)
    status = torch.where(hopeless, torch.full_like(status, Status.STALLED), status)
    return point, torch.where(found, torch.full_like(status, RUNNING), status)
