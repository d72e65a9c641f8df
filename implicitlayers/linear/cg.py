"""Conjugate gradients (Hestenes & Stiefel 1952), for symmetric positive definite operators.

Where this differs from the textbook and from SciPy's `cg`:

- The right-hand side is divided by its norm first and the solution multiplied back. In float32 the squared norm of a
  small cotangent underflows, and the textbook recurrence then divides zero by zero.
- pᵀAp is watched. Where it is not positive the operator is not positive definite, the recurrence means nothing, and the
  lane stops at the iterate it has, with the status INDEFINITE (or SINGULAR where A p vanishes). In contrast to
  truncated Newton methods no step along the direction of negative curvature is taken.
- A positive curvature next to zero makes a step next to infinite. `curvature_floor` stops a lane before it, and bounds
  the solution.
- The tolerance is never below what the floating-point type can reach, and a lane that has stopped gaining ends with
  STALLED. What CG lowers in every step is the energy xᵀAx/2 - bᵀx; the residual of an ill-conditioned system may rise
  for hundreds of steps before it falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.certificate import Lanczos
from implicitlayers.linear.krylov import System, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, dot, iterate, not_finite
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["CG"]


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    residual: Tensor
    best: Tensor
    since_best: Tensor
    energy: Tensor
    curvature_min: Tensor
    curvature_max: Tensor
    broken: Tensor
    lanczos: Lanczos
    lost: Tensor


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients: the default for the adjoint of an argmin, whose curvature is symmetric.

    Choose it when A is symmetric positive definite; it needs about √κ·log(1/rtol)/2 products at condition number κ.

    Args:
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the products; their exact number with ``rtol=atol=None``.
        preconditioner: a `Preconditioner`, or r ↦ M⁻¹ r on ``[*lanes, n]``, with M symmetric positive definite; None
            for the identity.
        curvature_floor: smallest curvature that is accepted, in the units of A. A lane stops at the iterate it has, as
            INDEFINITE, where the recurrence for A - curvature_floor·I would break down: in exact arithmetic, when the
            Krylov space first holds a y with yᵀA y ≤ curvature_floor·‖y‖². Whatever A is, then ‖x‖ ≤
            ‖b‖/curvature_floor from a start at zero; the limit for single directions, pᵀA p > curvature_floor·‖p‖²,
            would allow the number of steps times that. 0, the default, stops where pᵀA p ≤ 0 and bounds nothing.

    Raises:
        MisuseError: if a number cannot be, or a floor comes with a preconditioner, in whose coordinates it would be
            another.
    """

    requires_symmetric: ClassVar[bool] = True

    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000
    preconditioner: Preconditioner | Precondition | None = None
    curvature_floor: float = 0.0

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not 0 <= self.curvature_floor < math.inf:
            raise MisuseError(
                f"CG(curvature_floor={self.curvature_floor}): the smallest curvature that is accepted cannot be "
                f"negative, infinite or NaN; pass a number >= 0, with 0 for none."
            )
        if self.curvature_floor and self.preconditioner is not None:
            raise MisuseError(
                f"CG(curvature_floor={self.curvature_floor}, preconditioner=...): with a preconditioner, CG sees the "
                f"curvature of another matrix, which the floor is not meant for; leave one of them out."
            )

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = scaled(operator, b, x0, self.rtol, self.atol, self.preconditioner)
        end = iterate(_ConjugateGradients(self.curvature_floor), system, system.start, self.max_steps, look=self.looks)
        s: _State = end.state
        # With a preconditioner the Lanczos matrix is that of another operator.
        smallest = s.lanczos.smallest()
        smallest = smallest if self.preconditioner is None else torch.full_like(smallest, torch.nan)
        x = s.x * system.scale
        return LinearSolution(x, end.status, end.steps, s.residual, s.curvature_min, s.curvature_max, smallest)


