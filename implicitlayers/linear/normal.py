"""Methods on the normal equations AᵀA x = Aᵀb, for operators that come with their transpose.

The condition number of the normal equations is the square of A's, and the number of steps goes with it: about
κ·log(1/rtol) instead of √κ·log(1/rtol). Neither method ever forms AᵀA, and both stop at the residual of A x = b. Where
AᵀA x = Aᵀb is solved but A x = b is not, there is no solution, and the lane is SINGULAR with a least-squares solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.krylov import Course, System, divide, hypot, normalized, report, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, freeze, iterate, norm, not_finite
from implicitlayers.status import RUNNING, Status

__all__ = ["LSMR", "NormalCG"]


@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on AᵀA x = Aᵀb (CGLS; Hestenes & Stiefel 1952; Björck 1996, section 7.4).

    The k-th iterate minimizes ‖A x - b‖ over a Krylov space of AᵀA. Choose it for a well-conditioned A whose
    eigenvalues surround the origin, orthogonal or skew-symmetric matrices say, which stop `GMRES` and `BiCGStab`;
    otherwise those need far fewer products. Two products a step, one with A and one with Aᵀ. `LSMR` costs as much and
    is the smoother one.

    Args:
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the steps; their exact number with ``rtol=atol=None``.
    """

    requires_transpose: ClassVar[bool] = True

    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_tolerances(self)

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        return _solve(_LeastSquaresGradients(), self, operator, b, x0)


@dataclass(frozen=True)
class LSMR(LinearSolver):
    """Least squares by bidiagonalization (Fong & Saunders 2011): MINRES on AᵀA x = Aᵀb.

    Both ‖A x - b‖ and ‖Aᵀ(A x - b)‖ fall in every step, so that a step limit leaves a usable vector. Choose it where A
    may be singular or nearly so and a least-squares solution is wanted; started from zero it is the one of least norm.
    Two products a step, one with A and one with Aᵀ.

    Args:
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the steps; their exact number with ``rtol=atol=None``.
    """

    requires_transpose: ClassVar[bool] = True

    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_tolerances(self)

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        return _solve(_Bidiagonalization(), self, operator, b, x0)


def _solve(
    algorithm: Algorithm, solver: NormalCG | LSMR, operator: Operator, b: Tensor, x0: Tensor | None
) -> LinearSolution:
    system = scaled(operator, b, x0, solver.rtol, solver.atol)
    end = iterate(algorithm, system, system.start, solver.max_steps, look=solver.looks)
    return report(system, end.state.x, end, end.state.course, verify=solver.looks)


def _end(problem: System, x: Tensor, course: Course) -> Tensor:
    # In exact arithmetic n steps are enough; rounding makes it several times as many at the squared condition number.
    patience = 4 * min(x.shape[-1], 200) + 20
    return verdict(course.broken, course.idle, patience, course.residual, problem.tolerance)


class _Gradients(NamedTuple):
    """The direction p has norm one, `size` is that of the textbook's p, and `pull` is ‖Aᵀr‖: no square underflows."""

    x: Tensor
    r: Tensor
    p: Tensor
    pull: Tensor
    size: Tensor
    course: Course


@dataclass(frozen=True)
class _LeastSquaresGradients(Algorithm[System, _Gradients]):
    def init(self, problem: System, x: Tensor) -> _Gradients:
        r = problem.first
        pull, p = normalized(problem.operator.T(r))
        return _Gradients(x, r, p, pull, pull, Course.begin(norm(r.detach())))

    def step(self, problem: System, state: _Gradients) -> _Gradients:
        eps = torch.finfo(state.x.dtype).eps
        q = problem.operator(state.p)
        course = state.course.see(state.p, q)
        done, rounding = course.done(state.x), course.rounding(state.x)
        stretch = norm(q.detach())
        length, unit = normalized(q)
        # The textbook's α‖p‖, which is ‖Aᵀr‖²/(‖A p‖²/‖p‖).
        ratio = divide(state.pull, length)
        alpha = divide(ratio * state.pull, length * state.size)
        zero = 16 * eps * course.stretch
        broken = course.breaks(
            (~rounding & ((state.pull.detach() <= zero * course.residual) | (stretch <= zero)), Status.SINGULAR),
            (~done & not_finite(alpha, stretch, state.pull), Status.NON_FINITE),
        )
        moves = (broken == RUNNING) & ~done
        x = state.x + alpha.unsqueeze(-1) * state.p
        r = state.r - (alpha * length).unsqueeze(-1) * unit
        pull, aim = normalized(problem.operator.T(r))
        growth = divide(pull, state.pull)
        # The textbook's p ← s + β p with β = (pull/pull_old)², divided by the norms that were split off.
        size, p = normalized(pull.unsqueeze(-1) * aim + (growth * growth * state.size).unsqueeze(-1) * state.p)
        stepped = freeze(moves, _Gradients(x, r, p, pull, size, course), state)
        return stepped._replace(course=course.advance(norm(stepped.r.detach()), broken))

    def terminate(self, problem: System, state: _Gradients) -> Tensor:
        return _end(problem, state.x, state.course)


