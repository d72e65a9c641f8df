"""Gauss-Newton and Levenberg-Marquardt, for objectives that declare where the model ends and the loss begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.auto import Auto
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.loop import check_tolerances, dot, freeze, norm
from implicitlayers.problem import Bound
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.direction import damped, gauss_newton_of, newton_direction
from implicitlayers.solvers.line_search import Armijo, LineSearch, Point, descend
from implicitlayers.status import RUNNING, MisuseError

__all__ = ["GaussNewton", "LevenbergMarquardt"]


class _State(NamedTuple):
    point: Point
    progress: Progress
    search: Tensor


@dataclass(frozen=True)
class GaussNewton(Solver[_State]):
    """Gauss-Newton, x ← x - t (JᵀBJ + damping·I)⁻¹ ∇f for f = loss(model(x)), J = ∂model/∂x and B = ∂²loss/∂z².

    For a sum of squares ½‖r‖² this is the method of Gauss, with B = I. Choose it where the model fits well: near a
    solution with small residuals it converges like Newton's method, without second derivatives of the model, and its
    curvature is never negative. `LevenbergMarquardt` is the safer choice far from the solution or where J lacks rank.
    The objective must be a `Composite`, as `least_squares` makes one (Nocedal & Wright 2006, section 10.3).

    Args:
        linear_solver: solves for the direction, in every step.
        line_search: how the step size is found, starting from 1.
        damping: added to JᵀBJ, in its units.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    linear_solver: LinearSolver = field(default_factory=lambda: Auto(rtol=1e-6, max_steps=200))
    line_search: LineSearch = field(default_factory=Armijo)
    damping: float = 0.0
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 200

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not self.damping >= 0:
            raise MisuseError(f"GaussNewton(damping={self.damping}): pass a number >= 0.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        gauss_newton_of(problem, self)
        point = Point(x, *problem.value_and_residual(x))
        search = torch.full_like(point.objective, RUNNING, dtype=torch.int64)
        return _State(point, Progress.begin(problem, *point), search)

    def step(self, problem: Bound, state: _State) -> _State:
        old = state.point
        direction = newton_direction(gauss_newton_of(problem, self), old, self.linear_solver, self.damping)
        first = torch.ones_like(old.objective)
        new, search = descend(problem, old, direction, old.F, first, self.line_search, self.looks)
        progress = state.progress.advance((old.x, old.F), (new.x, new.F), new.objective)
        return _State(new, progress, search)

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        status = state.progress.verdict(self, patience=10)
        return torch.where((status == RUNNING) & (state.search != RUNNING), state.search, status)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.point.x, norm(state.point.F), state.point.objective


class _Damped(NamedTuple):
    point: Point
    progress: Progress
    damping: Tensor
    growth: Tensor


@dataclass(frozen=True)
class LevenbergMarquardt(Solver[_Damped]):
    """Levenberg-Marquardt, x ← x - (JᵀBJ + μI)⁻¹ ∇f with J and B as for `GaussNewton` and a damping μ for every lane.

    A step is taken only if the objective falls. With ρ the fall in units of what the quadratic model promised, μ is
    multiplied by max(⅓, 1 - (2ρ - 1)³) after a step, and by 2, 4, 8, … after one refusal after the other (Nielsen
    1999). Choose it for nonlinear least squares from a rough start, and where J lacks rank. The objective must be a
    `Composite`, as `least_squares` makes one. Where the fall drowns in the rounding of f it is taken from the slopes at
    both ends of the step, -½ dᵀ(∇f + ∇f₊).

    Args:
        linear_solver: solves for the step.
        initial: first μ as a fraction of the curvature along the gradient.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, refused ones included, or their exact number with ``rtol=atol=None``.
    """

    linear_solver: LinearSolver = field(default_factory=lambda: Auto(rtol=1e-6, max_steps=200))
    initial: float = 1e-3
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 300

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not self.initial > 0:
            raise MisuseError(f"LevenbergMarquardt(initial={self.initial}): pass a number > 0.")

    def init(self, problem: Bound, x: Tensor) -> _Damped:
        point = Point(x, *problem.value_and_residual(x))
        # One product tells the scale of the curvature, which is all that μ must be comparable to.
        slope = norm(point.F)
        stretch = norm(gauss_newton_of(problem, self).linearize(x)(point.F)) / torch.where(slope > 0, slope, 1)
        damping = self.initial * torch.where(torch.isfinite(stretch) & (stretch > 0), stretch, 1)
        return _Damped(point, Progress.begin(problem, *point), damping.detach(), 2 * torch.ones_like(damping))

    def step(self, problem: Bound, state: _Damped) -> _Damped:
        old, eps = state.point, torch.finfo(state.damping.dtype).eps
        curved = gauss_newton_of(problem, self)
        direction = newton_direction(damped(curved, state.damping), old, self.linear_solver, 0.0)
        x = old.x + direction
        new = Point(x, *problem.value_and_residual(x))
        promised = -dot(direction, old.F) - dot(direction, curved.linearize(old.x)(direction)) / 2
        fall = old.objective - new.objective
        fall = torch.where(fall.abs() <= eps**0.5 * old.objective.abs(), -dot(direction, old.F + new.F) / 2, fall)
        ratio = (fall / torch.where(promised > 0, promised, 1)).detach()
        # False for NaN, so that a point outside the domain is refused. A step of zero is no step back.
        still = (old.F == 0).all(-1)
        taken = (((promised > 0) & (ratio > 1e-4)) | still) & torch.isfinite(new.F).all(-1)
        shrink = torch.fmax(1 - (2 * ratio - 1) ** 3, torch.full_like(ratio, 1 / 3)).clamp_max(2)
        damping = state.damping * torch.where(taken, shrink, state.growth)
        growth = torch.where(taken, 2 * torch.ones_like(ratio), 2 * state.growth)
        new = freeze(taken, new, old)
        progress = state.progress.advance((old.x, old.F), (new.x, new.F), new.objective)
        tiny, huge = torch.finfo(damping.dtype).tiny, torch.finfo(damping.dtype).max
        return _Damped(new, progress, damping.clamp(tiny, huge), growth.clamp_max(2.0**32))

    def terminate(self, problem: Bound, state: _Damped) -> Tensor:
        # Refusals double the factor on μ each time: after twenty the step is below rounding.
        return state.progress.verdict(self, patience=20)

    def postprocess(self, problem: Bound, state: _Damped) -> tuple[Tensor, Tensor, Tensor]:
        return state.point.x, norm(state.point.F), state.point.objective

    def resume(self, problem: Bound, state: _Damped) -> _Damped:
        return self.init(problem, state.point.x)._replace(damping=state.damping, growth=state.growth)
