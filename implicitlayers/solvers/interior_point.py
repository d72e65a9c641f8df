"""A primal-dual interior-point method for convex quadratic programs (Mehrotra 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.kkt import KKTPoint, Program, Saddle, matvec
from implicitlayers.loop import Algorithm, check_tolerances, freeze
from implicitlayers.status import RUNNING, Status

__all__ = ["InteriorPoint", "InteriorState"]

# Steps without progress after which a lane has stalled. A lane that runs away makes none until its certificate holds.
_PATIENCE = 15

# Of the tolerance, which is at least 1000 ε: what is left is rounding.
_EXACT = 4e-3


class _Residuals(NamedTuple):
    """What is not yet zero: stationarity, equations, Gx + s - h, and the mean of λ ∘ s."""

    dual: Tensor
    equality: Tensor
    inequality: Tensor
    gap: Tensor


class InteriorState(NamedTuple):
    """An iterate with λ > 0 and s > 0.

    Attributes:
        z: x, ν and λ.
        s: slack, which is h - Gx in the end.
        residuals: at this point.
        error: the largest of residuals and gap, each over its tolerance.
        best: smallest error so far.
        idle: steps since it fell.
        sound: whether the lane's Q is positive semidefinite.
    """

    z: KKTPoint
    s: Tensor
    residuals: _Residuals
    error: Tensor
    best: Tensor
    idle: Tensor
    sound: Tensor


@dataclass(frozen=True)
class InteriorPoint(Algorithm[Program, InteriorState]):
    """Mehrotra's predictor-corrector method for convex quadratic programs.

    Every step solves two systems with one saddle-point matrix [Q + Gᵀ diag(λ/s) G, Aᵀ; A, 0] of n + p rows: a Newton
    step for the KKT conditions, and the same step with λ ∘ s kept away from zero by as much as the first one could not
    reduce it. It starts where it likes and needs 5 to 20 steps, whatever the condition. Nocedal & Wright (2006),
    algorithm 16.4, with the start of CVXOPT (Vandenberghe 2010, section 5.3); one step length for x and λ, which Q
    couples.

    A lane without a feasible point or without a minimum shows itself: its multipliers, or its x, grow without limit and
    tend to a certificate (Farkas' lemma). It is then INFEASIBLE or UNBOUNDED, which means that every feasible point, or
    every multiplier, is larger than 1/√ε in the units of the data; ε is the machine epsilon.

    Args:
        rtol: a lane has converged when stationarity, both kinds of constraint and the duality gap hold to
            atol + rtol·s, s being the size of the terms that cancel in them. At least 1000 ε is taken: eliminating the
            slacks costs digits, which the search for the active set brings back.
        atol: see `rtol`; in units in which solution, objective and rows are of order one. Likewise at least 1000 ε.
        max_steps: limit on the steps, or their exact number with ``rtol=atol=None``.
    """

    rtol: float | None = 1e-9
    atol: float | None = 1e-9
    max_steps: int = 60

    def __post_init__(self) -> None:
        check_tolerances(self)

    @property
    def looks(self) -> bool:
        """Whether convergence is checked."""
        return self.rtol is not None

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Relative and absolute tolerance in this precision."""
        least = 1000 * torch.finfo(dtype).eps
        return max(self.rtol or 0.0, least), max(self.atol or 0.0, least)

    def init(self, problem: Program, x: Tensor) -> InteriorState:
        n, p = problem.q.shape[-1], problem.counts[0]
        # The minimum of ½ xᵀQx + qᵀx + ½‖Gx - h‖² subject to Ax = b; its residual h - Gx guesses slack and multiplier.
        ones = torch.ones_like(x[..., n + p :])
        saddle = _factor(problem, ones)
        rhs = torch.cat([matvec(problem.G.mT, problem.h) - problem.q, problem.b], dim=-1)
        start, nu = saddle.solve(rhs.expand(*x.shape[:-1], n + p), 1).split([n, p], dim=-1)
        gap = problem.h - matvec(problem.G, start)
        s, lam = _positive(gap), _positive(-gap)
        return self._at(problem, KKTPoint(start, nu, lam), s, None, problem.convex().expand(x.shape[:-1]))

    def step(self, problem: Program, state: InteriorState) -> InteriorState:
        z, s, r = state.z, state.s, state.residuals
        saddle = _factor(problem, z.lam / s)
        products = z.lam * s
        dz, ds = _newton(problem, saddle, state, products)
        length = _longest(z.lam, dz.lam, s, ds)
        ahead = _mean((z.lam + length * dz.lam) * (s + length * ds))
        # Mehrotra's heuristic: the better the plain step, the less centring. Without inequalities there is no gap.
        centre = (ahead / torch.where(r.gap > 0, r.gap, torch.ones_like(r.gap))) ** 3 * r.gap
        dz, ds = _newton(problem, saddle, state, products + dz.lam * ds - centre.unsqueeze(-1))
        length = (0.995 * _longest(z.lam, dz.lam, s, ds)).clamp_max(1)
        if z.lam.shape[-1] == 0:
            length = torch.ones_like(length)
        moved = KKTPoint(z.x + length * dz.x, z.nu + length * dz.nu, _keep_positive(z.lam + length * dz.lam))
        new = self._at(problem, moved, _keep_positive(s + length * ds), state, state.sound)
        # Beyond rounding a step leads nowhere, or to NaN; a fixed number of steps must survive that.
        useful = (state.error > _EXACT) & (state.idle < _PATIENCE) & torch.isfinite(new.error)
        return freeze(useful, new, state._replace(idle=state.idle + 1))

    def terminate(self, problem: Program, state: InteriorState) -> Tensor:
        def where(mask: Tensor, status: Status) -> Tensor:
            return torch.where(mask, torch.full_like(verdict, status), verdict)

        verdict = torch.full_like(state.idle, RUNNING)
        verdict = where(state.idle >= _PATIENCE, Status.STALLED)
        verdict = where(_unbounded(problem, state.z), Status.UNBOUNDED)
        verdict = where(_infeasible(problem, state.z), Status.INFEASIBLE)
        if self.looks:
            verdict = where(state.error <= 1, Status.CONVERGED)
        verdict = where(~torch.isfinite(state.error), Status.NON_FINITE)
        return where(~state.sound, Status.INDEFINITE)

    def _at(self, problem: Program, z: KKTPoint, s: Tensor, old: InteriorState | None, sound: Tensor) -> InteriorState:
        """Evaluate the residuals at a point."""
        Qx, pull = matvec(problem.Q, z.x), problem.pull(z)
        Ax, Gx = matvec(problem.A, z.x), matvec(problem.G, z.x)
        r = _Residuals(Qx + problem.q + pull, Ax - problem.b, Gx + s - problem.h, _mean(z.lam * s))
        value = (z.x * (Qx / 2 + problem.q)).sum(-1)
        rtol, atol = self.tolerances(s.dtype)
        parts = (
            (_largest(r.dual), torch.maximum(_largest(Qx), _largest(pull))),
            (_largest(r.equality), _largest(problem.b)),
            (_largest(r.inequality), torch.maximum(_largest(problem.h), _largest(s))),
            (r.gap, value.abs()),
        )
        error = torch.stack([residual / (atol + rtol * terms) for residual, terms in parts]).amax(0)
        if old is None:
            return InteriorState(z, s, r, error, error, torch.zeros_like(error, dtype=torch.int64), sound)
        idle = torch.where(error < 0.9 * old.best, torch.zeros_like(old.idle), old.idle + 1)
        return InteriorState(z, s, r, error, torch.fmin(error, old.best), idle, sound)


def _factor(problem: Program, weights: Tensor) -> Saddle:
    """[Q + Gᵀ diag(weights) G, Aᵀ; A, 0], from which slack and λ have been eliminated."""
    A, p = problem.A, problem.counts[0]
    H = problem.Q + problem.G.mT @ (weights.unsqueeze(-1) * problem.G)
    A = A.expand(*H.shape[:-2], *A.shape[-2:])
    bottom = torch.cat([A, A.new_zeros(*A.shape[:-1], p)], dim=-1)
    return Saddle.factor(torch.cat([torch.cat([H, A.mT], dim=-1), bottom], dim=-2), H.shape[-1])


def _newton(problem: Program, saddle: Saddle, state: InteriorState, products: Tensor) -> tuple[KKTPoint, Tensor]:
    """The Newton step that would make all residuals zero and λ ∘ s what it is less `products`."""
    z, s, r = state.z, state.s, state.residuals
    known = (z.lam * r.inequality - products) / s
    rhs = torch.cat([-r.dual - matvec(problem.G.mT, known), -r.equality], dim=-1)
    dx, dnu = saddle.solve(rhs, 1).split([r.dual.shape[-1], r.equality.shape[-1]], dim=-1)
    Gdx = matvec(problem.G, dx)
    return KKTPoint(dx, dnu, known + z.lam / s * Gdx), -r.inequality - Gdx


def _longest(lam: Tensor, dlam: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """The longest step, at most a little more than one, that keeps λ and s positive; ``[*lanes, 1]``."""
    ratios = [torch.where(d < 0, -v / d, torch.full_like(v, 1.005)) for v, d in ((lam, dlam), (s, ds))]
    bound = torch.full_like(lam[..., :1] if lam.shape[-1] else lam.sum(-1, keepdim=True), 1.005)
    return torch.cat([*ratios, bound], dim=-1).amin(-1, keepdim=True)


def _positive(guess: Tensor) -> Tensor:
    """A guess that is positive already, or shifted so that it is."""
    if guess.shape[-1] == 0:
        return guess
    shortfall = (-guess).amax(-1, keepdim=True)
    return torch.where(shortfall < 0, guess, guess + 1 + shortfall)


def _keep_positive(v: Tensor) -> Tensor:
    """Guard against underflow."""
    return v.clamp_min(torch.finfo(v.dtype).tiny)


def _mean(v: Tensor) -> Tensor:
    return v.sum(-1) / max(v.shape[-1], 1)


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax(-1) if v.shape[-1] else v.sum(-1)


def _infeasible(problem: Program, z: KKTPoint) -> Tensor:
    """Whether λ > 0 and ν prove it: Aᵀν + Gᵀλ = 0 with bᵀν + hᵀλ < 0 contradicts Ax = b, Gx ≤ h (Farkas' lemma)."""
    terms = torch.cat([problem.b * z.nu, problem.h * z.lam], dim=-1)
    return _certified(-terms.sum(-1), terms.abs().sum(-1), _largest(problem.pull(z)))


def _unbounded(problem: Program, z: KKTPoint) -> Tensor:
    """Whether x is a direction of unlimited descent: Qx = 0, Ax = 0, Gx ≤ 0 and qᵀx < 0."""
    terms = problem.q * z.x
    leaves = (matvec(problem.Q, z.x), matvec(problem.A, z.x), matvec(problem.G, z.x).clamp_min(0))
    return _certified(-terms.sum(-1), terms.abs().sum(-1), torch.stack([_largest(t) for t in leaves]).amax(0))


def _certified(gain: Tensor, size: Tensor, error: Tensor) -> Tensor:
    """Whether a certificate holds but for a small error, and gains more than rounding of terms of this size."""
    eps = torch.finfo(gain.dtype).eps
    return (gain > 1e3 * eps * size) & (error <= eps**0.5 * gain)
