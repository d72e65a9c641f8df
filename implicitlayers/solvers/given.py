"""A solution that was found elsewhere, and the best iterate of a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.flat import Tree
from implicitlayers.loop import check_tolerances, freeze, norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.mapping import begin
from implicitlayers.status import MisuseError, Status

__all__ = ["BestSoFar", "Given"]


class _State(NamedTuple):
    x: Tensor
    progress: Progress


@dataclass(frozen=True, eq=False)
class Given(Solver[_State]):
    """It was solved elsewhere: take this value for the solution, check it, and differentiate there.

    No step is ever taken. The value takes the place of ``x0``, whose structure it must have, and no gradient flows into
    it: the derivative is that of the solution, by the implicit function theorem. Choose it to differentiate what
    another program computed. A value whose ‖F‖ is above the tolerance has the status MAX_STEPS after 0 steps.

    Args:
        value: the solution, a tree like ``x0``.
        rtol: see `Solver`; looser than that of solvers, because the other program has its own.
        atol: see `Solver`. With ``rtol=atol=None`` the value is not checked.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset(Kind)
    recordable: ClassVar[bool] = False
    max_steps: ClassVar[int] = 0  # type: ignore[misc]

    value: Tree
    rtol: float | None = 1e-6
    atol: float | None = 0.0

    def __post_init__(self) -> None:
        check_tolerances(self, least_steps=0)

    def start(self, x0: Tree) -> Tree:
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self.value)

    def init(self, problem: Bound, x: Tensor) -> _State:
        objective, F = problem.value_and_residual(x)
        return _State(x, begin(problem, x, objective, F, torch.ones_like(objective)))

    def step(self, problem: Bound, state: _State) -> _State:
        return state

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        return state.progress.verdict(self)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        objective = state.progress.objective
        objective = torch.full_like(objective, torch.nan) if problem.kind is Kind.ROOT else objective
        return state.x, state.progress.residual, objective


class _Best(NamedTuple):
    inner: Any
    x: Tensor
    residual: Tensor
    objective: Tensor


@dataclass(frozen=True)
class BestSoFar(Solver[_Best]):
    """Run another solver and return, in every lane, the iterate with the smallest objective (or ‖F‖) that it saw.

    Choose it around solvers that do not descend monotonically (Adam, momentum, Anderson), stopped by `max_steps` or by
    a fixed number of steps; a lane that diverges still returns the best point on its way. An iterate at which the other
    solver has converged is taken whatever its objective. Tolerances and `max_steps` are the other solver's.
    Around a solver with ``rtol=atol=None`` every step costs one evaluation more.

    Args:
        solver: the solver to run.
    """

    recordable: ClassVar[bool] = False

    solver: Solver[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise MisuseError(f"BestSoFar({self.solver!r}): that is no solver; pass one, e.g. BestSoFar(Adam()).")

    @property
    def handles(self) -> frozenset[Kind]:  # type: ignore[override]
        """The kinds of problem that the other solver is made for."""
        return self.solver.handles

    @property
    def rtol(self) -> float | None:  # type: ignore[override]
        """The other solver's."""
        return self.solver.rtol

    @property
    def atol(self) -> float | None:  # type: ignore[override]
        """The other solver's."""
        return self.solver.atol

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        """The other solver's."""
        return self.solver.max_steps

    def start(self, x0: Tree) -> Tree:
        return self.solver.start(x0)

    def init(self, problem: Bound, x: Tensor) -> _Best:
        inner = self.solver.init(problem, x)
        return _Best(inner, *self._seen(problem, inner))

    def step(self, problem: Bound, state: _Best) -> _Best:
        inner = self.solver.step(problem, state.inner)
        new = self._seen(problem, inner)
        best = (state.x, state.residual, state.objective)

        def measure(seen: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            worth = seen[1] if problem.kind is Kind.ROOT else seen[2]
            return torch.where(torch.isfinite(worth), worth, torch.full_like(worth, torch.inf))

        # False for NaN, so that a diverging lane keeps what it had.
        better = (measure(new) < measure(best)) | (self.solver.terminate(problem, inner) == Status.CONVERGED)
        return _Best(inner, *freeze(better, new, best))

    def terminate(self, problem: Bound, state: _Best) -> Tensor:
        return self.solver.terminate(problem, state.inner)

    def postprocess(self, problem: Bound, state: _Best) -> tuple[Tensor, Tensor, Tensor]:
        objective = state.objective
        objective = torch.full_like(objective, torch.nan) if problem.kind is Kind.ROOT else objective
        return state.x, state.residual, objective

    def pairs(self, state: _Best) -> Sequence[tuple[Tensor, Tensor]]:
        return self.solver.pairs(state.inner)

    def with_tolerance(self, atol: float) -> BestSoFar:
        return BestSoFar(self.solver.with_tolerance(atol))

    def count(self, state: _Best, steps: Tensor) -> Tensor:
        return self.solver.count(state.inner, steps)

    def _seen(self, problem: Bound, inner: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, residual, objective = self.solver.postprocess(problem, inner)
        if not self.solver.looks and problem.kind is not Kind.COMPOSITE:
            # Its report may be on an earlier iterate than the one it returns.
            objective, F = problem.value_and_residual(x)
            residual = norm(F)
        return x, residual, objective
