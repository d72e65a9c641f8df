"""The truncated Neumann series, A⁻¹ ≈ ω Σₖ (I - ωA)ᵏ (Lorraine, Vicol & Duvenaud 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.krylov import Course, System, report, scaled, verdict
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Algorithm, check_tolerances, iterate, norm, not_finite
from implicitlayers.status import MisuseError, Status

__all__ = ["Neumann"]


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The Neumann series with a fixed number of terms: the derivative of that many steps at the solution.

    With ω = `step_size` and k = `steps`

        x = ω Σ_{i<k} (I - ωA)ⁱ b        so that        x - A⁻¹b = -(I - ωA)ᵏ A⁻¹b,

    which is Richardson's iteration x ← x + ω (b - A x) from zero. Choose it at the fixed point of a contraction, where
    A = I - J and ω = 1 (k terms are k steps of backpropagation through the mapping), or for a curvature where a cheap
    and deliberately biased derivative is enough: the result is shrunk along directions of curvature below 1/(ωk). It
    diverges unless every eigenvalue of ωA lies within one of 1: for a symmetric A, 0 < ω < 2/λ_max.

    Args:
        steps: terms of the series, a product each; with tolerances their limit.
        step_size: ω, in the units of 1/A.
        rtol: stop at ‖A x - b‖ ≤ rtol·‖b‖ + atol; None, the default, for exactly `steps` terms without looking.
        atol: absolute part, in the units of b.
    """

    steps: int = 20
    step_size: float = 1.0
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise MisuseError(f"Neumann(steps={self.steps!r}): the series would be empty; pass a positive integer.")
        if not self.step_size > 0:
            raise MisuseError(f"Neumann(step_size={self.step_size}): pass a positive number, below 2/λ_max(A).")
        check_tolerances(self)

    @property
    def max_steps(self) -> int:
        """The limit on the steps, by the name that other solvers have for it."""
        return self.steps

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        system = scaled(operator, b, x0, self.rtol, self.atol)
        end = iterate(_Richardson(self.step_size), system, system.start, self.steps, look=self.looks)
        # The residual of every step is the true one.
        return report(system, end.state.x, end, end.state.course, verify=False)


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    course: Course


@dataclass(frozen=True)
class _Richardson(Algorithm[System, _State]):
    step_size: float

    def init(self, problem: System, x: Tensor) -> _State:
        r = problem.first
        return _State(x, r, Course.begin(norm(r.detach())))

    def step(self, problem: System, state: _State) -> _State:
        x = state.x + self.step_size * state.r
        r = problem.residual_at(x)
        residual = norm(r.detach())
        bad = not_finite(residual)
        broken = state.course.breaks((bad, Status.NON_FINITE))
        # A lane whose product is not finite stays where it was.
        keep = bad.unsqueeze(-1)
        x, r = torch.where(keep, state.x, x), torch.where(keep, torch.zeros_like(r), r)
        return _State(x, r, state.course.advance(residual, broken))

    def terminate(self, problem: System, state: _State) -> Tensor:
        course = state.course
        # The residual of a matrix that is far from normal may rise for about n steps before it falls.
        patience = min(state.x.shape[-1], 200) + 20
        return verdict(course.broken, course.idle, patience, course.residual, problem.tolerance)
