"""First-order descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import check_tolerances, norm
from implicitlayers.problem import Bound
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.line_search import LineSearch, Point, descend
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["GradientDescent"]


class _State(NamedTuple):
    x: Tensor
    velocity: Tensor | None
    objective: Tensor
    F: Tensor
    progress: Progress | None
    search: Tensor | None


@dataclass(frozen=True)
class GradientDescent(Solver[_State]):
    """Gradient descent, x ← x - lr·d with v ← momentum·v + F and d = v, or F + momentum·v (Nesterov).

    The update is that of `torch.optim.SGD`. Choose it for few, fixed steps on large problems (iMAML's inner loop), or
    where nothing is known; L-BFGS needs far fewer evaluations to reach a tolerance.

    Args:
        lr: step size; below 2/L for a gradient with Lipschitz constant L. First trial step with a line search.
        momentum: in [0, 1).
        nesterov: look ahead along the velocity; needs momentum.
        line_search: choose the step size by a search; excludes momentum.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    line_search: LineSearch | None = None
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not self.lr > 0:
            raise MisuseError(f"GradientDescent(lr={self.lr}): pass a positive step size.")
        if not 0 <= self.momentum < 1:
            raise MisuseError(f"GradientDescent(momentum={self.momentum}): pass a number in [0, 1).")
        if self.nesterov and not self.momentum:
            raise MisuseError("GradientDescent(nesterov=True, momentum=0): Nesterov's step needs momentum, e.g. 0.9.")
        if self.line_search is not None and self.momentum:
            raise MisuseError(
                "GradientDescent: a line search needs a descent direction, which momentum is not; drop one."
            )

    @property
    def _lazy(self) -> bool:
        # With a fixed number of steps the gradient is evaluated before each move and never after the last one.
        return not self.looks and self.line_search is None

    def init(self, problem: Bound, x: Tensor) -> _State:
        velocity = torch.zeros_like(x) if self.momentum else None
        if self._lazy:
            unseen = torch.full_like(x[..., 0], torch.nan)
            return _State(x, velocity, unseen, torch.full_like(unseen, torch.nan).unsqueeze(-1), None, None)
        objective, F = problem.value_and_residual(x)
        search = None if self.line_search is None else torch.full_like(objective, RUNNING, dtype=torch.int64)
        return _State(x, velocity, objective, F, Progress.begin(problem, x, objective, F), search)

    def step(self, problem: Bound, state: _State) -> _State:
        if self._lazy:
            objective, F = problem.value_and_residual(state.x)
            x, velocity = self._move(state.x, F, state.velocity)
            return _State(x, velocity, objective, F, None, None)
        old = Point(state.x, state.objective, state.F)
        velocity, search = state.velocity, None
        if self.line_search is None:
            x, velocity = self._move(state.x, state.F, velocity)
            new = Point(x, *problem.value_and_residual(x))
        else:
            first = torch.full_like(old.objective, self.lr)
            new, search = descend(problem, old, -old.F, old.F, first, self.line_search, self.looks)
        assert state.progress is not None
        progress = state.progress.advance((old.x, old.F), (new.x, new.F), new.objective)
        return _State(new.x, velocity, new.objective, new.F, progress, search)

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        if state.progress is None:
            running = torch.full_like(state.objective, RUNNING, dtype=torch.int64)
            finite = torch.isfinite(state.x).all(-1)
            return torch.where(finite, running, torch.full_like(running, Status.NON_FINITE))
        # The descent of plain gradient steps is slow and need not be monotone: only a step search can tell a stall.
        status = state.progress.verdict(self, patience=None if self.line_search is None else 10)
        if state.search is not None:
            status = torch.where((status == RUNNING) & (state.search != RUNNING), state.search, status)
        step = self.lr * state.progress.residual
        still = step <= torch.finfo(state.x.dtype).eps / 4 * norm(state.x)
        return torch.where((status == RUNNING) & still, torch.full_like(status, Status.STALLED), status)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.x, norm(state.F), state.objective

    def resume(self, problem: Bound, state: _State) -> _State:
        return self.init(problem, state.x)._replace(velocity=state.velocity)

    def _move(self, x: Tensor, F: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if velocity is None:
            return torch.add(x, F, alpha=-self.lr), None
        velocity = self.momentum * velocity + F
        ahead = F + self.momentum * velocity if self.nesterov else velocity
        return torch.add(x, ahead, alpha=-self.lr), velocity
