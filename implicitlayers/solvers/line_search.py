"""Line searches, and the descent step that solvers build on them.

Next to a minimum the decrease of f drowns in the rounding of f, while the gradient is still accurate. On a quadratic
f(t) ≤ f(0) + c t f'(0) is the same as f'(t) ≤ (2c - 1) f'(0), and the second form needs no difference of values. So a
trial is also accepted where it satisfies the second and f has not risen visibly (Hager & Zhang 2005, section 4,
"approximate Wolfe conditions"). Without it the last Newton steps, which make the derivative accurate, are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import Algorithm, dot, freeze, iterate, norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["Armijo", "Fixed", "LineSearch", "Point", "StrongWolfe", "descend"]


class Point(NamedTuple):
    """An evaluated point: x ``[*lanes, n]``, objective ``[*lanes]``, F ``[*lanes, n]``."""

    x: Tensor
    objective: Tensor
    F: Tensor


class Line(NamedTuple):
    """Where a search starts and where it goes: the point, the direction, the objective's slope there, the first t."""

    at: Point
    direction: Tensor
    slope: Tensor
    first: Tensor

    def trial(self, problem: Bound, t: Tensor) -> Point:
        """The point at step size ``t [*lanes]``."""
        x = torch.addcmul(self.at.x, t.unsqueeze(-1), self.direction)
        return Point(x, *problem.value_and_residual(x))

    def slope_at(self, problem: Bound, point: Point) -> Tensor:
        """Slope of the objective along the line; that of ½‖F‖² costs a product with the Jacobian."""
        if problem.kind is Kind.ROOT:
            return dot(point.F, problem.linearize(point.x)(self.direction))
        return dot(point.F, self.direction)

    def falls(self, t: Tensor, point: Point, fraction: float) -> Tensor:
        """Mask of sufficient decrease by values, f(t) ≤ f(0) + c t f'(0); False where the point is not finite."""
        bound = self.at.objective + fraction * t * self.slope
        return torch.isfinite(point.F).all(-1) & (point.objective <= bound)

    def flattens(self, t: Tensor, point: Point, slope: Tensor, fraction: float) -> Tensor:
        """Mask of sufficient decrease by slopes, f'(t) ≤ (2c - 1) f'(0), where f has not risen visibly."""
        eps = torch.finfo(point.objective.dtype).eps
        # Hager and Zhang let f rise by 1e-6 |f| in float64; half the digits are also right in float32.
        level = self.at.objective + eps**0.5 * self.at.objective.abs()
        by_slope = (point.objective <= level) & (slope <= (2 * fraction - 1) * self.slope)
        # A step shortened until f hardly moves must at least have moved the slope, or the slopes are not those of f.
        by_slope = by_slope & ((t == self.first) | (slope >= 0.9 * self.slope))
        return torch.isfinite(point.F).all(-1) & by_slope

    @property
    def drowned(self) -> Tensor:
        """Mask of lanes where the first step changes f, or x, by no more than their rounding."""
        eps = torch.finfo(self.at.objective.dtype).eps
        by_objective = self.slope.abs() * self.first <= 32 * eps * self.at.objective.abs()
        return by_objective | (norm(self.direction) * self.first <= 8 * eps * norm(self.at.x))

    def drowns(self, t: Tensor, point: Point, kind: Kind) -> Tensor:
        """Mask of first steps that nothing can be said against: they change what is compared by its rounding alone."""
        eps = torch.finfo(point.objective.dtype).eps
        if kind is Kind.ROOT:
            # Along a Newton direction ½‖F‖² falls unless F is rounding, as it is some digits before x is.
            unseen = norm(self.direction) * self.first <= eps**0.5 * norm(self.at.x)
            unseen = unseen & (point.objective <= 100 * self.at.objective)
        else:
            unseen = (point.objective - self.at.objective).abs() <= 32 * eps * self.at.objective.abs()
            unseen = unseen & self.drowned
        return (t == self.first) & unseen & torch.isfinite(point.F).all(-1)


class LineSearch(ABC):
    """Chooses how far to go along a descent direction."""

    @abstractmethod
    def search(
        self, problem: Bound, at: Point, direction: Tensor, slope: Tensor, first: Tensor, look: bool
    ) -> tuple[Point, Tensor]:
        """Return the accepted point and the mask of lanes in which one was found; the others stay where they are.

        Args:
            problem: evaluates the objective.
            at: where the line starts.
            direction: ``[*lanes, n]``, of descent.
            slope: ``[*lanes]``, derivative of the objective along the direction at the start; not positive.
            first: ``[*lanes]``, the step size to try first.
            look: whether values may be looked at; if not, all trials are evaluated.
        """


