"""What the iterative methods share: the scaled system, the course of a lane, and the report at the end.

- The right-hand side is divided by its norm first and the solution multiplied back. In float32 the squared norm of a
  small cotangent underflows, and a recurrence then divides zero by zero. The scale is a constant to derivatives: all
  these methods commute with scaling, so nothing is lost, and at b = 0 nothing becomes NaN.
- The residual that a recurrence carries along drifts away from b - A x. Where convergence is checked, one more product
  at the end tells the truth, and a lane that is more than twice the tolerance away becomes STALLED.
- An iterate that has not converged is not linear in b, and a second derivative through its steps grows like 1/‖b‖.
- A residual of a few machine epsilons of ‖A‖‖x‖ is what any method can attain, a direct one included (normwise backward
  error; Higham 2002, section 7.1). Such a lane has converged, unless half of the digits are lost already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, check_right_hand_side
from implicitlayers.loop import Finished, dot, norm, not_finite
from implicitlayers.status import RUNNING, Status

__all__ = ["Course", "System", "divide", "hypot", "normalized", "report", "root", "scaled", "verdict"]


class System(NamedTuple):
    """A x = b on every lane, divided by ‖b‖.

    Attributes:
        operator: A.
        b: ``[*lanes, n]`` of norm one, or zero.
        start: ``[*lanes, n]``, zero in lanes where the given start was no better than that.
        first: ``[*lanes, n]``, the residual at the start.
        scale: ``[*lanes, 1]``, what b was divided by.
        tolerance: ``[*lanes]``, for the norm of the residual.
        precondition: r ↦ M⁻¹ r.
    """

    operator: Operator
    b: Tensor
    start: Tensor
    first: Tensor
    scale: Tensor
    tolerance: Tensor
    precondition: Callable[[Tensor], Tensor]

    def residual_at(self, x: Tensor) -> Tensor:
        """The vector b - A x."""
        return self.b - self.operator(x)


def scaled(
    operator: Operator,
    b: Tensor,
    x0: Tensor | None,
    rtol: float | None,
    atol: float | None,
    preconditioner: Preconditioner | Precondition | None = None,
) -> System:
    """The system with a right-hand side of norm one, its tolerance, and its preconditioner prepared."""
    check_right_hand_side(b)
    b_norm = norm(b.detach())
    # A non-finite right-hand side is left as it is, and named. The reciprocal of a subnormal number is infinite.
    finite = b_norm.clamp_min(torch.finfo(b.dtype).tiny)
    scale = torch.where(torch.isfinite(b_norm), finite, torch.ones_like(b_norm)).unsqueeze(-1)
    # Two divisions: 1/scale overflows in float32 for a cotangent of 1e-39 already.
    unit = b / scale
    start, first = (torch.zeros_like(b), unit) if x0 is None else _begin(operator, unit, x0 / scale)
    relative = max(rtol, 8 * torch.finfo(b.dtype).eps) if rtol else 0.0
    tolerance = (atol or 0.0) / scale.squeeze(-1) + relative
    if isinstance(preconditioner, Preconditioner):
        # It changes the way to the solution, not the solution, and is no part of a derivative.
        with torch.no_grad():
            preconditioner = preconditioner.prepare(operator, b.detach())
    return System(operator, unit, start, first, scale, tolerance, preconditioner or _identity)


def _begin(operator: Operator, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A start and its residual, lane by lane; zero where x is further from solving the system than zero is.

    The error of x is relative to ‖x‖. Where b is much smaller than A x, as after a warm start from the solution for
    another b, the answer would drown in its rounding, and at b = 0 never become zero.
    """
    r = b - operator(x)
    # What is not finite compares as False, too.
    nearer = (norm(r.detach()) <= norm(b.detach())).unsqueeze(-1)
    return torch.where(nearer, x, torch.zeros_like(x)), torch.where(nearer, r, b)


def _identity(r: Tensor) -> Tensor:
    return r


