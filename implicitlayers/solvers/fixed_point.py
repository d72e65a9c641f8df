"""Solvers for equations that use nothing but values of F: Picard, Anderson and Broyden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import check_tolerances, dot, freeze, norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress, Solver
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["Anderson", "Broyden", "FixedPointIteration"]


class _Iterate(NamedTuple):
    x: Tensor
    F: Tensor
    progress: Progress | None


@dataclass(frozen=True)
class FixedPointIteration(Solver[_Iterate]):
    """Picard's iteration, x ← x - (1 - damping) F(x); for a fixed point, where F = x - g(x), x ← g(x) if undamped.

    It converges where g is a contraction, with its factor as the rate. Choose it for strong contractions, or for few,
    fixed steps; `Anderson` needs fewer evaluations for the same price a step.

    Args:
        damping: share of the old x that is kept, in [0, 1); makes a map contract whose Jacobian has eigenvalues near -1
            or beyond.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.ROOT})

    damping: float = 0.0
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances(self)
        _check_damping(self)

    def init(self, problem: Bound, x: Tensor) -> _Iterate:
        if not self.looks:
            # A fixed number of steps evaluates before each move and never after the last one.
            return _Iterate(x, torch.full_like(x, torch.nan), None)
        return _begin(problem, x)

    def step(self, problem: Bound, state: _Iterate) -> _Iterate:
        F = problem.residual(state.x) if state.progress is None else state.F
        x = torch.add(state.x, F, alpha=self.damping - 1)
        return _Iterate(x, F, None) if state.progress is None else _advance(problem, state, x)

    def terminate(self, problem: Bound, state: _Iterate) -> Tensor:
        if state.progress is None:
            running = torch.full_like(state.x[..., 0], RUNNING, dtype=torch.int64)
            finite = torch.isfinite(state.x).all(-1)
            return torch.where(finite, running, torch.full_like(running, Status.NON_FINITE))
        status = state.progress.verdict(self)
        # A slow contraction may need many steps for the next digit: only a step of no length is the end.
        still = state.progress.residual <= torch.finfo(state.x.dtype).eps / 4 * norm(state.x)
        return torch.where((status == RUNNING) & still, torch.full_like(status, Status.STALLED), status)

    def postprocess(self, problem: Bound, state: _Iterate) -> tuple[Tensor, Tensor, Tensor]:
        return _report(state)


@dataclass(frozen=True)
class _Memory:
    """Pairs of vectors ``[*lanes, n]``, oldest first. No pytree: finished lanes have no use for them."""

    pairs: tuple[tuple[Tensor, Tensor], ...] = ()

    def keep(self, pair: tuple[Tensor, Tensor], most: int) -> _Memory:
        return _Memory((*self.pairs, pair)[-most:])


class _Remembering(NamedTuple):
    iterate: _Iterate
    memory: _Memory