@dataclass(frozen=True)
class Fixed(LineSearch):
    """No search: the first step size, times a factor, whatever comes of it.

    Choose it where the full step is known to be good (Newton next to the solution), or where the cost of a step must be
    known in advance.

    Args:
        factor: on the step size that the solver would try first; 1 is Newton's full step.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise MisuseError(f"Fixed(factor={self.factor}): pass a positive number.")

    def search(
        self, problem: Bound, at: Point, direction: Tensor, slope: Tensor, first: Tensor, look: bool
    ) -> tuple[Point, Tensor]:
        x = at.x + (self.factor * first).unsqueeze(-1) * direction
        # A point that is not finite is accepted as well: the lane then ends with NON_FINITE, which is what happened.
        return Point(x, *problem.value_and_residual(x)), torch.ones_like(first, dtype=torch.bool)


class _Trial(NamedTuple):
    t: Tensor
    point: Point
    accepted: Tensor


@dataclass(frozen=True)
class Armijo(LineSearch):
    """Backtracking until f(x + t d) ≤ f(x) + c t ∇f·d (Armijo 1966), or by slopes where f is but rounding.

    Choose it for Newton directions, whose full step is nearly always right: one evaluation a step.

    Args:
        sufficient_decrease: c, in (0, ½).
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

    def search(
        self, problem: Bound, at: Point, direction: Tensor, slope: Tensor, first: Tensor, look: bool
    ) -> tuple[Point, Tensor]:
        algorithm = _Backtracking(self, Line(at, direction, slope, first))
        trial: _Trial = iterate(algorithm, problem, first, self.max_steps, look=look).state
        return freeze(trial.accepted, trial.point, at), trial.accepted


@dataclass(frozen=True)
class _Backtracking(Algorithm[Bound, _Trial]):
    search: Armijo
    line: Line

    def init(self, problem: Bound, x: Tensor) -> _Trial:
        return self._try(problem, x)

    def step(self, problem: Bound, state: _Trial) -> _Trial:
        return freeze(~state.accepted, self._try(problem, state.t * self.search.shrink), state)

    def terminate(self, problem: Bound, state: _Trial) -> Tensor:
        return _ended(state.accepted, self.line.at)

    def _try(self, problem: Bound, t: Tensor) -> _Trial:
        point, fraction = self.line.trial(problem, t), self.search.sufficient_decrease
        # A full step that cannot be judged is taken: in a fixed number of steps its derivative is the one that counts.
        accepted = self.line.falls(t, point, fraction) | self.line.drowns(t, point, problem.kind)
        if problem.kind is not Kind.ROOT:
            # ½‖F‖² goes to zero with F and keeps all its digits, so that its slope has nothing to add.
            accepted = accepted | self.line.flattens(t, point, self.line.slope_at(problem, point), fraction)
        return _Trial(t, point, accepted)


class _End(NamedTuple):
    """One end of an interval of step sizes, evaluated."""

    t: Tensor
    objective: Tensor
    slope: Tensor


class _Bracket(NamedTuple):
    t: Tensor
    low: _End
    high: _End
    best: Point
    accepted: Tensor


@dataclass(frozen=True)
class StrongWolfe(LineSearch):
    """Find t with f(x + t d) ≤ f(x) + c₁ t ∇f·d and |∇f(x + t d)·d| ≤ c₂ |∇f·d|.

    Algorithms 3.5 and 3.6 of Nocedal & Wright (2006) with cubic interpolation (their equation 3.59). Choose it for
    `LBFGS`: the second condition makes sᵀy positive, so that every pair is used. In contrast to the book, both
    algorithms are one loop (the bracket's far end is infinite until one is found), decrease is also judged by slopes
    where f is but rounding, and a search that runs out of steps returns the best point with sufficient decrease it saw.

    Args:
        sufficient_decrease: c₁, with 0 < c₁ < c₂.
        curvature: c₂ < 1; 0.9 for Newton-like directions, 0.1 for a nearly exact search.
        max_steps: trials after the first.
    """

    sufficient_decrease: float = 1e-4
    curvature: float = 0.9
    max_steps: int = 25

    def __post_init__(self) -> None:
        if not 0 < self.sufficient_decrease < self.curvature < 1:
            raise MisuseError(
                f"StrongWolfe(sufficient_decrease={self.sufficient_decrease}, curvature={self.curvature}): pass "
                "0 < sufficient_decrease < curvature < 1, without which there may be no such step."
            )
        if self.max_steps < 1:
            raise MisuseError(f"StrongWolfe(max_steps={self.max_steps}): pass a positive integer.")

    def search(
        self, problem: Bound, at: Point, direction: Tensor, slope: Tensor, first: Tensor, look: bool
    ) -> tuple[Point, Tensor]:
        algorithm = _Zoom(self, Line(at, direction, slope, first))
        end: _Bracket = iterate(algorithm, problem, first, self.max_steps, look=look).state
        return end.best, end.low.t > 0


