"""The condition that a solver's answer fulfils, for every problem that is posed by a function of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from implicitlayers.linearized import AdjointRule, LinearSystem
from implicitlayers.loop import Finished, iterate
from implicitlayers.problem import Bound, Condition, Lanes, Outcome, Posed, Term
from implicitlayers.solver import Solver
from implicitlayers.terms import ProximalTerm

__all__ = ["Optimality", "finish_forward", "solve_forward"]


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
        end = iterate(self.solver, bound, x0, self.solver.max_steps, look=self.solver.looks)
        self.rule.gathered.pairs = self.solver.pairs(end.state)
        return finish_forward(self.solver, bound, end)

    def linear_system(self, *, transposed: bool) -> LinearSystem:
        terms = tuple(t.with_gauss_newton() if self.rule.gauss_newton else t for t in self.terms)
        # The unknown and the cotangent carry every lane.
        return LinearSystem(terms, self.rule, tuple((0, 0, *level) for level in self.lanes), transposed)

    def with_lanes(self, lanes: Lanes) -> Optimality:
        return replace(self, lanes=lanes)
