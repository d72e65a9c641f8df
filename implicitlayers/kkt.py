"""Quadratic programs on lanes: their data, their optimality condition, and the saddle-point systems that solve them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import norm
from implicitlayers.problem import Term

__all__ = ["KKTPoint", "KKTTerm", "Program", "Saddle", "Scales", "matvec"]


def matvec(M: Tensor, y: Tensor) -> Tensor:
    """M y on every lane; lanes broadcast."""
    return (M @ y.unsqueeze(-1)).squeeze(-1)


class KKTPoint(NamedTuple):
    """The unknowns of a quadratic program: x ``[*lanes, n]``, and multipliers of its p equations and m inequalities."""

    x: Tensor
    nu: Tensor
    lam: Tensor

    @classmethod
    def split(cls, z: Tensor, p: int, m: int) -> KKTPoint:
        """Take ``z [*lanes, n + p + m]`` apart."""
        return cls(*z.split([z.shape[-1] - p - m, p, m], dim=-1))

    def join(self) -> Tensor:
        """The same as one vector."""
        return torch.cat(self, dim=-1)


class Scales(NamedTuple):
    """The units of a scaled program's x and multipliers, per lane."""

    x: Tensor
    nu: Tensor
    lam: Tensor

    def undo(self, z: KKTPoint) -> KKTPoint:
        """A point of the scaled program in the units of the original one."""
        return KKTPoint(z.x * self.x, z.nu * self.nu, z.lam * self.lam)


