"""The Newton direction, and how it is differentiated where steps are recorded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from implicitlayers.functorch import carries_derivative, is_wrapped
from implicitlayers.implicit import AdjointRule, ImplicitArgmin, LinearSystem
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.problem import Bound, ObjectiveTerm
from implicitlayers.solvers.line_search import Point
from implicitlayers.status import AdjointReport, Status

__all__ = ["newton_direction"]


def newton_direction(
    problem: Bound, at: Point, linear_solver: LinearSolver, damping: float, *, gauss_newton: bool = False
) -> Tensor:
    """Solve (A + damping·I) d = -F with A the curvature at the point, ``[*lanes, n]``.

    A recorded step is differentiated as the solution d(θ) of that system, by the implicit function theorem, and not
    through the linear solver's iterations: these stop before they have seen all of A, at once where F = 0, and what
    they have not seen their derivative lacks. A recorded lane whose curvature is singular or not positive goes along
    -F, because there the direction is not that solution.
    """
    if gauss_newton:
        terms = tuple(replace(t, gauss_newton=True) if isinstance(t, ObjectiveTerm) else t for t in problem.terms)
        problem = replace(problem, terms=terms)
    tensors = (at.x, at.F, *problem.tensors)
    if not (torch.is_grad_enabled() or is_wrapped(at.x)) or not any(carries_derivative(t) for t in tensors):
        operator = Operator(problem.linearize(at.x, damping), symmetric=True, minimizing=True)
        return linear_solver.solve(operator, -at.F).x
    rule = AdjointRule(linear_solver, damping, gauss_newton, "ignore", AdjointReport())
    lanes = tuple((0, 0, *level) for level in problem.lanes)
    system = LinearSystem(problem.terms, rule, lanes, minimizing=True)
    solved, status, *_ = ImplicitArgmin.apply(system, torch.zeros_like(at.x), -at.F, at.x, *problem.tensors)
    broken = (status == Status.INDEFINITE) | (status == Status.SINGULAR) | (status == Status.NON_FINITE)
    return torch.where(broken.unsqueeze(-1), -at.F, solved)
