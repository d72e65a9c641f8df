"""Adam (Kingma & Ba 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import check_tolerances, norm
from implicitlayers.problem import Bound
from implicitlayers.solver import Progress, Solver
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["Adam"]


class _State(NamedTuple):
    x: Tensor
    mean: Tensor
    square: Tensor
    moves: Tensor
    objective: Tensor
    F: Tensor
    progress: Progress | None


@dataclass(frozen=True)
class Adam(Solver[_State]):
    """Adam, x ← x - lr·m̂/(√v̂ + eps) with running means m̂ of F and v̂ of F², both corrected for their start at zero.

    The update is that of `torch.optim.Adam`. Choose it for badly scaled problems of which only a rough solution is
    wanted, and for networks as unknowns; it has no rate on smooth problems that `LBFGS` does not beat. A recorded step
    is differentiable also where F = 0, where √v̂ is not: there only m̂ carries the derivative.

    Args:
        lr: step size, about the change of every entry of x in one step.
        betas: decay of the two means, each in [0, 1).
        eps: added to √v̂, in the units of F.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rtol: float | None = 1e-6
    atol: float | None = 0.0
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances(self)
        if not self.lr > 0:
            raise MisuseError(f"Adam(lr={self.lr}): pass a positive step size.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise MisuseError(f"Adam(betas={self.betas}): pass two numbers in [0, 1).")
        if not self.eps > 0:
            raise MisuseError(f"Adam(eps={self.eps}): where F vanishes zero is divided by it; pass a number > 0.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        zero, count = torch.zeros_like(x), torch.zeros_like(x[..., 0])
        if not self.looks:
            # A fixed number of steps evaluates before each move and never after the last one.
            unseen = torch.full_like(count, torch.nan)
            return _State(x, zero, zero, count, unseen, torch.full_like(x, torch.nan), None)
        objective, F = problem.value_and_residual(x)
        return _State(x, zero, zero, count, objective, F, Progress.begin(problem, x, objective, F))

    def step(self, problem: Bound, state: _State) -> _State:
        if state.progress is None:
            objective, F = problem.value_and_residual(state.x)
            return self._move(state, F)._replace(objective=objective, F=F)
        new = self._move(state, state.F)
        objective, F = problem.value_and_residual(new.x)
        progress = state.progress.advance((state.x, state.F), (new.x, F), objective)
        return new._replace(objective=objective, F=F, progress=progress)

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        if state.progress is not None:
            # The path need not be monotone, so idle steps say nothing.
            return state.progress.verdict(self)
        running = torch.full_like(state.moves, RUNNING, dtype=torch.int64)
        return torch.where(torch.isfinite(state.x).all(-1), running, torch.full_like(running, Status.NON_FINITE))

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.x, norm(state.F), state.objective

    def resume(self, problem: Bound, state: _State) -> _State:
        return self.init(problem, state.x)._replace(mean=state.mean, square=state.square, moves=state.moves)

    def _move(self, state: _State, F: Tensor) -> _State:
        first, second = self.betas
        mean = torch.lerp(state.mean, F, 1 - first)
        square = second * state.square + (1 - second) * F * F
        count = state.moves + 1
        root = torch.where(square > 0, torch.where(square > 0, square, torch.ones_like(square)).sqrt(), square)
        deviation = root / _correction(second, count).sqrt().unsqueeze(-1) + self.eps
        x = state.x - self.lr / _correction(first, count).unsqueeze(-1) * mean / deviation
        return state._replace(x=x, mean=mean, square=square, moves=count)


def _correction(beta: float, count: Tensor) -> Tensor:
    """1 - βᵏ, without the cancellation that costs float32 four digits."""
    return -torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)
