"""Direct solves: the matrix is formed by n products and factorized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import norm, not_finite
from implicitlayers.status import Status

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Form A and factorize it by LU: exact to rounding, n products and n³/3 operations, n² memory a lane.

    Choose it for small unknowns (n up to a few hundred) and for curvature that is indefinite but regular.
    """

    @property
    def looks(self) -> bool:
        return True

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        A = operator.dense(b)
        bad = not_finite(A.abs().sum((-2, -1)), b.abs().sum(-1))
        # A lane with NaN must not reach LAPACK, which may refuse the whole batch.
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        A = torch.where(bad[..., None, None], eye, A)
        LU, pivots, _ = torch.linalg.lu_factor_ex(A)
        diagonal = LU.diagonal(dim1=-2, dim2=-1).abs()
        eps = torch.finfo(A.dtype).eps
        singular = diagonal.amin(-1) <= A.shape[-1] * eps * diagonal.amax(-1)
        LU = torch.where(singular[..., None, None], eye, LU)
        x = torch.linalg.lu_solve(LU, pivots, b.unsqueeze(-1)).squeeze(-1)
        x = torch.where((singular | bad)[..., None], torch.zeros_like(x), x)
        indefinite = torch.zeros_like(singular)
        if operator.minimizing:
            indefinite = (torch.linalg.cholesky_ex(A)[1] != 0) & ~bad
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
        return LinearSolution(x, status, torch.ones_like(status), residual, unseen, unseen)
