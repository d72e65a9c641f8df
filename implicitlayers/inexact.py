"""Solving until an error is small enough, and what an inexact solution does to an adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitlayers.certificate import adjoint_error
from implicitlayers.functorch import all_lanes
from implicitlayers.linear.operator import Late, Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import norm
from implicitlayers.problem import Bound
from implicitlayers.status import Status, failed

__all__ = ["Inexact", "solve_to_error"]

_SECOND_ORDER = 1.25
# Each tightens the tolerance by what the estimate says is missing, so that a second is rarely needed.
_ROUNDS = 3


@dataclass(frozen=True)
class Inexact:
    """What an inexact solution does to an adjoint, measured along its Newton step.

    F(x̂) = 0 does not hold to the last digit. To first order x* = x̂ + d with A d = -F(x̂), and u = A(x̂)⁻ᵀv becomes
    u - A⁻ᵀ(A(x̂ + d) - A(x̂))ᵀu. Two more solves and a linearization at x̂ + d tell how long that change is, without third
    derivatives (affine covariant, as in Deuflhard 2011, section 2.1).

    Attributes:
        bound: the condition, with its tensors.
        x: x̂, ``[*lanes, n]``.
        step: d.
        linear_solver: solves with A, to a tolerance of its own.
        damping: added to A.
        error: estimate of the relative error of d, ``[*lanes]``.
    """

    bound: Bound
    x: Tensor
    step: Tensor
    linear_solver: LinearSolver
    damping: float
    error: Tensor

    @classmethod
    def of(cls, bound: Bound, x: Tensor, linear_solver: LinearSolver, damping: float) -> Inexact:
        """Measure the Newton step at x."""
        unmoved = cls(bound, x, torch.zeros_like(x), linear_solver, damping, torch.zeros_like(x[..., 0]))
        step, error = unmoved._inverse(-bound.residual(x).detach(), transposed=False)
        return replace(unmoved, step=step, error=error)

    @property
    def length(self) -> Tensor:
        """‖d‖ ``[*lanes]``, enlarged by the error of d."""
        return norm(self.step) * (1 + self.error)

    def change_along(self, u: Tensor, *, transposed: bool) -> Tensor:
        """‖A⁻¹(A(x̂ + d) - A(x̂))u‖/‖u‖ ``[*lanes]``, with Aᵀ for A where `transposed`; 0 where u is.

        Enlarged by the errors of the solves, and by a quarter for what is of second order in d.
        """
        moved, here = (self.bound.linearize(at, transposed=transposed)(u) for at in (self.x + self.step, self.x))
        length = norm(u)
        change, error = self._inverse(moved - here, transposed=transposed)
        relative = norm(change) / length * (1 + self.error) * (1 + error)
        relative = _SECOND_ORDER * relative
        relative = torch.where(torch.isfinite(relative), relative, torch.full_like(relative, torch.inf))
        return torch.where(length > 0, relative, torch.zeros_like(relative))

    def _inverse(self, b: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
        damping, symmetric = self.damping, all(term.symmetric for term in self.bound.posed.terms)
        other = Late(lambda: self.bound.linearize(self.x, damping, transposed=not transposed))
        product = self.bound.linearize(self.x, damping, transposed=transposed)
        operator = Operator(product, symmetric, apply_transpose=None if symmetric else other)
        # The error of an iterate may lie where A shrinks it most and F hardly shows it: a loose solve would not see it.
        tight = self.linear_solver.with_tolerance(torch.finfo(b.dtype).eps ** 0.75)
        solution = tight.solve(operator, b)
        return solution.x, _error(solution, b)


def solve_to_error(
    solver: LinearSolver, operator: Operator, b: Tensor, x0: Tensor | None, aim: float
) -> tuple[LinearSolution, Tensor]:
    """Solve, then go on with tighter tolerances until the estimated relative error is `aim`; and that error."""
    solution = solver.solve(operator, b, x0)
    error = _error(solution, b)
    for _ in range(_ROUNDS if aim < torch.inf else 0):
        open_ = all_lanes((error > aim) & (solution.status == Status.CONVERGED))
        if not bool(open_.any()):
            break
        needed = (all_lanes(solution.residual * aim / error) / 2)[open_]
        again = solver.with_tolerance(float(needed.min())).solve(operator, b, solution.x)
        # A lane for which the new tolerance is out of reach keeps its status, and is judged by its error.
        solution = again._replace(status=solution.status, steps=solution.steps + again.steps)
        error = _error(solution, b)
    return solution, error


def _error(solution: LinearSolution, b: Tensor) -> Tensor:
    """Estimate of the relative error of a linear solve."""
    error = adjoint_error(solution.residual, norm(solution.x) / norm(b), solution.smallest, solution.curvature_max)
    broke = failed(solution.status) & (solution.status != Status.MAX_STEPS) & (solution.status != Status.STALLED)
    return torch.where(broke, torch.full_like(error, torch.inf), error)
