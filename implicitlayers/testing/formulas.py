"""The formulas behind `problems`: solutions and their derivatives, each beside its equation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd

F64 = torch.float64


def vector(*values: Any) -> Tensor:
    """A float64 tensor of these numbers or rows."""
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=F64)


def eye(like: Tensor) -> Tensor:
    """The identity that goes with a matrix or vector."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


# --- ridge: ½‖Xw - y‖²/n + ½λ‖w‖² -----------------------------------------------------------------


def ridge_matrix(X: Tensor, lam: Tensor) -> Tensor:
    """XᵀX/n + λI."""
    return X.mT @ X / len(X) + lam * eye(X)


def ridge(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """W = (XᵀX/n + λI)⁻¹Xᵀy/n."""
    return torch.linalg.solve(ridge_matrix(X, lam), X.mT @ y / len(X))


def ridge_first(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """dw/dλ = -(XᵀX/n + λI)⁻¹w."""
    return -torch.linalg.solve(ridge_matrix(X, lam), ridge(X, y, lam))


def ridge_second(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """d²w/dλ² = 2(XᵀX/n + λI)⁻²w."""
    return -2 * torch.linalg.solve(ridge_matrix(X, lam), ridge_first(X, y, lam))


# --- proximal quadratic: ½xᵀAx - bᵀx + ½λ‖x - θ‖², M = (A + λI)⁻¹ ---------------------------------


def proximal_objective(x: Tensor, A: Tensor, b: Tensor, lam: Tensor, theta: Tensor) -> Tensor:
    """½xᵀAx - bᵀx + ½λ‖x - θ‖²."""
    return x @ A @ x / 2 - b @ x + lam * (x - theta).square().sum() / 2


def shifted_inverse(A: Tensor, lam: Tensor) -> Tensor:
    """M = (A + λI)⁻¹."""
    return torch.linalg.inv(A + lam * eye(A))


def proximal(A: Tensor, b: Tensor, lam: Tensor, theta: Tensor) -> Tensor:
    """X = M(b + λθ)."""
    return shifted_inverse(A, lam) @ (b + lam * theta)


def proximal_in_lam(A: Tensor, b: Tensor, lam: Tensor, theta: Tensor) -> Tensor:
    """dx/dλ = M(θ - x)."""
    return shifted_inverse(A, lam) @ (theta - proximal(A, b, lam, theta))


# --- weighted least squares: ½ Σ wᵢ (yᵢ - xᵢᵀβ)² --------------------------------------------------


def weighted(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """β = (XᵀWX)⁻¹XᵀWy."""
    return torch.linalg.solve(X.mT @ (w[:, None] * X), X.mT @ (w * y))


def weighted_first(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """dβ/dwᵢ = H⁻¹xᵢrᵢ with H = XᵀWX and r = y - Xβ."""
    return torch.linalg.solve(X.mT @ (w[:, None] * X), X.mT * (y - X @ weighted(w, X, y)))


def weighted_second(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """d²β/dwᵢdwⱼ = -xᵢᵀH⁻¹xⱼ (H⁻¹xᵢrⱼ + H⁻¹xⱼrᵢ)."""
    directions = torch.linalg.solve(X.mT @ (w[:, None] * X), X.mT)
    r = y - X @ weighted(w, X, y)
    crossed = torch.einsum("ni,j->nij", directions, r)
    return -(X @ directions) * (crossed + crossed.mT)


# --- lasso: ½‖Xβ - y‖²/n + λ‖β‖₁ ------------------------------------------------------------------


def lasso_signs(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """Signs of the solution, by trying all: those whose stationary point has them and satisfies |Xᵀr|/n ≤ λ."""
    for signs in product((0.0, 1.0, -1.0), repeat=X.shape[1]):
        s = X.new_tensor(signs)
        beta = lasso_on(X, y, lam, s)
        slack = (X.mT @ (y - X @ beta) / len(X)).abs() - lam
        if bool((beta.sign() == s).all()) and bool((slack <= 1e-9 * lam).all()):
            return s
    raise ValueError("the lasso problem has no unique solution; pass an X of full column rank.")


def lasso_on(X: Tensor, y: Tensor, lam: Tensor, s: Tensor) -> Tensor:
    """The stationary point with the support and the signs s."""
    S = s != 0
    beta = torch.zeros_like(s)
    beta[S] = torch.linalg.solve(X[:, S].mT @ X[:, S], X[:, S].mT @ y - len(X) * lam * s[S])
    return beta


def lasso(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """β_S = (X_SᵀX_S)⁻¹(X_Sᵀy - nλs), 0 off the support S."""
    return lasso_on(X, y, lam, lasso_signs(X, y, lam))


def lasso_first(X: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """dβ_S/dλ = -n(X_SᵀX_S)⁻¹s."""
    s = lasso_signs(X, y, lam)
    S, out = s != 0, torch.zeros_like(s)
    out[S] = -len(X) * torch.linalg.solve(X[:, S].mT @ X[:, S], s[S])
    return out


# --- projections: argmin ½‖x - z‖² over a set, and the soft threshold -----------------------------


def simplex(z: Tensor) -> Tensor:
    """Projection on {x ≥ 0, Σx = 1} by sorting (Held, Wolfe & Crowder 1974)."""
    ordered = z.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(z) + 1, dtype=z.dtype, device=z.device)
    tau = excess[(ordered > excess).sum() - 1]
    return (z - tau).clamp_min(0)


def simplex_first(z: Tensor) -> Tensor:
    """I_S - 11ᵀ/|S| on the support S."""
    s = (simplex(z) > 0).to(z)
    return torch.diag(s) - torch.outer(s, s) / s.sum()


def l1_ball(z: Tensor) -> Tensor:
    """Projection on ‖x‖₁ ≤ 1."""
    return z if float(z.abs().sum()) <= 1 else z.sign() * simplex(z.abs())


def l1_ball_first(z: Tensor) -> Tensor:
    """I_S - ssᵀ/|S| outside of the ball, with the signs s."""
    if float(z.abs().sum()) <= 1:
        return eye(z)
    s = l1_ball(z).sign()
    return torch.diag(s.abs()) - torch.outer(s, s) / s.abs().sum()


def l2_ball(z: Tensor) -> Tensor:
    """Projection on ‖x‖₂ ≤ 1."""
    return z / z.norm().clamp_min(1)


def l2_ball_first(z: Tensor) -> Tensor:
    """(I - uuᵀ)/‖z‖ outside of the ball, with u = z/‖z‖."""
    u, length = z / z.norm(), z.norm()
    return eye(z) if float(length) <= 1 else (eye(z) - torch.outer(u, u)) / length


def l2_ball_second(z: Tensor) -> Tensor:
    """(3 uᵢuⱼuₖ - δᵢⱼuₖ - δᵢₖuⱼ - δⱼₖuᵢ)/‖z‖² with u = z/‖z‖, outside of the ball."""
    u, length, I = z / z.norm(), z.norm(), eye(z)
    mixed = torch.einsum("ij,k->ijk", I, u)
    bent = 3 * torch.einsum("i,j,k->ijk", u, u, u) - mixed - mixed.mT - torch.einsum("jk,i->ijk", I, u)
    return torch.zeros_like(bent) if float(length) <= 1 else bent / length**2


def half_distance(x: Tensor, z: Tensor) -> Tensor:
    """½‖x - z‖²."""
    return (x - z).square().sum() / 2


# --- entropy and exponentials ---------------------------------------------------------------------


def softmax_second(theta: Tensor) -> Tensor:
    """pᵢ((δᵢⱼ - pⱼ)(δᵢₖ - pₖ) - pⱼ(δⱼₖ - pₖ))."""
    p, I = theta.softmax(0), eye(theta)
    centered = I - p
    return p[:, None, None] * (centered[:, :, None] * centered[:, None, :] - (p[:, None] * centered)[None])


# --- quadratic program: ½xᵀQx + qᵀx with Σx = 1 ---------------------------------------------------

Q = vector([4.0, 1.0], [1.0, 2.0])


def kkt(q: Tensor) -> Tensor:
    """Inverse of [[Q, 1], [1ᵀ, 0]]."""
    matrix = torch.ones(3, 3, dtype=q.dtype, device=q.device)
    matrix[:2, :2], matrix[2, 2] = Q.to(q), 0
    return torch.linalg.inv(matrix)


def program(q: Tensor) -> Tensor:
    """X ≥ 0 is not active next to q = (1, 1); the multiplier of Σx = 1 is -2.75 there."""
    return (kkt(q) @ torch.cat([-q, q.new_ones(1)]))[:2]


# --- roots and fixed points -----------------------------------------------------------------------


def by_newton(residual: Callable[[Tensor, Tensor], Tensor], x: float) -> Callable[[Tensor], Tensor]:
    """A scalar root as a function of θ, by Newton steps from x."""

    def solve(theta: Tensor) -> Tensor:
        at = theta.new_tensor([x])
        for _ in range(50):
            at = at - residual(at, theta) / grad(lambda z: residual(z, theta).sum())(at)
        return at

    return solve


def cubic(x: Tensor, theta: Tensor) -> Tensor:
    """θx³ - x - 2."""
    return theta * x**3 - x - 2


cubic_root = by_newton(cubic, 1.5)


def cubic_first(theta: Tensor) -> Tensor:
    """X' = -x³/(3θx² - 1)."""
    x = cubic_root(theta)
    return -(x**3) / (3 * theta * x**2 - 1)


def cubic_second(theta: Tensor) -> Tensor:
    """Of x' = -x³/D with D = 3θx² - 1: x'' = -(3x²x'D - x³(3x² + 6θxx'))/D²."""
    x, dx = cubic_root(theta), cubic_first(theta)
    D = 3 * theta * x**2 - 1
    return -(3 * x**2 * dx * D - x**3 * (3 * x**2 + 6 * theta * x * dx)) / D**2


def cosine(x: Tensor, theta: Tensor) -> Tensor:
    """Cos x + θ."""
    return x.cos() + theta


cosine_point = by_newton(lambda x, theta: x - cosine(x, theta), 0.7)


def affine(x: Tensor, M: Tensor, b: Tensor) -> Tensor:
    """Mx + b."""
    return M @ x + b


def resolvent(M: Tensor) -> Tensor:
    """R = (I - M)⁻¹."""
    return torch.linalg.inv(eye(M) - M)


def affine_in_M(M: Tensor, b: Tensor) -> Tensor:
    """∂xᵢ/∂Mⱼₖ = Rᵢⱼ xₖ with R = (I - M)⁻¹."""
    return torch.einsum("ij,k->ijk", resolvent(M), resolvent(M) @ b)


def affine_in_M_twice(M: Tensor, b: Tensor) -> Tensor:
    """∂²xᵢ/∂Mⱼₖ∂Mₗₘ = Rᵢⱼ Rₖₗ xₘ + Rᵢₗ Rₘⱼ xₖ."""
    R = resolvent(M)
    one = torch.einsum("ij,kl,m->ijklm", R, R, R @ b)
    return one + one.permute(0, 3, 4, 1, 2)


# --- non-convex objectives: x' = -H⁻¹ ∂∇f/∂θ at the minimizer reached -----------------------------


def minimum(objective: Callable[..., Tensor], near: Tensor) -> Callable[[Tensor], Tensor]:
    """A minimizer as a function of θ, by Newton steps from a point near it."""

    def solve(theta: Tensor) -> Tensor:
        x = near.to(theta)
        for _ in range(30):
            x = x - torch.linalg.solve(hessian(objective)(x, theta), grad(objective)(x, theta))
        return x

    return solve


def implicit_first(objective: Callable[..., Tensor], x: Tensor, theta: Tensor) -> Tensor:
    """X' = -H⁻¹ ∂∇f/∂θ, by a dense solve."""
    return -torch.linalg.solve(hessian(objective)(x, theta), jacfwd(grad(objective), argnums=1)(x, theta))