class Program(NamedTuple):
    """min ½ xᵀQx + qᵀx subject to Ax = b and Gx ≤ h, Q symmetric, on every lane; the leading dimensions broadcast."""

    Q: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of equations and of inequalities."""
        return self.A.shape[-2], self.G.shape[-2]

    def objective(self, x: Tensor) -> Tensor:
        """½ xᵀQx + qᵀx ``[*lanes]``."""
        return (x * (matvec(self.Q, x) / 2 + self.q)).sum(-1)

    def stationarity(self, z: KKTPoint) -> Tensor:
        """The gradient of the Lagrangian in x, ``[*lanes, n]``."""
        return matvec(self.Q, z.x) + self.q + self.pull(z)

    def pull(self, z: KKTPoint) -> Tensor:
        """Aᵀν + Gᵀλ ``[*lanes, n]``."""
        return matvec(self.A.mT, z.nu) + matvec(self.G.mT, z.lam)

    def residual(self, z: KKTPoint) -> Tensor:
        """Norm of the optimality condition (∇L, Ax - b, λ ∘ (Gx - h)), ``[*lanes]``."""
        parts = (self.stationarity(z), matvec(self.A, z.x) - self.b, z.lam * (matvec(self.G, z.x) - self.h))
        return norm(torch.cat(parts, dim=-1))

    def violation(self, z: KKTPoint) -> Tensor:
        """Largest entry of (∇L, Ax - b, min(λ, h - Gx)), zero exactly where z is optimal; ``[*lanes]``."""
        natural = torch.minimum(z.lam, self.h - matvec(self.G, z.x))
        parts = (self.stationarity(z), matvec(self.A, z.x) - self.b, natural)
        return torch.cat(parts, dim=-1).abs().amax(-1)

    def finite(self) -> Tensor:
        """Mask of the lanes without NaN and infinity."""
        totals = [t.abs().sum((-2, -1)) for t in (self.Q, self.A, self.G)]
        totals += [t.abs().sum(-1) for t in (self.q, self.b, self.h)]
        return torch.isfinite(sum(totals[1:], totals[0]))

    def with_zeros(self, where: Tensor) -> Program:
        """Every tensor on every lane, and zero in some.

        So nothing broken reaches LAPACK, which takes all lanes at once.
        """
        mask = where.unsqueeze(-1)
        clean = [torch.where(mask[..., None], torch.zeros_like(t), t) for t in (self.Q, self.A, self.G)]
        q, b, h = (torch.where(mask, torch.zeros_like(t), t) for t in (self.q, self.b, self.h))
        return Program(clean[0], q, clean[1], b, clean[2], h)

    def convex(self) -> Tensor:
        """Mask of the lanes whose Q is positive semidefinite to rounding."""
        n = self.Q.shape[-1]
        size = torch.linalg.matrix_norm(self.Q)
        # A Gram matrix of deficient rank has eigenvalues of either sign, of the size of rounding.
        shift = 10 * n * torch.finfo(size.dtype).eps * size + torch.finfo(size.dtype).tiny
        eye = torch.eye(n, dtype=size.dtype, device=size.device)
        return torch.linalg.cholesky_ex(self.Q + shift[..., None, None] * eye)[1] == 0

    def scaled(self) -> tuple[Program, Scales]:
        """The same program in units in which solution, objective and rows are of order one.

        By powers of two, so that nothing is rounded. ‖x‖ is at least |b| / ‖a‖ of an equation and -h / ‖g‖ of an
        inequality that the origin violates; where the origin is feasible, the length of the free minimizer and the
        distance of the bounds are what there is. A bound far beyond that is scaled by its distance, so that it is no
        larger than the others.
        """
        a, g = (torch.linalg.vector_norm(M, dim=-1) for M in (self.A, self.G))
        force, bend = self.q.abs().amax(-1, keepdim=True), self.Q.abs().amax((-2, -1)).unsqueeze(-1)
        distances = self.h / torch.where(g > 0, g, torch.ones_like(g))
        typical = force / bend
        if g.shape[-1]:
            typical = torch.fmin(typical, distances.abs().median(-1, keepdim=True).values)
        must = torch.cat([self.b.abs() / torch.where(a > 0, a, torch.ones_like(a)), -distances, 0 * force], dim=-1)
        unit = _power(torch.fmax(must.amax(-1, keepdim=True), typical))
        objective = _power(torch.maximum(unit**2 * bend, unit * force))
        equality, inequality = _power(unit * a), _power(torch.maximum(unit * g, self.h.abs()))
        program = Program(
            self.Q * (unit**2 / objective)[..., None],
            self.q * (unit / objective),
            self.A * (unit / equality)[..., None],
            self.b / equality,
            self.G * (unit / inequality)[..., None],
            self.h / inequality,
        )
        return program, Scales(unit, objective / equality, objective / inequality)


def _power(size: Tensor) -> Tensor:
    """The power of two next to a size, and one where the size is zero or says nothing."""
    return torch.where(
        (size > 0) & torch.isfinite(size), torch.exp2(torch.round(torch.log2(size))), torch.ones_like(size)
    )


@dataclass(frozen=True)
class KKTTerm(Term):
    """The conditions of Karush, Kuhn and Tucker at z = (x, ν, λ), for one lane.

        F = ( ½ (Q + Qᵀ) x + q + Aᵀν + Gᵀλ,   A x - b,   d ∘ λ ∘ (G x - h) )

    They are zero at a solution, and at points that violate λ ≥ 0 or Gx ≤ h, which is for the solver to exclude. ∂F/∂z
    is regular where the active constraints are independent, each holds with λ > 0, and Q is positive definite along
    them; elsewhere a solution has no derivative.

    d is a constant in every derivative, of any order: a factor before a row that is zero does not move its zero. It is
    1 / max(1, λ, h - Gx), which keeps a bound that is far away (h = 1e12 for "none") from deciding what is negligible
    beside it; and 0 where λ and h - Gx are both zero to rounding, so that ∂F/∂z is singular to the last bit where it
    should be, and no quotient of two rounding errors passes for a derivative.

    Attributes:
        p: number of equations.
        m: number of inequalities.
    """

    p: int
    m: int
    slots: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    symmetric: ClassVar[bool] = False

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        Q, q, A, b, G, h = params
        x, nu, lam = KKTPoint.split(x, self.p, self.m)
        slack = G @ x - h
        stationarity = (Q @ x + Q.mT @ x) / 2 + q + A.mT @ nu + G.mT @ lam
        return torch.cat([stationarity, A @ x - b, _factor(lam, slack, params, x) * lam * slack])

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        Q, _, A, _, G, h = params
        x, _, lam = KKTPoint.split(x, self.p, self.m)
        dx, dnu, dlam = KKTPoint.split(y, self.p, self.m)
        slack = G @ x - h
        stationarity = (Q @ dx + Q.mT @ dx) / 2 + A.mT @ dnu + G.mT @ dlam
        return torch.cat([stationarity, A @ dx, _factor(lam, slack, params, x) * (lam * (G @ dx) + slack * dlam)])

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        Q, _, A, _, G, h = params
        x, _, lam = KKTPoint.split(x, self.p, self.m)
        u, v, w = KKTPoint.split(y, self.p, self.m)
        slack = G @ x - h
        w = _factor(lam, slack, params, x) * w
        return torch.cat([(Q @ u + Q.mT @ u) / 2 + A.mT @ v + G.mT @ (lam * w), A @ u, G @ u + slack * w])


def _factor(lam: Tensor, slack: Tensor, params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The factor d of `KKTTerm`."""
    Q, q, _, _, G, h = (t.detach() for t in params)
    lam, slack, x = lam.detach().abs(), slack.detach().abs(), x.detach()
    rounding = 100 * torch.finfo(x.dtype).eps
    # What cancels in h - Gx, and in the equation that determines λ.
    heights = h.abs() + G.abs().sum(-1) * x.abs().amax()
    force = torch.maximum(q.abs().amax(), (Q @ x).abs().amax())
    neither = (slack <= rounding * heights) & (lam * G.abs().amax(-1) <= rounding * force)
    return torch.where(neither, torch.zeros_like(lam), torch.maximum(lam, slack).clamp_min(1).reciprocal())


