"""The contract of forward solvers, and the bookkeeping they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from implicitlayers.flat import Tree
from implicitlayers.loop import Algorithm, norm, not_finite
from implicitlayers.problem import Bound, Kind
from implicitlayers.status import RUNNING, Status

__all__ = ["Progress", "Solver"]

S = TypeVar("S")


class Solver(Algorithm[Bound, S]):
    """A forward solver: four pure functions on flat state ``[*lanes, n]``.

    Concrete solvers are frozen dataclasses with the fields `rtol`, `atol` and `max_steps`. A lane has converged when
    ‖F(x)‖ ≤ atol + rtol·s, where s is the largest of ‖F(x0)‖, ‖(∂F/∂x) x0‖ and (‖ΔF‖/‖Δx‖)·‖x‖ over the last step: the
    size of the terms that cancel in F, so that a start next to the solution asks for no more than rounding allows.
    A positive rtol is taken as 64 machine epsilons where it is smaller. With ``rtol=atol=None`` exactly `max_steps`
    steps are run and no value is looked at.

    Attributes:
        handles: the kinds of problem the method is made for.
        recordable: whether a step is made of differentiable operations, so that `Unrolled` and `OneStep` may record it.
        rtol: relative tolerance.
        atol: absolute tolerance, in the units of F.
        max_steps: limit on the steps.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.MINIMUM})
    recordable: ClassVar[bool] = True

    rtol: float | None
    atol: float | None
    max_steps: int

    def start(self, x0: Tree) -> Tree:
        """Where the loop begins: `x0`, or a tree like it that the solver brings along."""
        return x0

    def with_tolerance(self, atol: float) -> Solver[S]:
        """The same method, stopping at ‖F(x)‖ ≤ atol."""
        return replace(self, rtol=0.0, atol=atol)  # type: ignore[type-var]

    def count(self, state: S, steps: Tensor) -> Tensor:
        """The steps to report, int64 ``[*lanes]``: those of the loop, or the solver's own where it loops inside."""
        return steps

    @property
    def looks(self) -> bool:
        """Whether convergence is checked."""
        return self.rtol is not None

    @abstractmethod
    def postprocess(self, problem: Bound, state: S) -> tuple[Tensor, Tensor, Tensor]:
        """The solution ``[*lanes, n]``, and the norm of F and the objective ``[*lanes]`` where last evaluated."""

    def pairs(self, state: S) -> Sequence[tuple[Tensor, Tensor]]:
        """Steps and changes of F ``[*lanes, n]`` that the method has kept, for `LBFGSPreconditioner`."""
        return ()

    def at_solution(self) -> Solver[S]:
        """The same method as it should step from a solution, for `OneStep`."""
        return self

    def resume(self, problem: Bound, state: S) -> S:
        """The same state, with its evaluations made anew under `problem` so that derivatives reach them."""
        return self.init(problem, self.postprocess(problem, state)[0])


class Progress(NamedTuple):
    """Per lane: how far a solve has come.

    Attributes:
        residual: ‖F(x)‖.
        objective: the objective at x.
        start: the larger of ‖F(x0)‖ and ‖(∂F/∂x) x‖ there.
        length: ‖x‖.
        secant: ‖ΔF‖/‖Δx‖ over the last step.
        flattest: the smallest of these so far.
        best: smallest residual so far.
        lowest: smallest objective so far.
        idle: steps since either fell.
    """

    residual: Tensor
    objective: Tensor
    start: Tensor
    length: Tensor
    secant: Tensor
    flattest: Tensor
    best: Tensor
    lowest: Tensor
    idle: Tensor

    @classmethod
    def begin(cls, problem: Bound, x: Tensor, objective: Tensor, F: Tensor) -> Progress:
        """At the start, where one more evaluation tells the size of the terms that cancel in F, ‖(∂F/∂x) x‖."""
        nudge = torch.finfo(x.dtype).eps ** 0.5
        terms = norm(problem.value_and_residual(x * (1 + nudge))[1] - F) / nudge
        residual = norm(F)
        # Next to the edge of a domain the nudge may leave it.
        start = torch.where(torch.isfinite(terms), torch.fmax(residual, terms), residual)
        idle = torch.zeros_like(residual, dtype=torch.int64)
        none, unseen = torch.zeros_like(residual), torch.full_like(residual, torch.inf)
        return cls(residual, objective, start, norm(x), none, unseen, residual, objective, idle)

    def advance(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], objective: Tensor) -> Progress:
        """After a step from ``old = (x, F)`` to ``new``."""
        eps = torch.finfo(objective.dtype).eps
        residual, moved = norm(new[1]), norm(new[0] - old[0])
        secant = norm(new[1] - old[1]) / torch.where(moved > 0, moved, torch.ones_like(moved))
        # A step of rounding size says nothing about the curvature.
        length = norm(new[0])
        telling = moved > 16 * eps * length
        secant = torch.where(telling, secant, self.secant)
        better = (residual < 0.99 * self.best) | (objective < self.lowest - 8 * eps * self.lowest.abs())
        return Progress(
            residual,
            objective,
            self.start,
            length,
            secant,
            torch.where(telling, torch.fmin(self.flattest, secant), self.flattest),
            torch.fmin(residual, self.best),
            torch.fmin(objective, self.lowest),
            torch.where(better, torch.zeros_like(self.idle), self.idle + 1),
        )

    def tolerance(self, solver: Any) -> Tensor:
        """The residual ``[*lanes]`` at which a lane has converged, by the solver's rtol and atol."""
        eps = torch.finfo(self.residual.dtype).eps
        relative = max(solver.rtol, 64 * eps) if solver.rtol else 0.0
        # A tiny step across a kink has a secant without bound, which would let any residual pass; curvature does not
        # change that much.
        secant = torch.fmin(self.secant, self.flattest / max(relative, eps) ** 0.5)
        scale = secant * self.length
        # The scale of a diverging lane overflows before its residual does.
        scale = torch.where(torch.isfinite(scale), torch.fmax(self.start, scale), self.start)
        return solver.atol + relative * scale

    def verdict(self, solver: Any, patience: int | None = None) -> Tensor:
        """Status of every lane; `patience` is the number of idle steps after which a lane has stalled."""
        status = torch.full_like(self.idle, RUNNING)
        if patience is not None:
            status = torch.where(self.idle >= patience, torch.full_like(status, Status.STALLED), status)
        if solver.rtol is not None:
            converged = self.residual <= self.tolerance(solver)
            status = torch.where(converged, torch.full_like(status, Status.CONVERGED), status)
        return torch.where(
            not_finite(self.residual, self.objective), torch.full_like(status, Status.NON_FINITE), status
        )
