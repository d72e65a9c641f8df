"""Direct solves: the matrix is formed by n products and factorized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver, check_right_hand_side
from implicitlayers.loop import norm, not_finite
from implicitlayers.status import Status

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Form A and factorize it: exact to rounding, n products and O(n³) operations, n² memory a lane.

    By Cholesky where the operator is known to be positive definite, and a lane that turns out not to be is INDEFINITE;
    by LU with pivoting otherwise. Choose it for small unknowns (n up to a few hundred), for a curvature that is
    indefinite but regular, and for condition numbers beyond what the iterative methods manage.
    """

    @property
    def looks(self) -> bool:
        return True

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        check_right_hand_side(b)
        A = operator.dense(b)
        bad = not_finite(A.abs().sum((-2, -1)), b.abs().sum(-1))
        # A lane with NaN must not reach LAPACK, which may refuse the whole batch.
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        A = torch.where(bad[..., None, None], eye, A)
        if operator.positive_definite:
            x, singular, indefinite, inverse = _by_cholesky(A, b)
        else:
            x, singular, inverse = _by_lu(A, b)
            indefinite = torch.zeros_like(singular)
        x = torch.where((singular | bad)[..., None], torch.zeros_like(x), x)
        if operator.minimizing and not operator.positive_definite:
            indefinite = (torch.linalg.cholesky_ex(A.detach())[1] != 0) & ~bad
            x = torch.where(indefinite[..., None], b, x)
        b_norm = norm(b)
        residual = norm((A @ x.unsqueeze(-1)).squeeze(-1) - b) / torch.where(
            b_norm > 0, b_norm, torch.ones_like(b_norm)
        )
        status = torch.full_like(residual, Status.CONVERGED, dtype=torch.int64)
        status = torch.where(singular, torch.full_like(status, Status.SINGULAR), status)
        status = torch.where(indefinite, torch.full_like(status, Status.INDEFINITE), status)
        status = torch.where(bad, torch.full_like(status, Status.NON_FINITE), status)
        unseen = torch.full_like(residual, torch.nan)
        smallest = torch.where(singular, torch.zeros_like(residual), _smallest(inverse, x))
        return LinearSolution(x, status, torch.ones_like(status), residual, unseen, unseen, smallest)


_Inverse = Callable[[Tensor, bool], Tensor]
"""y ↦ A⁻¹ y, or A⁻ᵀ y where the second argument is true."""


def _by_lu(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, _Inverse]:
    """The solution, the mask of the lanes whose matrix is singular to rounding, and the inverse."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    singular = _negligible(LU.detach().diagonal(dim1=-2, dim2=-1).abs())
    LU = torch.where(singular[..., None, None], torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), LU)

    def inverse(y: Tensor, transposed: bool) -> Tensor:
        return torch.linalg.lu_solve(LU, pivots, y.unsqueeze(-1), adjoint=transposed).squeeze(-1)

    return inverse(b, False), singular, inverse


def _by_cholesky(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, _Inverse]:
    """The same with the mask of the lanes that are not positive semidefinite; zero in both kinds."""
    L, info = torch.linalg.cholesky_ex(A.detach())
    fails = info != 0
    singular = _negligible(L.diagonal(dim1=-2, dim2=-1).square()) & ~fails
    failing = singular | fails
    # Factorized again with the failing lanes replaced, so that their derivative is zero and not NaN.
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    L = torch.linalg.cholesky_ex(torch.where(failing[..., None, None], eye, A))[0]

    def inverse(y: Tensor, transposed: bool) -> Tensor:
        return torch.cholesky_solve(y.unsqueeze(-1), L).squeeze(-1)

    x = inverse(b, False)
    return torch.where(failing[..., None], torch.zeros_like(x), x), singular, fails, inverse


def _smallest(inverse: _Inverse, x: Tensor) -> Tensor:
    """Estimate of the smallest singular value, from above: inverse iteration on AᵀA from the solution x = A⁻¹b.

    A⁻¹ has turned x towards the singular vector in question already, so that one round is enough for the one digit that
    an estimate needs (Higham 2002, section 15.2).
    """
    x = x.detach()
    y = torch.where((x != 0).any(-1, keepdim=True), x, torch.ones_like(x))
    growth = norm(y)
    for transposed in (True, False):
        y = inverse(y / growth.unsqueeze(-1), transposed).detach()
        growth = norm(y)
    return 1 / growth


def _negligible(pivots: Tensor) -> Tensor:
    """Whether a lane's smallest pivot is zero to rounding beside its largest."""
    return pivots.amin(-1) <= pivots.shape[-1] * torch.finfo(pivots.dtype).eps * pivots.amax(-1)