@dataclass(frozen=True)
class Anderson(Solver[_Remembering]):
    """Anderson acceleration of type II: the damped step from the combination of past iterates with the least residual.

    With ΔX and ΔF the last differences of x and F as columns,

        x ← x - βF - (ΔX - βΔF) γ,    γ = argmin ‖F - ΔF γ‖² + ρ² Σ (γⱼ ‖ΔFⱼ‖)²,    β = 1 - damping

    (Anderson 1965; Walker & Ni 2011, with the penalty ρ). The least-squares problem is solved by QR of ΔF with its
    columns scaled to length one and ρI below, so that its condition number enters once and not squared, as it would
    with normal equations, and is at most 1/ρ. Choose it for fixed points, such as deep equilibrium models: one
    evaluation a step, on linear problems equivalent to GMRES. It need not descend; `BestSoFar` keeps the best iterate.

    Args:
        memory: differences kept.
        damping: share of the old combination that is kept, in [0, 1).
        regularization: ρ, dimensionless; taken as 8 machine epsilons where it is smaller.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.ROOT})

    memory: int = 5
    damping: float = 0.0
    regularization: float = 1e-10
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_tolerances(self)
        _check_memory(self)
        _check_damping(self)
        if not self.regularization >= 0:
            raise MisuseError(f"Anderson(regularization={self.regularization}): pass a number >= 0.")

    def init(self, problem: Bound, x: Tensor) -> _Remembering:
        return _Remembering(_begin(problem, x), _Memory())

    def step(self, problem: Bound, state: _Remembering) -> _Remembering:
        old, beta = state.iterate, 1 - self.damping
        x = old.x - beta * old.F
        if state.memory.pairs:
            dX, dF = (torch.stack(columns, -1) for columns in zip(*state.memory.pairs, strict=True))
            x = x - ((dX - beta * dF) @ self._mix(dF, old.F)).squeeze(-1)
        new = _advance(problem, old, x)
        return _Remembering(new, state.memory.keep((new.x - old.x, new.F - old.F), self.memory))

    def terminate(self, problem: Bound, state: _Remembering) -> Tensor:
        assert state.iterate.progress is not None
        return state.iterate.progress.verdict(self, patience=50)

    def postprocess(self, problem: Bound, state: _Remembering) -> tuple[Tensor, Tensor, Tensor]:
        return _report(state.iterate)

    def resume(self, problem: Bound, state: _Remembering) -> _Remembering:
        return _Remembering(_begin(problem, state.iterate.x), state.memory)

    def _mix(self, dF: Tensor, F: Tensor) -> Tensor:
        """γ ``[*lanes, m, 1]`` for ``dF [*lanes, n, m]``."""
        lengths = norm(dF.mT)
        # A column of zeros, from a lane that stood still, gets γ = 0 from the penalty alone.
        scale = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        penalty = max(self.regularization, 8 * torch.finfo(F.dtype).eps)
        eye = penalty * torch.eye(dF.shape[-1], dtype=F.dtype, device=F.device)
        tall = torch.cat([dF / scale.unsqueeze(-2), eye.expand(*dF.shape[:-2], *eye.shape)], -2)
        Q, R = torch.linalg.qr(tall)
        right = Q[..., : F.shape[-1], :].mT @ F.unsqueeze(-1)
        return torch.linalg.solve_triangular(R, right, upper=True) / scale.unsqueeze(-1)


@dataclass(frozen=True)
class Broyden(Solver[_Remembering]):
    """Broyden's good method with limited memory, x ← x - H F with H ≈ (∂F/∂x)⁻¹ from secants.

    H starts as scale·I, and gets H ← H + (s - H y) sᵀH / (sᵀH y) for s = Δx and y = ΔF, kept as a sum of `memory` outer
    products of which the oldest is dropped (Broyden 1965; Kelley 1995, section 7.3). Choose it for equations whose
    Jacobian is too dear for `Newton`: one evaluation a step, superlinear near the solution. Full steps are taken, so
    it wants a start in the neighbourhood, or F = x - g(x) with g not far from a contraction; `BestSoFar` keeps the best
    iterate. Where sᵀH y vanishes in a lane, its update is left out.

    Args:
        memory: updates kept.
        scale: first H, in units of x over F; 1 suits fixed points.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset({Kind.ROOT})

    memory: int = 20
    scale: float = 1.0
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_tolerances(self)
        _check_memory(self)
        if not abs(self.scale) > 0:
            raise MisuseError(f"Broyden(scale={self.scale}): the first step would have no length; pass another number.")

    def init(self, problem: Bound, x: Tensor) -> _Remembering:
        return _Remembering(_begin(problem, x), _Memory())

    def step(self, problem: Bound, state: _Remembering) -> _Remembering:
        old, pairs = state.iterate, state.memory.pairs
        new = _advance(problem, old, old.x - self._apply(pairs, old.F))
        s, y = new.x - old.x, new.F - old.F
        Hy, sH = self._apply(pairs, y), self._apply([(v, u) for u, v in pairs], s)
        curve = dot(s, Hy)
        eps = torch.finfo(s.dtype).eps
        # A step of rounding size says nothing about the Jacobian.
        good = (curve.abs() > eps * norm(s) * norm(Hy)) & (norm(s) > 16 * eps * norm(new.x))
        weight = torch.where(good, 1 / torch.where(good, curve, torch.ones_like(curve)), torch.zeros_like(curve))
        kept = state.memory.keep((weight.unsqueeze(-1) * (s - Hy), sH), self.memory)
        if len(pairs) == self.memory:
            # A lane that learned nothing forgets nothing.
            kept = _Memory(freeze(good, kept.pairs, pairs))
        return _Remembering(new, kept)

    def terminate(self, problem: Bound, state: _Remembering) -> Tensor:
        assert state.iterate.progress is not None
        return state.iterate.progress.verdict(self, patience=50)

    def postprocess(self, problem: Bound, state: _Remembering) -> tuple[Tensor, Tensor, Tensor]:
        return _report(state.iterate)

    def resume(self, problem: Bound, state: _Remembering) -> _Remembering:
        return _Remembering(_begin(problem, state.iterate.x), state.memory)

    def _apply(self, pairs: tuple[tuple[Tensor, Tensor], ...] | list[tuple[Tensor, Tensor]], y: Tensor) -> Tensor:
        """(scale·I + Σ u vᵀ) y; with u and v exchanged, its transpose."""
        out = self.scale * y
        for u, v in pairs:
            out = out + u * dot(v, y).unsqueeze(-1)
        return out


def _begin(problem: Bound, x: Tensor) -> _Iterate:
    merit, F = problem.value_and_residual(x)
    return _Iterate(x, F, Progress.begin(problem, x, merit, F))


def _advance(problem: Bound, old: _Iterate, x: Tensor) -> _Iterate:
    assert old.progress is not None
    merit, F = problem.value_and_residual(x)
    return _Iterate(x, F, old.progress.advance((old.x, old.F), (x, F), merit))


def _report(state: _Iterate) -> tuple[Tensor, Tensor, Tensor]:
    residual = norm(state.F)
    return state.x, residual, torch.full_like(residual, torch.nan)


def _check_memory(solver: Anderson | Broyden) -> None:
    if solver.memory < 1:
        raise MisuseError(f"{type(solver).__name__}(memory={solver.memory}): pass a positive integer.")


def _check_damping(solver: FixedPointIteration | Anderson) -> None:
    if not 0 <= solver.damping < 1:
        raise MisuseError(
            f"{type(solver).__name__}(damping={solver.damping}): it is the share of the old x that is kept; pass a "
            "number in [0, 1)."
        )
