"""Newton's method with an iterative linear solver (Martens 2010; Nocedal & Wright 2006, sections 7.1 and 11.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.linear.auto import Auto
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.loop import check_tolerances, norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.direction import newton_direction
from implicitlayers.solvers.line_search import Armijo, Fixed, LineSearch, Point, descend
from implicitlayers.status import RUNNING, MisuseError

__all__ = ["Newton"]


class _State(NamedTuple):
    point: Point
    progress: Progress
    search: Tensor


@dataclass(frozen=True)
class Newton(Solver[_State]):
    """Newton's method, x ← x - t (A + damping·I)⁻¹ F with t from a line search; A = ∂F/∂x, to minimize ∇²f.

    Choose it when high accuracy is wanted and products with A are affordable: convergence is quadratic, so the last
    step makes the solution, and with it the derivative, accurate to rounding. To minimize, `Auto` takes `CG`, and no
    Hessian is formed; a lane in which CG meets negative curvature goes along what CG has found up to there, and with
    `Dense` along -∇f. For an equation `Auto` takes `Dense` or `GMRES`, and the line search is on ½‖F‖², whose slope
    along an exact Newton direction is -‖F‖²; a lane that comes to rest where Jᵀ F = 0 and F ≠ 0 has not found a root,
    and says STALLED or LINE_SEARCH_FAILED.

    Args:
        linear_solver: solves for the direction, in every step; for an equation not one for symmetric systems.
        line_search: how the step size is found, starting from 1.
        damping: added to the curvature, in its units.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.MINIMUM, Kind.ROOT})

    linear_solver: LinearSolver = field(default_factory=lambda: Auto(rtol=1e-6, max_steps=200))
    line_search: LineSearch = field(default_factory=Armijo)
    damping: float = 0.0
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not self.damping >= 0:
            raise MisuseError(f"Newton(damping={self.damping}): pass a number >= 0.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        if problem.kind is Kind.ROOT and self.linear_solver.requires_symmetric:
            name = type(self.linear_solver).__name__
            raise MisuseError(
                f"Newton({name}()): {name} solves symmetric systems only, and the Jacobian of an equation is not "
                "symmetric; pass Newton(), Newton(GMRES()) or Newton(Dense())."
            )
        point = Point(x, *problem.value_and_residual(x))
        search = torch.full_like(point.objective, RUNNING, dtype=torch.int64)
        return _State(point, Progress.begin(problem, *point), search)

    def step(self, problem: Bound, state: _State) -> _State:
        old = state.point
        direction = newton_direction(problem, old, self.linear_solver, self.damping)
        first, gradient = torch.ones_like(old.objective), old.F
        if problem.kind is Kind.ROOT:
            gradient = problem.linearize(old.x, transposed=True)(old.F)
        new, search = descend(problem, old, direction, gradient, first, self.line_search, self.looks)
        progress = state.progress.advance((old.x, old.F), (new.x, new.F), new.objective)
        return _State(new, progress, search)

    def at_solution(self) -> Newton:
        # There F is rounding, and a search by its values may refuse the full step, whose derivative is the exact one.
        return replace(self, line_search=Fixed())

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        status = state.progress.verdict(self, patience=5)
        return torch.where((status == RUNNING) & (state.search != RUNNING), state.search, status)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        # An equation has no objective: ½‖F‖² is the search's own affair.
        objective = state.point.objective
        objective = torch.full_like(objective, torch.nan) if problem.kind is Kind.ROOT else objective
        return state.point.x, norm(state.point.F), objective
