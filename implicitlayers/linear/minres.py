"""Minimal residuals (Paige & Saunders 1975), for symmetric operators that may be indefinite.

Where this differs from the textbook and from SciPy's `minres`:

- The residual vector is carried along by rₖ = sₖ² rₖ₋₁ - φ̄ₖ cₖ vₖ₊₁ (Choi, Paige & Saunders 2011), so that the
  tolerance applies to its Euclidean norm with a preconditioner as well, and not to a norm that depends on it.
- Where A rₖ vanishes to rounding but rₖ does not, the equation has no solution, and the lane is SINGULAR; it keeps the
  least-squares solution that it has found.
- Where the operator is the curvature of a minimization, a residual with rᵀAr ≤ 0 ends the lane as INDEFINITE with the
  iterate before it, along which the objective still falls (Liu & Roosta 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.krylov import Course, System, divide, hypot, report, root, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, dot, freeze, iterate, norm, not_finite
from implicitlayers.status import RUNNING, Status

__all__ = ["MINRES"]


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residuals: the Krylov method for a symmetric A that is indefinite, singular or only nearly positive.

    The k-th iterate minimizes ‖A x - b‖ over the k-th Krylov space. Choose it for saddle points and shifted systems,
    and for a curvature in which `CG` meets negative directions although the derivative is well defined. About
    κ·log(1/rtol) products at condition number κ where A is indefinite, and as many as CG where it is not. One product
    more at the end checks the residual.

    Args:
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the products; their exact number with ``rtol=atol=None``.
        preconditioner: a `Preconditioner`, or r ↦ M⁻¹ r, with M symmetric positive definite; None for the identity.
    """

    requires_symmetric: ClassVar[bool] = True

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
        end = iterate(_MinimalResiduals(), system, system.start, self.max_steps, look=self.looks)
        return report(system, end.state.x, end, end.state.course, verify=self.looks)


class _Lanczos(NamedTuple):
    """The last two Lanczos vectors, not yet divided by β = √(vᵀM⁻¹v), and z = M⁻¹ v."""

    old: Tensor
    v: Tensor
    z: Tensor
    old_beta: Tensor
    beta: Tensor


class _Rotation(NamedTuple):
    """The QR factorization of the tridiagonal matrix, as far as the next column needs it; letters as in SciPy."""

    cs: Tensor
    sn: Tensor
    dbar: Tensor
    epsln: Tensor
    phibar: Tensor


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    lanczos: _Lanczos
    rotation: _Rotation
    w: Tensor
    w_old: Tensor
    spread: Tensor
    course: Course


@dataclass(frozen=True)
class _MinimalResiduals(Algorithm[System, _State]):
    def init(self, problem: System, x: Tensor) -> _State:
        r = problem.first
        z = problem.precondition(r)
        square = dot(r, z)
        beta = root(square).to(r.dtype)
        course = Course.begin(norm(r.detach()))
        course = course._replace(broken=course.breaks((_negative(square, r, z), Status.INDEFINITE)))
        zero, one, none = torch.zeros_like(beta), torch.ones_like(beta), torch.zeros_like(r)
        rotation = _Rotation(-one, zero, zero, zero, beta)
        return _State(x, r, _Lanczos(none, r, z, one, beta), rotation, none, none, zero, course)

    def step(self, problem: System, state: _State) -> _State:
        eps = torch.finfo(state.x.dtype).eps
        (old, v, z, old_beta, beta), (cs, sn, dbar, epsln, phibar) = state.lanczos, state.rotation
        direction = divide(z, beta.unsqueeze(-1))
        product = problem.operator(direction)
        course = state.course.see(direction, product)
        y = product - (beta / old_beta).unsqueeze(-1) * old
        alpha = dot(direction, y).to(y.dtype)
        y = y - divide(alpha, beta).unsqueeze(-1) * v
        new_z = problem.precondition(y)
        square = dot(y, new_z)
        new_beta = root(square).to(y.dtype)
        spread = torch.fmax(state.spread, hypot(alpha, new_beta).detach())

        delta, gbar = cs * dbar + sn * alpha, sn * dbar - cs * alpha
        gamma = hypot(gbar, new_beta)
        # Of the residual before this step: rᵀAr / rᵀr is -cs·γ̄, and ‖A r‖ / ‖r‖ is made of γ̄ and the next δ̄.
        quotient, image = (-cs * gbar).detach(), hypot(gbar, cs * new_beta).detach()
        done = (beta == 0) | course.done(state.x)
        zero = 16 * eps * spread
        curved = (quotient < -zero) if problem.operator.minimizing else torch.zeros_like(done)
        broken = course.breaks(
            (~done & curved, Status.INDEFINITE),
            (~done & ~course.rounding(state.x) & (image <= zero), Status.SINGULAR),
            (~done & _negative(square, y, new_z), Status.INDEFINITE),
            (~done & not_finite(alpha, square, course.residual), Status.NON_FINITE),
        )
        moves = (broken == RUNNING) & ~done
        gamma = torch.where(moves, gamma, torch.ones_like(gamma))
        new_cs, new_sn = gbar / gamma, new_beta / gamma
        w = (direction - epsln.unsqueeze(-1) * state.w_old - delta.unsqueeze(-1) * state.w) / gamma.unsqueeze(-1)
        new_phibar = new_sn * phibar
        x = state.x + (new_cs * phibar).unsqueeze(-1) * w
        unit = divide(y, new_beta.unsqueeze(-1))
        r = (new_sn * new_sn).unsqueeze(-1) * state.r - (new_phibar * new_cs).unsqueeze(-1) * unit
        stepped = _State(
            x, r,
            _Lanczos(v, y, new_z, beta, new_beta),
            _Rotation(new_cs, new_sn, -cs * new_beta, sn * new_beta, new_phibar),
            w, state.w, spread, course,
        )  # fmt: skip
        stepped = freeze(moves, stepped, state)
        return stepped._replace(course=course.advance(norm(stepped.r.detach()), broken))

    def terminate(self, problem: System, state: _State) -> Tensor:
        course = state.course
        # In exact arithmetic n steps are enough; a residual that has not fallen for as long is held up by rounding.
        patience = min(state.x.shape[-1], 200) + 20
        return verdict(course.broken, course.idle, patience, course.residual, problem.tolerance)


def _negative(square: Tensor, r: Tensor, z: Tensor) -> Tensor:
    """Whether rᵀM⁻¹r is below zero by more than rounding: the preconditioner is not positive definite."""
    return square < -8 * torch.finfo(r.dtype).eps * (norm(r.detach()) * norm(z.detach()))