class Saddle(NamedTuple):
    """A factorized saddle-point matrix K = [H Bᵀ; B -C] with H and C positive semidefinite, which may be singular.

    K + δ diag(I, -I) is regular, and with its factors the system of K itself is refined: every round is a step of the
    proximal method of multipliers (Rockafellar 1976). It reduces the error by about δ / σ along a singular value σ of
    K, and leaves alone what K cannot see. A singular but consistent system, as of an equation that is stated twice, is
    so solved to rounding.

    Attributes:
        K: ``[*lanes, n + k, n + k]``.
        LU: factors of the regularized matrix.
        pivots: likewise.
    """

    K: Tensor
    LU: Tensor
    pivots: Tensor

    @classmethod
    def factor(cls, K: Tensor, n: int) -> Saddle:
        """Factorize; H is ``[n, n]``, and what is not H has entries of order one or less."""
        sign = torch.ones(K.shape[-1], dtype=K.dtype, device=K.device)
        sign[n:] = -1
        eps = torch.finfo(K.dtype).eps
        LU, pivots, _ = torch.linalg.lu_factor_ex(K + eps**0.75 * torch.diag(sign))
        # Beside weights of 1/ε what is of order one, δ as well, is lost, and a pivot may come out as zero: any of the
        # size of the rounding will do in its place.
        lost = eps * K.abs().amax((-2, -1), keepdim=True) * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        return cls(K, torch.where((LU == 0) & (lost > 0), lost, LU), pivots)

    def solve(self, rhs: Tensor, rounds: int) -> Tensor:
        """Solve K y = rhs, ``[*lanes, n + k]``, with so many rounds of refinement."""
        y = self._solve_regularized(rhs)
        for _ in range(rounds):
            y = y + self._solve_regularized(rhs - matvec(self.K, y))
        return y

    def _solve_regularized(self, rhs: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.LU, self.pivots, rhs.unsqueeze(-1)).squeeze(-1)
