"""Stabilized biconjugate gradients (van der Vorst 1992), for operators of which nothing is known.

Where this differs from the textbook and from SciPy's `bicgstab`:

- The preconditioner stands on the right, so that the residual is that of the equation.
- Where the residual becomes orthogonal to the shadow residual, or the stabilizing step vanishes, the recurrence starts
  anew in that lane with the current residual as shadow, instead of dividing by zero. Where a fresh start breaks down at
  once (A is skew-symmetric, say), the lane is STALLED.
- The residual may rise by orders of magnitude on the way. Where convergence is checked, the iterate with the smallest
  one is returned, so that a lane that stalls is never left worse than it was.
- Two products a step, and one more at the end that checks the residual: the recurrence is known to drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.krylov import Course, System, divide, report, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, dot, iterate, norm, not_finite
from implicitlayers.status import RUNNING, Status

__all__ = ["BiCGStab"]


@dataclass(frozen=True)
class BiCGStab(LinearSolver):
    """Stabilized biconjugate gradients: short recurrences for an A that is not symmetric.

    Choose it where n is so large that the vectors of `GMRES` do not fit, or where GMRES needs long cycles. The residual
    does not fall evenly, and eigenvalues near the imaginary axis stop it; there GMRES with a long cycle is the remedy.

    Args:
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the steps of two products each; their exact number with ``rtol=atol=None``.
        preconditioner: a `Preconditioner`, or r ↦ M⁻¹ r; None for the identity.
    """

    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000
    preconditioner: Preconditioner | Precondition | None = None

    def __post_init__(self) -> None:
        check_tolerances(self)

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = scaled(operator, b, x0, self.rtol, self.atol, self.preconditioner)
        end = iterate(_Stabilized(), system, system.start, self.max_steps, look=self.looks)
        state: _State = end.state
        return report(system, state.best if self.looks else state.x, end, state.course, verify=self.looks)


class _State(NamedTuple):
    """`shadow` is the vector r̂ that residuals are made orthogonal to, rho is r̂ᵀr, `fresh` tells where p = r = r̂."""

    x: Tensor
    best: Tensor
    lowest: Tensor
    r: Tensor
    shadow: Tensor
    p: Tensor
    rho: Tensor
    fresh: Tensor
    course: Course


@dataclass(frozen=True)
class _Stabilized(Algorithm[System, _State]):
    def init(self, problem: System, x: Tensor) -> _State:
        r = problem.first
        course = Course.begin(norm(r.detach()))
        fresh = torch.ones_like(course.idle, dtype=torch.bool)
        return _State(x, x, course.residual, r, r, r, dot(r, r).to(r.dtype), fresh, course)

    def step(self, problem: System, state: _State) -> _State:
        x, r, shadow, p, rho = state.x, state.r, state.shadow, state.p, state.rho
        eps = torch.finfo(x.dtype).eps
        done = state.course.done(x)
        direction = problem.precondition(p)
        v = problem.operator(direction)
        course = state.course.see(direction, v)
        pivot = dot(shadow, v).to(x.dtype)
        orthogonal = pivot.detach().abs() <= eps * (norm(shadow.detach()) * norm(v.detach()))
        broken = course.breaks(
            (~done & orthogonal & state.fresh, Status.STALLED),
            (~done & (norm(v.detach()) <= 8 * eps * course.stretch * norm(direction.detach())), Status.SINGULAR),
            (~done & not_finite(pivot, rho), Status.NON_FINITE),
        )
        moves = (broken == RUNNING) & ~done & ~orthogonal
        alpha = torch.where(moves, divide(rho, pivot), torch.zeros_like(rho)).unsqueeze(-1)
        s = r - alpha * v
        second = problem.precondition(s)
        t = problem.operator(second)
        course = course.see(second, t)
        ts, tt = dot(t, s).to(x.dtype), dot(t, t).to(x.dtype)
        finite = ~not_finite(ts, tt)
        broken = torch.where(moves & ~finite, torch.full_like(broken, Status.NON_FINITE), broken)
        moves = moves & finite
        omega = torch.where(moves, divide(ts, tt), torch.zeros_like(ts)).unsqueeze(-1)
        mask = moves.unsqueeze(-1)
        x = torch.where(mask, x + alpha * direction + omega * second, x)
        r = torch.where(mask, s - omega * t, r)

        next_rho = dot(shadow, r).to(x.dtype)
        lost = next_rho.detach().abs() <= eps * (norm(shadow.detach()) * norm(r.detach()))
        # Lanes that did not move because p was at fault start anew as well.
        anew = ~done & (orthogonal | lost | (omega.squeeze(-1) == 0))
        beta = divide(next_rho, rho) * divide(alpha.squeeze(-1), omega.squeeze(-1))
        p = torch.where(anew.unsqueeze(-1), r, r + beta.unsqueeze(-1) * (p - omega * v))
        residual = norm(r.detach())
        better = residual < state.lowest
        return _State(
            x,
            torch.where(better.unsqueeze(-1), x, state.best),
            torch.where(better, residual, state.lowest),
            r,
            torch.where(anew.unsqueeze(-1), r, shadow),
            torch.where(mask | anew.unsqueeze(-1), p, state.p),
            torch.where(anew, dot(r, r).to(x.dtype), next_rho),
            anew,
            course.advance(residual, broken),
        )

    def terminate(self, problem: System, state: _State) -> Tensor:
        course = state.course
        # The residual rises and falls, so that more patience is due than with conjugate gradients.
        patience = 2 * min(state.x.shape[-1], 200) + 20
        return verdict(course.broken, course.idle, patience, course.residual, problem.tolerance)