class _Bidiagonal(NamedTuple):
    """Letters as in the paper. Ah and Ahbar are A h and A h̄, from which the residual vector r follows."""

    x: Tensor
    r: Tensor
    u: Tensor
    v: Tensor
    alpha: Tensor
    alphabar: Tensor
    zetabar: Tensor
    rho: Tensor
    rhobar: Tensor
    cbar: Tensor
    sbar: Tensor
    turn: Tensor
    h: Tensor
    hbar: Tensor
    Ah: Tensor
    Ahbar: Tensor
    course: Course


@dataclass(frozen=True)
class _Bidiagonalization(Algorithm[System, _Bidiagonal]):
    def init(self, problem: System, x: Tensor) -> _Bidiagonal:
        r = problem.first
        beta, u = normalized(r)
        alpha, v = normalized(problem.operator.T(u))
        zero, one, none = torch.zeros_like(beta), torch.ones_like(beta), torch.zeros_like(r)
        course = Course.begin(norm(r.detach()))
        return _Bidiagonal(
            x, r, u, v, alpha, alpha, alpha * beta, one, one, one, zero, zero, none, none, none, none, course
        )

    def step(self, problem: System, state: _Bidiagonal) -> _Bidiagonal:
        s, eps = state, torch.finfo(state.x.dtype).eps
        Av = problem.operator(s.v)
        course = s.course.see(s.v, Av)
        done, rounding = course.done(state.x), course.rounding(state.x)
        # h and A h of this step; `turn` is θ/ρ of the step before.
        h, Ah = s.v - s.turn.unsqueeze(-1) * s.h, Av - s.turn.unsqueeze(-1) * s.Ah
        beta, u = normalized(Av - s.alpha.unsqueeze(-1) * s.u)
        alpha, v = normalized(problem.operator.T(u) - beta.unsqueeze(-1) * s.v)

        rho = hypot(s.alphabar, beta)
        c, sn = divide(s.alphabar, rho), divide(beta, rho)
        theta, alphabar = sn * alpha, c * alpha
        thetabar, diagonal = s.sbar * rho, s.cbar * rho
        rhobar = hypot(diagonal, theta)
        cbar, sbar = divide(diagonal, rhobar), divide(theta, rhobar)
        zeta, zetabar = cbar * s.zetabar, -sbar * s.zetabar

        # |ζ̄| is ‖Aᵀr‖.
        zero = 16 * eps * course.stretch
        pull, least = s.zetabar.detach().abs(), torch.fmin(rho, rhobar).detach()
        broken = course.breaks(
            (~rounding & ((pull <= zero * course.residual) | (least <= zero)), Status.SINGULAR),
            (~done & not_finite(rho, rhobar, zeta), Status.NON_FINITE),
        )
        moves = (broken == RUNNING) & ~done
        back = (divide(thetabar, s.rhobar) * divide(rho, s.rho)).unsqueeze(-1)
        hbar, Ahbar = h - back * s.hbar, Ah - back * s.Ahbar
        along = divide(divide(zeta, rho), rhobar).unsqueeze(-1)
        stepped = _Bidiagonal(
            s.x + along * hbar,
            s.r - along * Ahbar,
            u, v, alpha, alphabar, zetabar, rho, rhobar, cbar, sbar,
            divide(theta, rho),
            h, hbar, Ah, Ahbar, course,
        )  # fmt: skip
        stepped = freeze(moves, stepped, state)
        return stepped._replace(course=course.advance(norm(stepped.r.detach()), broken))

    def terminate(self, problem: System, state: _Bidiagonal) -> Tensor:
        return _end(problem, state.x, state.course)
