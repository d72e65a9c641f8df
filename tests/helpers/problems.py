"""Problems with known answers: closed forms with their derivatives, and a Newton oracle in plain torch.func.

Two oracles that share nothing with the library. The closed forms are differentiable functions of their parameters,
so torch.func differentiates them; their derivatives stand beside them as formulas, and check the oracle itself.
"""

from __future__ import annotations

import torch
from torch.func import grad, hessian

F64 = torch.float64


def spd(n: int, seed: int = 0, shift: float = 1.0, dtype: torch.dtype = F64) -> torch.Tensor:
    """A symmetric positive definite matrix with eigenvalues between `shift` and about shift + 4."""
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    product = G @ G.T / n
    # Whether a product comes out symmetric to the last bit depends on the machine's matrix product.
    return ((product + product.T) / 2 + shift * torch.eye(n, dtype=F64)).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- ridge regression: ½‖Xw - y‖²/m + ½λ‖w‖² ------------------------------------------------------


def ridge_objective(w, X, y, lam):
    return (X @ w - y).square().mean() / 2 + lam * w.square().sum() / 2


def _ridge_matrix(X, lam):
    return X.T @ X / len(X) + lam * torch.eye(X.shape[1], dtype=X.dtype)


def ridge_solution(X, y, lam):
    """w = (XᵀX/m + λI)⁻¹ Xᵀy/m."""
    return torch.linalg.solve(_ridge_matrix(X, lam), X.T @ y / len(X))


def ridge_dlam(X, y, lam):
    """dw/dλ = -(XᵀX/m + λI)⁻¹ w."""
    return -torch.linalg.solve(_ridge_matrix(X, lam), ridge_solution(X, y, lam))


def ridge_d2lam(X, y, lam):
    """d²w/dλ² = 2 (XᵀX/m + λI)⁻² w."""
    M = torch.linalg.inv(_ridge_matrix(X, lam))
    return 2 * M @ M @ ridge_solution(X, y, lam)


# --- proximal quadratic (linear iMAML): ½xᵀAx - bᵀx + ½λ‖x - θ‖², M = (A + λI)⁻¹ ------------------


def quadratic(x, A, b):
    return x @ A @ x / 2 - b @ x


def proximal_inverse(A, lam):
    """M = (A + ΛI)⁻¹ for a scalar or elementwise λ."""
    return torch.linalg.inv(A + torch.diag(lam.expand(len(A))))


def proximal_solution(A, b, lam, theta):
    """x = M (b + λθ)."""
    return torch.linalg.solve(A + torch.diag(lam.expand(len(A))), b + lam * theta)


# --- weighted least squares: ½ Σ wᵢ (yᵢ - xᵢᵀβ)² --------------------------------------------------


def weighted_objective(beta, w, X, y):
    return (w * (y - X @ beta).square()).sum() / 2


def weighted_solution(w, X, y):
    """β = (XᵀWX)⁻¹ XᵀWy."""
    return torch.linalg.solve(X.T @ (w[:, None] * X), X.T @ (w * y))


def weighted_dw(w, X, y):
    """dβ/dwᵢ = (XᵀWX)⁻¹ xᵢ (yᵢ - xᵢᵀβ), as a matrix with one column for every i."""
    return torch.linalg.solve(X.T @ (w[:, None] * X), X.T * (y - X @ weighted_solution(w, X, y)))


# --- entropy: min Σ exp(xᵢ) - θᵀx, whose answer is the logarithm ----------------------------------


def exponential(x, theta):
    return x.exp().sum() - theta @ x


# --- a strictly convex problem without closed form, for the Newton oracle -------------------------


# Made here: random numbers must not be drawn inside vmap. One matrix for every length of x; θ has length 3.
COUPLING = {n: normal(3, n, seed=7) / 2 for n in (1, 2, 3, 4)}


def coupled(x, theta):
    """½‖Mx - θ‖² + ¼Σx⁴·‖θ‖² + ½‖x‖²: the parameters enter data and curvature."""
    M = COUPLING[len(x)].to(x.dtype)
    return ((M @ x - theta) ** 2).sum() / 2 + (x**4).sum() / 4 * (theta**2).sum() + (x * x).sum() / 2


def newton(objective, x0, theta, steps: int = 12, recorded: int = 3):
    """Minimize by Newton's method; the last steps are left to torch.func to differentiate.

    A step that starts at the solution with derivatives right up to order k ends with derivatives right up to 2k + 1, so
    that three recorded steps serve up to order seven.
    """
    fixed, x = theta.detach(), x0
    for _ in range(steps):
        x = x - torch.linalg.solve(hessian(objective)(x, fixed), grad(objective)(x, fixed))
    for _ in range(recorded):
        x = x - torch.linalg.solve(hessian(objective)(x, theta), grad(objective)(x, theta))
    return x


def each(f, batch):
    """What vmap must equal: one element after the other."""
    return torch.stack([f(element) for element in batch])


# --- linear systems -------------------------------------------------------------------------------


def poisson(n: int = 100, dtype: torch.dtype = F64) -> torch.Tensor:
    """The tridiagonal second difference, condition number about (2(n + 1)/π)²."""
    off = -torch.ones(n - 1, dtype=dtype)
    return 2 * torch.eye(n, dtype=dtype) + torch.diag(off, 1) + torch.diag(off, -1)


def symmetrized(dtype: torch.dtype = F64) -> torch.Tensor:
    """BᵀB of the ill-conditioned B = [[3.9, 1.65], [6.845, 2.9]] (condition number 4647), so about 2e7."""
    B = torch.tensor([[3.9, 1.65], [6.845, 2.9]], dtype=F64)
    return (B.T @ B).to(dtype)


def product(A):
    """The product with one matrix, or with one matrix a lane."""
    return lambda y: (A @ y.unsqueeze(-1)).squeeze(-1)
