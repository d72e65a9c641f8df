"""The condition that a solver's answer fulfils, for every problem that is posed by a function of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitlayers.functorch import all_lanes
from implicitlayers.linearized import AdjointRule, LinearSystem
from implicitlayers.loop import Finished, iterate, norm
from implicitlayers.problem import Bound, Condition, Lanes, Outcome, Posed, Term
from implicitlayers.solver import Solver
from implicitlayers.status import Status
from implicitlayers.terms import ProximalTerm

__all__ = ["Optimality", "finish_forward", "solve_forward"]

# Each tightens the tolerance by what the estimate says is missing.
_ROUNDS = 4


def solve_forward(solver: Solver[Any], bound: Bound, x0: Tensor) -> Outcome:
    """Run a solver on all lanes; recorded or not, as the surrounding grad mode says."""
    return finish_forward(solver, bound, iterate(solver, bound, x0, solver.max_steps, look=solver.looks))


def finish_forward(solver: Solver[Any], bound: Bound, end: Finished) -> Outcome:
    """What the end of a loop means as an outcome."""
    x, residual, objective = solver.postprocess(bound, end.state)
    return Outcome(x, end.status, solver.count(end.state, end.steps), residual, objective)


@dataclass(frozen=True)
class Optimality(Condition):
    """The condition that a solver's answer fulfils.

    Without a nonsmooth part it is F = Σ terms = 0, the sum of gradients of an objective or an equation; with one it is
    the proximal fixed point of `ProximalTerm`.

    Attributes:
        posed: what the solver is faced with.
        solver: solves it.
        rule: how the derivative's linear system is solved.
        lanes: see `Condition`.
    """

    posed: Posed
    solver: Solver[Any]
    rule: AdjointRule
    lanes: Lanes = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        smooth, nonsmooth = self.posed.terms, self.posed.nonsmooth
        if nonsmooth is None:
            return smooth
        slots = [*nonsmooth.slots, *(slot for term in smooth for slot in term.slots)]
        return (ProximalTerm(smooth, nonsmooth, 1 + max(slots, default=-1)),)

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        bound = self.posed.bind(tensors, self.lanes)
        outcome = self._run(self.solver, bound, x0)
        return outcome if self.rule.gradient_tol is None else self._tighten(self.rule.gradient_tol, bound, x0, outcome)

    def _run(self, solver: Solver[Any], bound: Bound, x0: Tensor) -> Outcome:
        end = iterate(solver, bound, x0, solver.max_steps, look=solver.looks)
        self.rule.gathered.pairs = solver.pairs(end.state)
        return finish_forward(solver, bound, end)

    def _tighten(self, gradient_tol: float, bound: Bound, x0: Tensor, outcome: Outcome) -> Outcome:
        """Go on from where the solver has converged until what is left of ‖F‖ matters less than the tolerance."""
        # Halved for the adjoint's part, and again because the adjoint may lie where A changes more than along d.
        aim, first = gradient_tol / 4, outcome.status == Status.CONVERGED
        error = self._inner_error(outcome.x, x0, bound.tensors)
        for _ in range(_ROUNDS if aim < torch.inf else 0):
            open_ = all_lanes((error > aim) & first)
            if not bool(open_.any()):
                break
            needed = (all_lanes(outcome.residual * aim / error) / 2)[open_]
            again = self._run(self.solver.with_tolerance(float(needed.min())), bound, outcome.x)
            # A lane for which the new tolerance is out of reach is judged by its error, not by the solver's status.
            outcome = again._replace(status=outcome.status, steps=outcome.steps + again.steps)
            error = self._inner_error(outcome.x, x0, bound.tensors)
        self.rule.report.inner_error = error
        missed = first & (error > gradient_tol / 2)
        status = torch.where(missed, torch.full_like(outcome.status, Status.STALLED), outcome.status)
        return outcome._replace(status=status)

    def _inner_error(self, x: Tensor, x0: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The relative error of x, or what it does to the adjoint of F(x) itself, whichever is larger."""
        bound = Posed(self._curved).bind(tensors, self.lanes)
        inexact = self.rule.inexact(bound, x)
        size = torch.fmax(norm(x), norm(x - x0))
        moved = inexact.length / torch.where(size > 0, size, torch.ones_like(size))
        error = torch.fmax(moved, inexact.change_along(inexact.step, transposed=False))
        return torch.where(torch.isfinite(moved), error, torch.full_like(error, torch.inf))

    def linear_system(self, *, transposed: bool) -> LinearSystem:
        # The unknown and the cotangent carry every lane.
        return LinearSystem(self._curved, self.rule, tuple((0, 0, *level) for level in self.lanes), transposed)

    @property
    def _curved(self) -> tuple[Term, ...]:
        return tuple(t.with_gauss_newton() if self.rule.gauss_newton else t for t in self.terms)

    def with_lanes(self, lanes: Lanes) -> Optimality:
        return replace(self, lanes=lanes)
