"""The Newton direction, and how it is differentiated where steps are recorded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from implicitlayers.functorch import carries_derivative, recorded
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.linearized import AdjointRule, LinearSystem
from implicitlayers.problem import Bound, Kind
from implicitlayers.regularizers import QuadraticTerm
from implicitlayers.solvers.line_search import Point
from implicitlayers.status import AdjointReport, MisuseError, Status
from implicitlayers.terms import ObjectiveTerm

__all__ = ["damped", "gauss_newton_of", "newton_direction"]


def gauss_newton_of(problem: Bound, solver: object) -> Bound:
    """The same problem, whose linearization is the Gauss-Newton matrix JᵀBJ plus the regularizer's curvature.

    Raises:
        MisuseError: the objective does not say where its model ends.
    """
    if any(isinstance(t, ObjectiveTerm) and t.model is None for t in problem.posed.terms):
        raise MisuseError(
            f"{type(solver).__name__} needs to know where the model ends and the loss begins, and the objective is a "
            "plain function; pass Composite(model, loss), or use Newton."
        )
    return problem.gauss_newton()


def damped(problem: Bound, damping: Tensor) -> Bound:
    """The same problem with ``damping [*lanes]`` times the identity added to its linearization; good for that alone."""
    term = QuadraticTerm((len(problem.tensors),))
    lanes = tuple((*level, 0) for level in problem.lanes)
    posed = replace(problem.posed, terms=(*problem.posed.terms, term))
    return Bound(posed, (*problem.tensors, damping), lanes)


def newton_direction(problem: Bound, at: Point, linear_solver: LinearSolver, damping: float) -> Tensor:
    """Solve (A + damping·I) d = -F with A the problem's linearization at the point; d is ``[*lanes, n]``.

    A recorded step is differentiated as the solution d(θ) of that system, by the implicit function theorem, and not
    through the linear solver's iterations: these stop before they have seen all of A, at once where F = 0, and what
    they have not seen their derivative lacks. A recorded lane whose curvature is singular or not positive goes along
    -F, because there the direction is not that solution.
    """
    minimizing = problem.kind is not Kind.ROOT
    tensors = (at.x, at.F, *problem.tensors)
    if not recorded(at.x) or not any(carries_derivative(t) for t in tensors):
        transpose = None if minimizing else lambda y: problem.linearize(at.x, damping, transposed=True)(y)
        operator = Operator(problem.linearize(at.x, damping), minimizing, minimizing, transpose)
        return linear_solver.solve(operator, -at.F).x
    rule = AdjointRule(linear_solver, damping, False, "ignore", AdjointReport())
    lanes = tuple((0, 0, *level) for level in problem.lanes)
    system = LinearSystem(problem.posed.terms, rule, lanes, transposes=False, minimizing=minimizing)
    solved, status, *_ = ImplicitArgmin.apply(system, torch.zeros_like(at.x), -at.F, at.x, *problem.tensors)
    broken = (status == Status.INDEFINITE) | (status == Status.SINGULAR) | (status == Status.NON_FINITE)
    return torch.where(broken.unsqueeze(-1), -at.F, solved)
