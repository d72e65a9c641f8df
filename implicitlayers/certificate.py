"""How far an adjoint may be from the exact one: arithmetic on residuals and curvature, without a product of its own.

With û the computed and u the exact solution of A u = v,

    û - u = A⁻¹ (A û - v)        so        ‖û - u‖ ≤ ‖A û - v‖ / σ        with σ the smallest singular value of A.

The residual is known; what is left is σ. CG tells it through the Lanczos matrix that it builds on the way, a direct
method through its factors. Any other method tells only that σ ≤ ‖A û‖/‖û‖, which is a good estimate where û lies along
the directions that A shrinks most, as solutions for a general v do, and is divided by a margin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Lanczos", "adjoint_error"]

# For methods that do not estimate σ.
_MARGIN = 10.0


class Lanczos(NamedTuple):
    """The smallest eigenvalue that conjugate gradients have seen, by a few scalars a step; all ``[*lanes]``.

    After k steps of lengths αⱼ, with the coefficients βⱼ of the directions, the Lanczos matrix is T = RᵀR with R upper
    bidiagonal, 1/√αⱼ on the diagonal and √(βⱼ/αⱼ₋₁) above it. Its smallest eigenvalue θ, the smallest Ritz value of A,
    satisfies

        1/√tr T⁻²  ≤  θ  ≤  1/√(tr T⁻² / k).

    A step changes T⁻¹ by wwᵀ, w being the last column of R⁻¹, so that the trace follows from two inner products. Ritz
    values lie above the smallest eigenvalue μ of A, until CG has converged along its eigenvector; the lower bound is
    taken as the estimate of μ, as a margin for that. (Incremental estimates of θ itself: Meurant & Tichý 2019.)

    Attributes:
        trace: tr T⁻²; 0 before the first step.
        square: wᵀw.
        image: wᵀT⁻¹w.
        coupling: βⱼ/αⱼ₋₁.
    """

    trace: Tensor
    square: Tensor
    image: Tensor
    coupling: Tensor

    @classmethod
    def begin(cls, like: Tensor) -> Lanczos:
        """Before the first step; `like` is ``[*lanes]``."""
        zero = torch.zeros_like(like).detach()
        return cls(zero, zero, zero, zero)

    def advance(self, alpha: Tensor, beta: Tensor) -> Lanczos:
        """After a step of length alpha, before the direction r + beta·p; with alpha = 0 the trace stays as it was."""
        alpha, beta = alpha.detach(), beta.detach()
        ratio = alpha * self.coupling
        square, cross = alpha + ratio * self.square, ratio * self.image
        last = square * square
        coupling = beta / torch.where(alpha > 0, alpha, 1)
        return Lanczos(self.trace + 2 * cross + last, square, cross + last, coupling)

    def smallest(self) -> Tensor:
        """The estimate of μ; infinite before the first step."""
        return self.trace.rsqrt()


def adjoint_error(residual: Tensor, size: Tensor, sigma: Tensor | None, largest: Tensor) -> Tensor:
    """Estimate of ‖û - u‖/‖û‖, all ``[*lanes]``; 0 where v = 0.

    Args:
        residual: ‖A û - v‖/‖v‖.
        size: ‖û‖/‖v‖; NaN where v = 0.
        sigma: estimate of the smallest singular value of A; NaN or None where the method has none.
        largest: a lower bound of the largest; NaN where none was seen.
    """
    # ‖A û‖ is nearly ‖v‖, and at least that where û = 0, which says nothing.
    seen = 1 / size
    guess = seen / _MARGIN
    sigma = guess if sigma is None else torch.where(torch.isnan(sigma), guess, torch.fmin(sigma, seen))
    # The residual that a recurrence carries along is blind to the rounding of the products.
    rounding = torch.finfo(residual.dtype).eps * torch.fmax(largest.abs() * size, torch.ones_like(size))
    error = (residual + rounding) / (sigma * size)
    error = torch.where(torch.isfinite(error), error, torch.full_like(error, torch.inf))
    return torch.where(torch.isnan(size), torch.zeros_like(error), error)
