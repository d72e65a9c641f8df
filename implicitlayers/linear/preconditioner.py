"""Preconditioners: an approximate inverse M⁻¹ of A that is cheap to apply; M⁻¹A is better conditioned than A."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from implicitlayers.linear.operator import Operator
from implicitlayers.loop import dot
from implicitlayers.status import MisuseError

__all__ = [
    "Jacobi",
    "LBFGSPreconditioner",
    "Nystrom",
    "Pair",
    "Precondition",
    "Preconditioner",
    "curvature_pair",
    "two_loop",
]

Precondition = Callable[[Tensor], Tensor]
"""r ↦ M⁻¹ r on ``[*lanes, n]``: linear, and symmetric positive definite for CG and MINRES."""


class Preconditioner(ABC):
    """A recipe for M⁻¹. Concrete ones are frozen dataclasses.

    A linear solver prepares it once a solve, outside any derivative: a preconditioner changes the way to the solution,
    not the solution. A plain function r ↦ M⁻¹ r may be passed in its place wherever one is taken.
    """

    @abstractmethod
    def prepare(self, operator: Operator, like: Tensor) -> Precondition:
        """Make M⁻¹ for this operator.

        Args:
            operator: A.
            like: any ``[*lanes, n]`` of the dtype and on the device of the unknown; its values do not matter.

        Returns:
            r ↦ M⁻¹ r on ``[*lanes, n]``, symmetric positive definite.
        """


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """The diagonal, M = diag |A|.

    Choose it where the unknowns have different scales: badly scaled features, one penalty a coefficient. It does
    nothing for a matrix with constant diagonal, such as the Poisson matrix.

    Up to `exact` unknowns the diagonal is read off n products. Beyond, it is estimated from random signs z by the mean
    of z ⊙ A z (Bekas, Kokiopoulou & Saad 2007). The error of an entry is √(Σ_{j≠i} aᵢⱼ² / samples); it is measured by
    the scatter of the samples and added in quadrature, so that no entry is taken smaller than it is known. The estimate
    is therefore of use only where the diagonal dominates its row in that sense. Entries that are zero count as one.

    Args:
        exact: largest n for which the diagonal is formed exactly, by n products at once.
        samples: products for the estimate.
        seed: of the random signs; the same for all lanes.
    """

    exact: int = 512
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise MisuseError(f"Jacobi(samples={self.samples}): the scatter needs two samples; pass at least 2.")

    def prepare(self, operator: Operator, like: Tensor) -> Precondition:
        n = like.shape[-1]
        if n <= self.exact:
            diagonal = operator.dense(like).diagonal(dim1=-2, dim2=-1).abs()
        else:
            signs = np.random.default_rng(self.seed).integers(0, 2, (self.samples, n)) * 2.0 - 1.0
            z = torch.as_tensor(signs, dtype=like.dtype, device=like.device)
            products = _products(operator, z, like) * z.reshape(self.samples, *[1] * (like.ndim - 1), n)
            variance = products.var(0) / self.samples
            diagonal = (products.mean(0).square() + variance).sqrt()
        usable = torch.isfinite(diagonal) & (diagonal > 0)
        diagonal = torch.where(usable, diagonal, torch.ones_like(diagonal))
        return lambda r: r / diagonal


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """Randomized Nyström approximation of the top of the spectrum (Frangella, Tropp & Udell 2023).

    From the sketch Y = A Ω with `rank` random orthonormal columns Ω follows A ≈ UΛUᵀ, and with μ = `shift`

        M⁻¹ = (λ_min + μ) U (Λ + μI)⁻¹ Uᵀ + (I - UUᵀ),        λ_min the smallest entry of Λ.

    Choose it for a curvature whose eigenvalues fall fast to a floor, such as a kernel or data matrix plus a ridge: once
    `rank` covers what stands out of the floor, the condition number left over is small. It does nothing for a spectrum
    without a few large eigenvalues. It costs `rank` products a solve, done at once, so that it pays where the plain
    solve takes several times as many.

    Args:
        rank: columns of the sketch; at most n are used.
        shift: μ, the part μI that A is known to contain (ridge, proximal strength, damping); the rest is what gets
            approximated. Zero where none is known.
        seed: of the sketch; the same for all lanes.
    """

    rank: int
    shift: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MisuseError(f"Nystrom(rank={self.rank}): the sketch would be empty; pass a positive integer.")
        if not self.shift >= 0:
            raise MisuseError(f"Nystrom(shift={self.shift}): pass a number >= 0.")

    def prepare(self, operator: Operator, like: Tensor) -> Precondition:
        n, eps = like.shape[-1], torch.finfo(like.dtype).eps
        normal = np.random.default_rng(self.seed).standard_normal((n, min(self.rank, n)))
        omega = torch.as_tensor(np.linalg.qr(normal)[0], dtype=like.dtype, device=like.device)
        Y = _products(operator, omega.T, like).movedim(0, -1) - self.shift * omega
        bad = ~torch.isfinite(Y).all(-1).all(-1)
        # A lane with NaN must not reach LAPACK, which may refuse the whole batch.
        Y = torch.where(bad[..., None, None], omega, Y)
        # The paper shifts by ν and takes a Cholesky factor of ΩᵀY; eigenvalues also serve where A is not semidefinite:
        # what is not positive there is left out.
        core = omega.mT @ Y
        d, W = torch.linalg.eigh((core + core.mT) / 2)
        kept = d > n * eps * d.abs().amax(-1, keepdim=True)
        scaling = torch.where(kept, torch.where(kept, d, torch.ones_like(d)).rsqrt(), torch.zeros_like(d))
        U, sigma, _ = torch.linalg.svd(Y @ (W * scaling.unsqueeze(-2)), full_matrices=False)
        values = sigma.square()
        found = values > n * eps * values.amax(-1, keepdim=True)
        floor = torch.where(found, values, torch.full_like(values, torch.inf)).amin(-1, keepdim=True)
        if self.shift > 0:
            # A sketch that found the end of the spectrum has left nothing but μ behind.
            floor = torch.where(found.all(-1, keepdim=True), floor, torch.zeros_like(floor))
        gain = torch.where(found, (floor + self.shift) / (values + self.shift), torch.ones_like(values))
        gain = torch.where(bad.unsqueeze(-1), torch.ones_like(gain), gain)

        def precondition(r: Tensor) -> Tensor:
            along = (U.mT @ r.unsqueeze(-1)).squeeze(-1)
            return r + (U @ ((gain - 1) * along).unsqueeze(-1)).squeeze(-1)

        return precondition


def _products(operator: Operator, rows: Tensor, like: Tensor) -> Tensor:
    """A applied to each of ``rows [k, n]``, on every lane: ``[k, *lanes, n]``."""
    return vmap(lambda row: operator(row.expand_as(like)))(rows)


class Pair(NamedTuple):
    """A step s and the change of gradient y ≈ A s ``[*lanes, n]``; rho = 1/sᵀy, zero in lanes where that is no use."""

    s: Tensor
    y: Tensor
    rho: Tensor


def curvature_pair(s: Tensor, y: Tensor) -> Pair:
    """The pair of a step, with weight zero in the lanes where sᵀy ≤ ε‖s‖‖y‖."""
    sy, ss, yy = dot(s, y), dot(s, s), dot(y, y)
    good = sy > torch.finfo(s.dtype).eps * (ss * yy).sqrt()
    return Pair(s, y, torch.where(good, 1 / torch.where(good, sy, torch.ones_like(sy)), torch.zeros_like(sy)))


def two_loop(pairs: Sequence[Pair], r: Tensor) -> Tensor:
    """The product of the L-BFGS inverse with r (Nocedal & Wright 2006, algorithm 7.4); `pairs` oldest first.

    Linear in r, and symmetric positive definite: every pair that counts has sᵀy > 0.
    """
    q, alphas = r, []
    for s, y, rho in reversed(pairs):
        alpha = (rho * dot(s, q)).unsqueeze(-1)
        q = q - alpha * y
        alphas.append(alpha)
    gamma = torch.ones_like(r[..., 0])
    for _, y, rho in pairs:
        # The scaling sᵀy/yᵀy of the newest usable pair of each lane.
        usable = rho > 0
        curve = torch.where(usable, rho * dot(y, y), torch.ones_like(rho))
        gamma = torch.where(usable, 1 / curve, gamma)
    q = gamma.unsqueeze(-1) * q
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - (rho * dot(y, q)).unsqueeze(-1))
    return q


@dataclass(frozen=True)
class LBFGSPreconditioner(Preconditioner):
    """The L-BFGS inverse of the pairs that a forward solve has gathered (Morales & Nocedal 2000).

    Choose it where the solution was found by `LBFGS`: the pairs are there for nothing. They describe the curvature
    along the last steps, so the more of the spectrum these met, the better. With no pairs M is the identity.

    Args:
        pairs: of steps s and changes of the gradient y ``[*lanes, n]``, the oldest first.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...] = ()

    def with_pairs(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> LBFGSPreconditioner:
        """The same with these pairs: how a solver hands over what it has gathered."""
        return replace(self, pairs=tuple(pairs))

    def prepare(self, operator: Operator, like: Tensor) -> Precondition:
        lanes = like.shape
        pairs = [curvature_pair(s.detach().expand(lanes), y.detach().expand(lanes)) for s, y in self.pairs]
        return lambda r: two_loop(pairs, r)
