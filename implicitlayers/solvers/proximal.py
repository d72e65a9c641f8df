"""Proximal gradient methods, plain and accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import Algorithm, check_tolerances, dot, freeze, iterate, norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.line_search import Point
from implicitlayers.solvers.mapping import begin, forward_backward, total
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["ProximalGradient"]


class _State(NamedTuple):
    point: Point
    mapping: Tensor
    ahead: Tensor
    inertia: Tensor
    step: Tensor
    progress: Progress
    search: Tensor


@dataclass(frozen=True)
class ProximalGradient(Solver[_State]):
    """Proximal gradient descent, x⁺ = prox(y - t ∇f(y), t), for a smooth f plus a part with kinks or constraints.

    Accelerated (FISTA, Beck & Teboulle 2009), y runs ahead of x along its last move, with an inertia that is set back
    to nothing in a lane where it points uphill, (y - x⁺)ᵀ(x⁺ - x) > 0 (O'Donoghue & Candès 2015): the rate is then
    that of the problem's condition number, without knowing it. Otherwise y = x (ISTA). The step t is halved in a lane
    until f(x⁺) ≤ f(y) + ∇f(y)ᵀd + ‖d‖²/(2t) with d = x⁺ - y; where the difference drowns in the rounding of f, until
    (∇f(x⁺) - ∇f(y))ᵀd ≤ ‖d‖²/t, which needs no difference of values. A smooth problem has the identity as prox.

    The residual that is stopped on is the gradient mapping (x - prox(x - t∇f(x), t))/t at the iterate returned.

    Args:
        accelerated: FISTA if True, ISTA if False.
        step_size: first t; None takes ‖∇f‖/‖∇²f ∇f‖ at the start, which is at least 1/L.
        backtracks: halvings before a lane fails; 0 keeps t. With ``rtol=atol=None`` all of them are evaluated.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.MINIMUM, Kind.COMPOSITE})

    accelerated: bool = True
    step_size: float | None = None
    backtracks: int = 30
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances(self)
        if self.step_size is not None and not self.step_size > 0:
            raise MisuseError(f"ProximalGradient(step_size={self.step_size}): pass a positive step size, or None.")
        if self.backtracks < 0:
            raise MisuseError(f"ProximalGradient(backtracks={self.backtracks}): pass an integer >= 0.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        return self._begin(problem, x, self._first_step(problem, x, problem.value_and_residual(x)[1]))

    def step(self, problem: Bound, state: _State) -> _State:
        old = state.point
        # Without inertia y is x, whose evaluation is known.
        y = Point(state.ahead, *problem.value_and_residual(state.ahead)) if self.accelerated else old
        search = _Backtracking(y)
        trial: _Trial = iterate(search, problem, state.step, self.backtracks, look=self.looks).state
        kept = trial.accepted | (self.backtracks == 0)
        new = freeze(kept, trial.point, old)
        step = torch.where(kept, trial.step, state.step)
        ahead, inertia = self._run_ahead(y.x, old.x, new.x, state.inertia)
        objective = total(problem, new.x, new.objective)
        mapping = forward_backward(problem, new.x, new.F, step)[1]
        progress = state.progress.advance((old.x, state.mapping), (new.x, mapping), objective)
        failed = torch.full_like(state.search, Status.LINE_SEARCH_FAILED)
        return _State(new, mapping, ahead, inertia, step, progress, torch.where(kept, state.search, failed))

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        # Accelerated steps rise and fall in waves, which on an ill-conditioned problem are long.
        status = state.progress.verdict(self, patience=200)
        return torch.where((status == RUNNING) & (state.search != RUNNING), state.search, status)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.point.x, state.progress.residual, state.progress.objective

    def resume(self, problem: Bound, state: _State) -> _State:
        anew = self._begin(problem, state.point.x, state.step.detach())
        return anew._replace(ahead=state.ahead, inertia=state.inertia)

    def _begin(self, problem: Bound, x: Tensor, step: Tensor) -> _State:
        point = Point(x, *problem.value_and_residual(x))
        mapping = forward_backward(problem, x, point.F, step)[1]
        running = torch.full_like(step, RUNNING, dtype=torch.int64)
        return _State(point, mapping, x, torch.ones_like(step), step, begin(problem, *point, step), running)

    def _first_step(self, problem: Bound, x: Tensor, F: Tensor) -> Tensor:
        length = norm(F).detach()
        if self.step_size is not None:
            return torch.full_like(length, self.step_size)
        bend = norm(problem.linearize(x)(F)).detach()
        usable = (length > 0) & (bend > 0) & torch.isfinite(bend) & torch.isfinite(length)
        return torch.where(usable, length / torch.where(usable, bend, torch.ones_like(bend)), torch.ones_like(length))

    def _run_ahead(self, y: Tensor, old: Tensor, new: Tensor, inertia: Tensor) -> tuple[Tensor, Tensor]:
        if not self.accelerated:
            return new, inertia
        uphill = dot(y - new, new - old) > 0
        grown = torch.where(uphill, torch.ones_like(inertia), (1 + (1 + 4 * inertia * inertia).sqrt()) / 2)
        share = torch.where(uphill, torch.zeros_like(inertia), (inertia - 1) / grown)
        return new + share.unsqueeze(-1) * (new - old), grown


class _Trial(NamedTuple):
    step: Tensor
    point: Point
    accepted: Tensor


@dataclass(frozen=True)
class _Backtracking(Algorithm[Bound, _Trial]):
    """Halve t until the quadratic model with curvature 1/t lies above f at the new point."""

    y: Point

    def init(self, problem: Bound, x: Tensor) -> _Trial:
        return self._try(problem, x)

    def step(self, problem: Bound, state: _Trial) -> _Trial:
        return freeze(~state.accepted, self._try(problem, state.step / 2), state)

    def terminate(self, problem: Bound, state: _Trial) -> Tensor:
        running = torch.full_like(state.accepted, RUNNING, dtype=torch.int64)
        status = torch.where(state.accepted, torch.full_like(running, Status.CONVERGED), running)
        # A lane that is broken already would be searched to the last trial in every step of the others.
        broken = ~torch.isfinite(self.y.x).all(-1) | ~torch.isfinite(self.y.objective)
        return torch.where(broken, torch.full_like(status, Status.NON_FINITE), status)

    def _try(self, problem: Bound, step: Tensor) -> _Trial:
        x = forward_backward(problem, self.y.x, self.y.F, step)[0]
        point = Point(x, *problem.value_and_residual(x))
        d, eps = x - self.y.x, torch.finfo(x.dtype).eps
        room = dot(d, d) / step
        rise = point.objective - self.y.objective
        below = rise <= dot(self.y.F, d) + room / 2
        drowned = rise.abs() <= eps**0.5 * self.y.objective.abs()
        gentle = dot(point.F - self.y.F, d) <= room
        # False for NaN, so that a point outside the domain is refused.
        accepted = torch.where(drowned, gentle, below) & torch.isfinite(point.F).all(-1)
        return _Trial(step, point, accepted)
