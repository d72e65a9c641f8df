"""Limited-memory BFGS (Liu & Nocedal 1989; Nocedal & Wright 2006, algorithm 7.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import check_tolerances, dot, norm
from implicitlayers.problem import Bound
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.line_search import Armijo, LineSearch, Point, descend
from implicitlayers.status import RUNNING, MisuseError

__all__ = ["LBFGS"]


class _Pair(NamedTuple):
    """s = Δx, y = ΔF, ρ = 1/sᵀy (0 where the pair is of no use) and the scaling γ = sᵀy/yᵀy."""

    s: Tensor
    y: Tensor
    rho: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class _Memory:
    """The pairs, oldest first. No pytree: finished lanes have no use for them, so the loop need not freeze them."""

    pairs: tuple[_Pair, ...] = ()


class _State(NamedTuple):
    point: Point
    memory: _Memory
    progress: Progress
    search: Tensor


@dataclass(frozen=True)
class LBFGS(Solver[_State]):
    """L-BFGS with a line search: the default for smooth problems.

    Choose it when gradients are cheap and second derivatives are not; a few tens of evaluations usually reach the
    tolerance. Where this differs from the textbook: a pair with sᵀy ≤ ε‖s‖‖y‖ in some lane (backtracking does not
    enforce the curvature condition) is kept with weight zero in that lane, so that all lanes share one memory. The
    first step costs one evaluation more, which tells the scale of the problem.

    Args:
        memory: pairs kept.
        line_search: how the step size is found.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    memory: int = 10
    line_search: LineSearch = field(default_factory=Armijo)
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 500

    def __post_init__(self) -> None:
        check_tolerances(self)
        if self.memory < 1:
            raise MisuseError(f"LBFGS(memory={self.memory}): at least one pair is needed; pass a positive integer.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        point = Point(x, *problem.value_and_residual(x))
        search = torch.full_like(point.objective, RUNNING, dtype=torch.int64)
        return _State(point, _Memory(), Progress.begin(problem, *point), search)

    def step(self, problem: Bound, state: _State) -> _State:
        old = state.point
        direction = -_two_loop(state.memory.pairs, old.F)
        first = torch.ones_like(old.objective)
        if not state.memory.pairs:
            first = _first_step(problem, old)
        new, search = descend(problem, old, direction, old.F, first, self.line_search, self.looks)
        memory = self._remember(state.memory, old, new)
        progress = state.progress.advance((old.x, old.F), (new.x, new.F), new.objective)
        return _State(new, memory, progress, search)

    def at_solution(self) -> LBFGS:
        return _Settled(**{f.name: getattr(self, f.name) for f in fields(self)})

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        status = state.progress.verdict(self, patience=20)
        return torch.where((status == RUNNING) & (state.search != RUNNING), state.search, status)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.point.x, norm(state.point.F), state.point.objective

    def pairs(self, state: _State) -> Sequence[tuple[Tensor, Tensor]]:
        return [(pair.s, pair.y) for pair in state.memory.pairs]

    def resume(self, problem: Bound, state: _State) -> _State:
        return self.init(problem, state.point.x)._replace(memory=state.memory)

    def _remember(self, memory: _Memory, old: Point, new: Point) -> _Memory:
        return _Memory((*memory.pairs, _pair(new.x - old.x, new.F - old.F, old.x))[-self.memory :])


@dataclass(frozen=True)
class _Settled(LBFGS):
    """L-BFGS with the pairs that it has: at a solution new ones are rounding and would drive the good ones out."""

    def _remember(self, memory: _Memory, old: Point, new: Point) -> _Memory:
        return memory


def _first_step(problem: Bound, at: Point) -> Tensor:
    """Step size ``[*lanes]`` along -F while no pair is known: the zero of the slope as a probe of length one tells it.

    For a quadratic that is the minimum along the line, whatever its scale. A bad guess must be harmless to a search
    that halves thirty times, so no step is longer than 2²⁸. Where the slope stays the same the step is longer than the
    probe, to find where it changes; where it falls, none is longer than one.
    """
    size = norm(at.F)
    unit = at.F / torch.where(size > 0, size, torch.ones_like(size)).unsqueeze(-1)
    rise = size - dot(problem.value_and_residual(at.x - unit)[1], unit)
    flat = rise.abs() <= 2.0**-28 * size
    usable = torch.isfinite(rise) & (rise > 0) & ~flat
    length = size / torch.where(usable, rise, torch.ones_like(rise))
    length = torch.where(usable, length, torch.where(flat, 128 * torch.ones_like(size), size.clamp_max(1)))
    # Where F is zero the length is nothing, but the derivative of a recorded step is not.
    return torch.where(size > 0, length / torch.where(size > 0, size, torch.ones_like(size)), torch.ones_like(size))


def _pair(s: Tensor, y: Tensor, x: Tensor) -> _Pair:
    sy, ss, yy = dot(s, y), dot(s, s), dot(y, y)
    eps = torch.finfo(s.dtype).eps
    # A step of rounding size says nothing about the curvature.
    good = (sy > eps * (ss * yy).sqrt()) & (ss > (16 * eps) ** 2 * dot(x, x))
    one = torch.ones_like(sy)
    rho = torch.where(good, 1 / torch.where(good, sy, one), torch.zeros_like(sy))
    return _Pair(s, y, rho, torch.where(good, sy / torch.where(good, yy, one), one))


def _two_loop(pairs: tuple[_Pair, ...], F: Tensor) -> Tensor:
    q, alphas = F, []
    for s, y, rho, _ in reversed(pairs):
        alpha = (rho * dot(s, q)).unsqueeze(-1)
        q = torch.addcmul(q, alpha, y, value=-1)
        alphas.append(alpha)
    gamma = torch.ones_like(F[..., 0])
    for pair in pairs:
        # That of the newest usable pair of each lane.
        gamma = torch.where(pair.rho > 0, pair.gamma, gamma)
    q = gamma.unsqueeze(-1) * q
    for (s, y, rho, _), alpha in zip(pairs, reversed(alphas), strict=True):
        q = torch.addcmul(q, s, alpha - (rho * dot(y, q)).unsqueeze(-1))
    return q
