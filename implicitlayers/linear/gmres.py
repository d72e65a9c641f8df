"""Restarted GMRES (Saad & Schultz 1986), for operators of which nothing is known.

Where this differs from the textbook and from SciPy's `gmres`:

- The preconditioner stands on the right, A M⁻¹ (M x) = b, so that what is minimized is the residual itself.
- A new vector is orthogonalized twice against all others at once (classical Gram-Schmidt; "twice is enough", Giraud,
  Langou, Rozložník & van den Eshof 2005): as stable as the modified method, in four matrix products instead of a loop.
- The rotations are kept as one orthogonal matrix, whose first column is the history of the residual.
- Every cycle ends with the true residual, and a lane has converged only if that is small. The next cycle starts from
  it, which is iterative refinement.
- A cycle that lowers the residual by less than a thousandth is repeated once, then the lane is STALLED: restarted GMRES
  may stagnate for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.krylov import Course, System, divide, hypot, normalized, report, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, iterate, norm, not_finite
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["GMRES"]


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalized minimal residuals: the robust choice for an A that is not symmetric.

    The k-th iterate of a cycle minimizes ‖A x - b‖ over the k-th Krylov space. Choose it for roots and fixed points;
    few steps are enough where the eigenvalues cluster away from zero, as those of I - J of a contraction do. It keeps
    `restart` + 1 vectors and spends about 8·k·n operations on the k-th; `BiCGStab` needs no such memory, but may break
    down. For a symmetric A `CG` or `MINRES` do the same at less cost.

    Args:
        restart: products a cycle; n or more never restarts.
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol. Taken as 8 machine epsilons where it is smaller, but for 0.
        atol: absolute part, in the units of b.
        max_steps: limit on the products, not counting one at the end of every cycle; their exact number with
            ``rtol=atol=None``.
        preconditioner: a `Preconditioner`, or r ↦ M⁻¹ r; None for the identity.
    """

    restart: int = 30
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000
    preconditioner: Preconditioner | Precondition | None = None

    def __post_init__(self) -> None:
        check_tolerances(self)
        if self.restart < 1:
            raise MisuseError(f"GMRES(restart={self.restart}): a cycle needs one product; pass a positive integer.")

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = scaled(operator, b, x0, self.rtol, self.atol, self.preconditioner)
        restarts = _Restarts(min(self.restart, b.shape[-1], self.max_steps), self.max_steps, self.looks)
        end = iterate(restarts, system, system.start, -(-self.max_steps // restarts.length), look=self.looks)
        state: _State = end.state
        return report(system, state.x, end._replace(steps=state.steps), state.course, verify=False)


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    steps: Tensor
    cycle: int
    course: Course


@dataclass(frozen=True)
class _Restarts(Algorithm[System, _State]):
    """A step is a cycle."""

    length: int
    max_steps: int
    looks: bool

    def init(self, problem: System, x: Tensor) -> _State:
        r = problem.first
        course = Course.begin(norm(r.detach()))
        return _State(x, r, torch.zeros_like(course.idle), 0, course)

    def step(self, problem: System, state: _State) -> _State:
        left = self.max_steps - state.cycle * self.length
        arnoldi = _Arnoldi(min(self.length, left))
        # A lane that is broken starts the cycle with its verdict, and takes no step.
        inner = problem._replace(start=state.r)
        end = iterate(arnoldi, (inner, state.course), state.r, arnoldi.length, look=self.looks)
        x = state.x + problem.precondition(_correction(end.state))
        estimate, course = end.state.course.residual, end.state.course
        if self.looks or left > self.length:
            r = problem.residual_at(x)
            estimate = norm(r.detach())
        else:
            r = state.r
        # The idle steps and the best residual are counted in cycles.
        course = course._replace(residual=state.course.residual, best=state.course.best, idle=state.course.idle)
        course = course.advance(estimate, course.breaks((not_finite(estimate), Status.NON_FINITE)))
        # A lane that broke in this cycle still gets the correction it had found.
        course = course._replace(residual=torch.where(torch.isfinite(estimate), estimate, course.residual))
        steps = end.steps if self.looks else torch.full_like(state.steps, arnoldi.length)
        return _State(x, r, state.steps + steps, state.cycle + 1, course)

    def terminate(self, problem: System, state: _State) -> Tensor:
        tolerance = torch.fmax(problem.tolerance, state.course.attainable(state.x))
        return verdict(state.course.broken, state.course.idle, 1, state.course.residual, tolerance)


@dataclass(frozen=True)
class _Basis:
    """Krylov vectors ``[*lanes, k + 1, n]``. No pytree: it grows, and a finished lane only uses the first of them."""

    vectors: Tensor


class _Cycle(NamedTuple):
    """A cycle after k steps.

    Attributes:
        basis: V.
        length: ‖r‖ at the start of the cycle.
        Q: ``[*lanes, m + 1, m + 1]``, the rotations; the least-squares problem's right-hand side is ‖r‖ Q e₁.
        R: ``[*lanes, m, m]``, upper triangular; the columns of steps that were not made are those of the identity.
        columns: ``[*lanes]``, steps made.
        alive: ``[*lanes]``, whether the Krylov space can still grow.
        k: the same for all lanes, those that have finished included.
        course: as of the whole solve, but that the residual is the estimate of the cycle.
    """

    basis: _Basis
    length: Tensor
    Q: Tensor
    R: Tensor
    columns: Tensor
    alive: Tensor
    k: int
    course: Course


@dataclass(frozen=True)
class _Arnoldi(Algorithm[tuple[System, Course], _Cycle]):
    length: int

    def init(self, problem: tuple[System, Course], x: Tensor) -> _Cycle:
        course = problem[1]
        length, v = normalized(x)
        v = torch.where(torch.isfinite(v), v, torch.zeros_like(v))
        m = self.length
        eye = torch.eye(m + 1, dtype=v.dtype, device=v.device).expand(*length.shape, m + 1, m + 1)
        columns = torch.zeros_like(course.idle)
        alive = (course.broken == RUNNING) & (length > 0) & torch.isfinite(length)
        course = course._replace(residual=length.detach())
        return _Cycle(_Basis(v.unsqueeze(-2)), length, eye, eye[..., :m, :m], columns, alive, 0, course)

    def step(self, problem: tuple[System, Course], state: _Cycle) -> _Cycle:
        system, k, m = problem[0], state.k, self.length
        V = state.basis.vectors
        z = system.precondition(V[..., k, :])
        w = system.operator(z)
        eps, size = torch.finfo(w.dtype).eps, norm(w.detach())
        course = state.course.see(z, w)
        h, w = _orthogonalized(V, w)
        left, v = normalized(w)
        # What is left of an invariant space is rounding, and no direction.
        exhausted = left.detach() <= 16 * eps * size
        left = torch.where(exhausted, torch.zeros_like(left), left)
        column = torch.cat([h, left.unsqueeze(-1), h.new_zeros(*h.shape[:-1], m - k - 1)], -1)
        c = (state.Q @ column.unsqueeze(-1)).squeeze(-1)
        diagonal = hypot(c[..., k], c[..., k + 1])
        cs, sn = divide(c[..., k], diagonal), divide(c[..., k + 1], diagonal)

        finite = ~not_finite(diagonal, size)
        # The column depends on those before it: no combination of them lowers the residual any more.
        largest = torch.fmax(size, state.R[..., :k].detach().abs().amax((-2, -1))) if k else size
        flat = diagonal.detach() <= 16 * eps * largest
        broken = torch.where(state.alive & flat, torch.full_like(course.broken, Status.SINGULAR), course.broken)
        broken = torch.where(state.alive & ~finite, torch.full_like(broken, Status.NON_FINITE), broken)
        moves = state.alive & finite & ~flat
        mask = moves[..., None, None]
        upper, lower = state.Q[..., k : k + 1, :], state.Q[..., k + 1 : k + 2, :]
        cs, sn = cs[..., None, None], sn[..., None, None]
        turned = torch.cat([cs * upper + sn * lower, cs * lower - sn * upper], -2)
        Q = torch.cat([state.Q[..., :k, :], turned, state.Q[..., k + 2 :, :]], -2)
        padded = torch.cat([c[..., :k], diagonal.unsqueeze(-1), c.new_zeros(*c.shape[:-1], m - k - 1)], -1)
        R = torch.cat([state.R[..., :k], padded.unsqueeze(-1), state.R[..., k + 1 :]], -1)
        Q, R = torch.where(mask, Q, state.Q), torch.where(mask, R, state.R)
        v = torch.where((moves & ~exhausted).unsqueeze(-1), v, torch.zeros_like(v))
        estimate = torch.where(moves, state.length * Q[..., k + 1, 0].abs(), course.residual).detach()
        return _Cycle(
            _Basis(torch.cat([V, v.unsqueeze(-2)], -2)),
            state.length, Q, R,
            state.columns + moves,
            moves & ~exhausted,
            k + 1,
            course._replace(residual=estimate, broken=broken),
        )  # fmt: skip

    def terminate(self, problem: tuple[System, Course], state: _Cycle) -> Tensor:
        # An exhausted space has given what it can; whether that was enough, the true residual tells.
        status = torch.where(state.alive, torch.full_like(state.columns, RUNNING), int(Status.STALLED))
        residual, tolerance = state.course.residual, problem[0].tolerance
        return torch.where(residual <= tolerance, torch.full_like(status, Status.CONVERGED), status)


def _orthogonalized(V: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The components of w along the rows of V, and what is left of it."""
    h = (V @ w.unsqueeze(-1)).squeeze(-1)
    w = w - (V.mT @ h.unsqueeze(-1)).squeeze(-1)
    again = (V @ w.unsqueeze(-1)).squeeze(-1)
    return h + again, w - (V.mT @ again.unsqueeze(-1)).squeeze(-1)


def _correction(cycle: _Cycle) -> Tensor:
    """V y with the y that minimizes ‖ ‖r‖ e₁ - H y ‖, from R y = ‖r‖ Q e₁."""
    k = cycle.k
    made = torch.arange(k, device=cycle.R.device) < cycle.columns.unsqueeze(-1)
    history = cycle.Q[..., :k, 0] * cycle.length.unsqueeze(-1)
    history = torch.where(made, history, torch.zeros_like(history))
    y = torch.linalg.solve_triangular(cycle.R[..., :k, :k], history.unsqueeze(-1), upper=True)
    return (cycle.basis.vectors[..., :k, :].mT @ y).squeeze(-1)