@dataclass(frozen=True)
class _Zoom(Algorithm[Bound, _Bracket]):
    """The interval [low, high] of step sizes, in either order: low is the best with sufficient decrease so far."""

    search: StrongWolfe
    line: Line

    def init(self, problem: Bound, x: Tensor) -> _Bracket:
        at = self.line.at
        low = _End(torch.zeros_like(x), at.objective, self.line.slope)
        unknown = torch.full_like(x, torch.inf)
        start = _Bracket(x, low, _End(unknown, unknown, unknown), at, torch.zeros_like(x, dtype=torch.bool))
        return self.step(problem, start)

    def step(self, problem: Bound, state: _Bracket) -> _Bracket:
        t, low, high = state.t, state.low, state.high
        point, fraction = self.line.trial(problem, t), self.search.sufficient_decrease
        slope = self.line.slope_at(problem, point)
        by_value = self.line.falls(t, point, fraction) & (point.objective < low.objective)
        good = by_value | self.line.flattens(t, point, slope, fraction)
        here = _End(t, point.objective, slope)
        flat = slope.abs() <= self.search.curvature * self.line.slope.abs()
        # Past the minimum along the line, seen from low: the minimum is between here and the old low.
        past = good & (slope * torch.sign(high.t - low.t) >= 0)
        high = freeze(good, freeze(past, low, high), here)
        low, best = freeze(good, (here, point), (low, state.best))
        new = _Bracket(_between(low, high), low, high, best, good & flat)
        return freeze(~state.accepted, new, state)

    def terminate(self, problem: Bound, state: _Bracket) -> Tensor:
        return _ended(state.accepted, self.line.at)


def _between(low: _End, high: _End) -> Tensor:
    """The next step size: double while no far end is known, then the minimum of the cubic through both ends."""
    bounded = torch.isfinite(high.t)
    known = bounded & torch.isfinite(high.objective) & torch.isfinite(high.slope)
    far = freeze(known, high, _End(*(torch.ones_like(end) for end in high)))
    width = torch.where(bounded, high.t, low.t) - low.t
    secant = (far.objective - low.objective) / torch.where(known & (width != 0), width, torch.ones_like(width))
    d1 = low.slope + far.slope - 3 * secant
    inside = d1 * d1 - low.slope * far.slope
    usable = known & (inside > 0)
    d2 = torch.sign(width) * torch.where(usable, inside, torch.ones_like(inside)).sqrt()
    below = far.slope - low.slope + 2 * d2
    usable = usable & (below != 0)
    share = 1 - (far.slope + d2 - d1) / torch.where(usable, below, torch.ones_like(below))
    # Next to an end the cubic is not to be trusted to shrink the interval.
    usable = usable & (share >= 0.1) & (share <= 0.9)
    inner = low.t + torch.where(usable, share, torch.full_like(share, 0.5)) * width
    return torch.where(bounded, inner, 2 * low.t)


def _ended(accepted: Tensor, at: Point) -> Tensor:
    status = torch.where(accepted, int(Status.CONVERGED), torch.full_like(accepted, RUNNING, dtype=torch.int64))
    # A lane that is broken already would be searched to the last trial in every step of the others.
    return torch.where(torch.isfinite(at.objective), status, torch.full_like(status, Status.NON_FINITE))


def descend(
    problem: Bound,
    at: Point,
    direction: Tensor,
    gradient: Tensor,
    first: Tensor,
    line_search: LineSearch,
    look: bool,
) -> tuple[Point, Tensor]:
    """Search along `direction`, or along -gradient in lanes where that is no descent direction.

    Args:
        problem: evaluates the objective.
        at: where the line starts.
        direction: ``[*lanes, n]``.
        gradient: ``[*lanes, n]``, of the objective at the start.
        first: ``[*lanes]``, the step size to try first.
        line_search: how the step size is found.
        look: whether values may be looked at.

    Returns:
        The new point, and int64 ``[*lanes]``: RUNNING where a step was found, else STALLED (the step is below the
        rounding of x, or the decrease to be expected below that of the objective) or LINE_SEARCH_FAILED.
    """
    slope = dot(direction, gradient)
    # Where the gradient is zero there is no way down: the direction is zero too, but not its derivative, which must be
    # that of the solver's step.
    downhill = ((slope < 0) | (gradient == 0).all(-1)) & torch.isfinite(direction).all(-1)
    direction = torch.where(downhill.unsqueeze(-1), direction, -gradient)
    slope = torch.where(downhill, slope, -dot(gradient, gradient))
    point, found = line_search.search(problem, at, direction, slope, first, look)
    hopeless = Line(at, direction, slope, first).drowned
    status = torch.full_like(found, Status.LINE_SEARCH_FAILED, dtype=torch.int64)
    status = torch.where(hopeless, torch.full_like(status, Status.STALLED), status)
    return point, torch.where(found, torch.full_like(status, RUNNING), status)