class Course(NamedTuple):
    """How far each lane has come, all ``[*lanes]``.

    Attributes:
        residual: ‖b - A x‖ with b of norm one.
        best: the smallest so far.
        idle: steps since it fell.
        low: the smallest Rayleigh quotient pᵀAp / pᵀp met; NaN where none was.
        high: the largest.
        stretch: the largest ‖A p‖/‖p‖ met, a lower bound of ‖A‖.
        broken: RUNNING, or why the method cannot go on.
    """

    residual: Tensor
    best: Tensor
    idle: Tensor
    low: Tensor
    high: Tensor
    stretch: Tensor
    broken: Tensor

    @classmethod
    def begin(cls, residual: Tensor) -> Course:
        """Before the first step."""
        residual = residual.detach()
        nan, idle = torch.full_like(residual, torch.nan), torch.zeros_like(residual, dtype=torch.int64)
        return cls(residual, residual, idle, nan, nan, torch.zeros_like(residual), torch.full_like(idle, RUNNING))

    def see(self, p: Tensor, Ap: Tensor) -> Course:
        """Take note of a product."""
        p, Ap = p.detach(), Ap.detach()
        pp = dot(p, p)
        some = pp > 0
        pp = torch.where(some, pp, torch.ones_like(pp))
        quotient, stretch = (dot(p, Ap) / pp).to(p.dtype), (dot(Ap, Ap) / pp).sqrt().to(p.dtype)
        seen = some & ~not_finite(quotient, stretch) & (self.broken == RUNNING)
        return self._replace(
            low=torch.where(seen, torch.fmin(self.low, quotient), self.low),
            high=torch.where(seen, torch.fmax(self.high, quotient), self.high),
            stretch=torch.where(seen, torch.fmax(self.stretch, stretch), self.stretch),
        )

    def advance(self, residual: Tensor, broken: Tensor) -> Course:
        """After a step that ended with this residual; a broken lane keeps the one it had."""
        residual = torch.where(broken == RUNNING, residual.detach(), self.residual)
        better = residual < 0.999 * self.best
        return self._replace(
            residual=residual,
            best=torch.where(better, residual, self.best),
            idle=torch.where(better, torch.zeros_like(self.idle), self.idle + 1),
            broken=broken,
        )

    def breaks(self, *reasons: tuple[Tensor, Status]) -> Tensor:
        """The field `broken` of lanes where one of these masks holds; later ones win, earlier steps win over all."""
        found = torch.full_like(self.broken, RUNNING)
        for mask, status in reasons:
            found = torch.where(mask, torch.full_like(found, status), found)
        return torch.where(self.broken == RUNNING, found, self.broken)

    def done(self, x: Tensor) -> Tensor:
        """Lanes in which nothing is left to correct: a fixed number of steps carries them along unmoved."""
        return self.residual <= torch.finfo(x.dtype).eps / 8

    def rounding(self, x: Tensor) -> Tensor:
        """Lanes whose residual may be rounding only, so that it says nothing about the matrix."""
        return self.residual <= torch.fmax(self.attainable(x), torch.full_like(self.best, 8 * torch.finfo(x.dtype).eps))

    def attainable(self, x: Tensor) -> Tensor:
        """The norm of the residual that rounding leaves at x, as far as it is excusable."""
        eps = torch.finfo(x.dtype).eps
        return (8 * eps * self.stretch * norm(x.detach())).clamp_max(eps**0.5)


def verdict(broken: Tensor, idle: Tensor, patience: int, residual: Tensor, tolerance: Tensor) -> Tensor:
    """Status of every lane; `patience` is the number of idle steps after which one has stalled."""
    status = torch.where((broken == RUNNING) & (idle > patience), torch.full_like(broken, Status.STALLED), broken)
    status = torch.where(residual <= tolerance, torch.full_like(status, Status.CONVERGED), status)
    return torch.where(not_finite(residual), torch.full_like(status, Status.NON_FINITE), status)


def report(system: System, x: Tensor, end: Finished, course: Course, *, verify: bool) -> LinearSolution:
    """Scale back, replace the recurrence's residual by the true one, and see to minimizing operators."""
    status, residual = end.status, course.residual
    if verify:
        true = norm(system.residual_at(x).detach())
        usable = torch.isfinite(true) & (status != Status.NON_FINITE)
        residual = torch.where(usable, true, residual)
        good = residual <= torch.fmax(2 * system.tolerance, course.attainable(x))
        astray = usable & (status == Status.CONVERGED) & ~good
        status = torch.where(astray, torch.full_like(status, Status.STALLED), status)
        there = usable & (status == Status.STALLED) & good
        status = torch.where(there, torch.full_like(status, Status.CONVERGED), status)
    if system.operator.minimizing:
        # CG, MINRES and Dense see every indefinite A that matters; the other methods only as far as it shows here.
        uphill = (dot(system.b, x) <= 0) & (norm(system.b.detach()) > 0)
        # Negative curvature that is zero to rounding belongs to a singular matrix.
        curved = course.low < -8 * torch.finfo(x.dtype).eps * course.stretch
        bad = (uphill | curved) & (status != Status.NON_FINITE)
        status = torch.where(bad, torch.full_like(status, Status.INDEFINITE), status)
        x = torch.where((uphill & bad).unsqueeze(-1), system.b, x)
    unknown = torch.full_like(course.low, torch.nan)
    return LinearSolution(x * system.scale, status, end.steps, residual, course.low, course.high, unknown)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient a / b, and 0 where b is 0; so are its derivatives."""
    some = b != 0
    return torch.where(some, a / torch.where(some, b, torch.ones_like(b)), torch.zeros_like(a))


def normalized(y: Tensor) -> tuple[Tensor, Tensor]:
    """Norm ``[*lanes]`` and direction of ``y [*lanes, n]``; both are 0 where y is, and so are their derivatives."""
    largest = y.detach().abs().amax(-1)
    safe = torch.where(torch.isfinite(largest), largest.clamp_min(torch.finfo(y.dtype).tiny), torch.ones_like(largest))
    y = y / safe.unsqueeze(-1)
    square = dot(y, y)
    some = square != 0
    root = torch.where(some, square, torch.ones_like(square)).sqrt().to(y.dtype)
    length = torch.where(some, root, torch.zeros_like(root))
    return length * safe, y / root.unsqueeze(-1)


def root(square: Tensor) -> Tensor:
    """√square where that is positive, else 0; so is the derivative."""
    some = square > 0
    return torch.where(some, torch.where(some, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square))


def hypot(a: Tensor, b: Tensor) -> Tensor:
    """√(a² + b²); its derivative is 0 at 0."""
    largest = torch.fmax(a.detach().abs(), b.detach().abs())
    safe = torch.where(torch.isfinite(largest) & (largest > 0), largest, torch.ones_like(largest))
    a, b = a / safe, b / safe
    return root(a * a + b * b) * safe