@dataclass(frozen=True)
class _ConjugateGradients(Algorithm[System, _State]):
    floor: float

    def init(self, problem: System, x: Tensor) -> _State:
        r = problem.first
        z, rz, residual = _precondition(problem, r)
        nan = torch.full_like(residual, torch.nan)
        steady = torch.zeros_like(residual, dtype=torch.int64)
        none, broken = torch.zeros_like(residual), torch.full_like(steady, RUNNING)
        lanczos, lost = Lanczos.begin(residual), torch.full_like(residual, self.floor)
        return _State(x, r, z, rz, residual, residual, steady, none, nan, nan, broken, lanczos, lost)

    def step(self, problem: System, state: _State) -> _State:
        x, r, p, rz = state.x, state.r, state.p, state.rz
        Ap = problem.operator(p)
        pAp, pp, ApAp = dot(p, Ap), dot(p, p), dot(Ap, Ap)
        # p vanishes only together with r: the lane has converged, and a fixed number of steps carries it along unmoved.
        # A preconditioner may let rᵀM⁻¹r underflow first.
        done = (pp <= 0) | (rz <= 0)
        curvature = pAp / torch.where(pp <= 0, 1, pp)
        broken = _breakdown(state, curvature, pAp, (ApAp / torch.where(pp <= 0, 1, pp)).sqrt(), done)
        if self.floor:
            low = (pAp <= state.lost * rz) & ~done & (broken == RUNNING)
            broken = torch.where(low, int(Status.INDEFINITE), broken)
        moves = (broken == RUNNING) & ~done
        length = torch.where(moves, rz / torch.where(moves, pAp, 1), 0).to(x.dtype)
        alpha = length.unsqueeze(-1)
        # In a broken lane alpha is zero and p finite, so x stays; r may become NaN there, and is of no further use.
        x = torch.addcmul(x, alpha, p)
        r = torch.addcmul(r, alpha, Ap, value=-1)
        z, rz_next, residual = _precondition(problem, r)
        beta = torch.where(moves, rz_next / torch.where(moves, rz, 1), 0).to(x.dtype)
        p = torch.where(moves.unsqueeze(-1), torch.addcmul(z, beta.unsqueeze(-1), p), p)
        # Twice what the step has lowered the energy by, and what all steps have.
        gain = (alpha.squeeze(-1) * rz).detach()
        energy = state.energy + gain
        lower = residual < 0.999 * state.best
        better = lower | (gain > torch.finfo(x.dtype).eps ** 0.75 * energy)
        seen = ~done & torch.isfinite(curvature)
        curvature = curvature.to(x.dtype)
        return _State(
            x, r, p,
            torch.where(moves, rz_next, rz),
            torch.where(broken == RUNNING, residual, state.residual),
            torch.where(lower, residual, state.best),
            torch.where(better, 0, state.since_best + 1),
            energy.to(x.dtype),
            torch.where(seen, torch.fmin(state.curvature_min, curvature), state.curvature_min),
            torch.where(seen, torch.fmax(state.curvature_max, curvature), state.curvature_max),
            broken,
            state.lanczos.advance(length, beta),
            _lost(state.lost, length, beta, self.floor) if self.floor else state.lost,
        )  # fmt: skip

    def terminate(self, problem: System, state: _State) -> Tensor:
        # In exact arithmetic n steps are enough; a lane that has gained nothing for as long is held up by rounding.
        patience = min(state.x.shape[-1], 200) + 20
        return verdict(state.broken, state.since_best, patience, state.residual, problem.tolerance)


def _precondition(problem: System, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M⁻¹ r, rᵀM⁻¹ r and ‖r‖; with the right-hand side scaled to norm one, squares do not underflow."""
    rr = dot(r, r)
    residual = rr.detach().sqrt().to(r.dtype)
    z = problem.precondition(r)
    return z, rr if z is r else dot(r, z), residual


def _lost(lost: Tensor, length: Tensor, beta: Tensor, floor: float) -> Tensor:
    """What the next pivot of the Lanczos matrix T loses when T - floor·I is factored in the place of T.

    The pivots of T are the reciprocals of CG's step lengths, pᵀAp/rᵀr, so that T - floor·I is positive definite as long
    as each of them is larger than what it loses: e₁ = floor, eₖ₊₁ = floor + βₖ eₖ / (1 - αₖ eₖ). All terms are
    positive, and none cancels (the differential qd algorithm with a shift: Fernando & Parlett 1994).
    """
    length, beta = length.detach(), beta.detach()
    return (floor + beta * lost / (1 - length * lost)).to(lost.dtype)


def _breakdown(state: _State, curvature: Tensor, pAp: Tensor, stretch: Tensor, done: Tensor) -> Tensor:
    """Status of the lanes in which p does not allow a step; `stretch` is ‖A p‖ / ‖p‖."""
    eps = torch.finfo(state.x.dtype).eps
    # The largest curvature seen so far says what is zero to rounding.
    scale = torch.fmax(state.curvature_max.abs(), curvature.abs())
    flat = (stretch <= 8 * eps * scale) | ((pAp <= 0) & (curvature.abs() <= 8 * eps * scale))
    # A step along a positive curvature that is rounding would have the size of its reciprocal, and the recurrence would
    # report its residual as zero.
    flat = flat | (curvature.abs() <= eps * scale)
    found = torch.where(pAp <= 0, int(Status.INDEFINITE), torch.full_like(state.broken, RUNNING))
    found = torch.where(flat, int(Status.SINGULAR), found)
    found = torch.where(not_finite(pAp, stretch), int(Status.NON_FINITE), found)
    found = torch.where(done, RUNNING, found)
    return torch.where(state.broken == RUNNING, found, state.broken)
