"""Problems whose solution is a formula, and so are its first and second derivatives: the table to check a solver with.

`CLOSED_FORMS` maps names to `ClosedForm`s, one for every pair of a problem and the parameter it is differentiated in;
`SYSTEMS` maps names to matrices that linear solvers are known to trip over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from implicitlayers.testing import formulas
from implicitlayers.testing.formulas import vector

__all__ = ["CLOSED_FORMS", "SYSTEMS", "ClosedForm"]


@dataclass(frozen=True)
class ClosedForm:
    """A problem with its answer x*(params), and the derivatives of the answer in one of the params.

    Attributes:
        name: the key in `CLOSED_FORMS`.
        kind: what `function` is: "argmin" (an objective), "root" (a residual) or "fixed_point" (a mapping).
        statement: the problem and its answer in symbols.
        function: ``(x, *params)``.
        x0: a start from which methods should arrive at this solution.
        params: where to evaluate; tensors.
        argnum: the param that is differentiated.
        solution: ``(*params) -> x [n]``.
        first: ``(*params) -> [n, *p]``, dx/dp.
        second: ``(*params) -> [n, *p, *p]``, d²x/dp².
        smooth: whether `function` is differentiable in x; where it is not, a proximal method is needed.

    Examples:
        >>> problem = CLOSED_FORMS["cubic root"]
        >>> round(float(problem.first(*problem.params)), 10)
        -0.5924469933
    """

    name: str
    kind: str
    statement: str
    function: Callable[..., Any]
    x0: Tensor
    params: tuple[Tensor, ...]
    argnum: int
    solution: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor]
    smooth: bool = True

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ClosedForm:
        """The same problem with its tensors in another type or on another device."""
        x0, *params = (t.to(dtype=dtype, device=device) for t in (self.x0, *self.params))
        return replace(self, x0=x0, params=tuple(params))


def _flat_second(first: Callable[..., Tensor], argnum: int) -> Callable[..., Tensor]:
    """The zero second derivative of a solution that is linear in the param as long as the active set stays."""
    return lambda *params: first(*params)[(..., *(None,) * params[argnum].ndim)] * torch.zeros_like(params[argnum])


def _nonconvex(name: str, objective: Callable[..., Tensor], theta: Tensor, near: Tensor, statement: str) -> ClosedForm:
    solve = formulas.minimum(objective, near)

    def second(theta: Tensor) -> Tensor:
        """The total derivative of -H⁻¹ ∂∇f/∂θ: directly in θ, and through x."""
        x = solve(theta)
        through, direct = jacrev(lambda x, theta: formulas.implicit_first(objective, x, theta), argnums=(0, 1))(
            x, theta
        )
        return direct + through @ formulas.implicit_first(objective, x, theta)

    def first(theta: Tensor) -> Tensor:
        return formulas.implicit_first(objective, solve(theta), theta)

    return ClosedForm(name, "argmin", statement, objective, near, (theta,), 0, solve, first, second)


def _himmelblau(x: Tensor, theta: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - theta[0]) ** 2 + (x[0] + x[1] ** 2 - theta[1]) ** 2


def _rosenbrock(x: Tensor, theta: Tensor) -> Tensor:
    return (theta[0] - x[0]) ** 2 + theta[1] * (x[1] - x[0] ** 2) ** 2


def _beale(x: Tensor, theta: Tensor) -> Tensor:
    powers = torch.stack([x[1], x[1] ** 2, x[1] ** 3])
    return (theta - x[0] + x[0] * powers).square().sum()


def _matyas(x: Tensor, theta: Tensor) -> Tensor:
    return 0.26 * x.square().sum() - 0.48 * x[0] * x[1] - theta @ x


_DATA = vector([1.0, 0.5], [0.25, -1.0], [1.5, 0.75], [-0.5, 1.25], [0.75, -0.25])
_TARGETS = vector(1.0, -0.5, 1.5, 0.25, 0.5)
_A, _B = vector([3.0, 1.0], [1.0, 2.0]), vector(1.0, -0.5)
_M = vector([0.25, 0.5], [-0.25, 0.125])
_LAM, _ZERO = vector(0.5), torch.zeros(2, dtype=torch.float64)
_HIMMELBLAU = {
    "(3, 2)": vector(3.2, 1.8),
    "(-2.81, 3.13)": vector(-2.9, 3.2),
    "(-3.78, -3.28)": vector(-3.7, -3.2),
    "(3.58, -1.85)": vector(3.5, -1.9),
}


def _argmin(
    name: str, statement: str, function: Callable[..., Tensor], params: tuple[Tensor, ...], argnum: int, *answers: Any
) -> ClosedForm:
    solution, first, *second = answers
    return ClosedForm(
        name, "argmin", statement, function, _ZERO, params, argnum, solution, first,
        second[0] if second else _flat_second(first, argnum),
    )  # fmt: skip


def _projection(name: str, statement: str, z: Tensor, *answers: Any) -> ClosedForm:
    return replace(
        _argmin(name, statement, formulas.half_distance, (z,), 0, *answers), x0=torch.zeros_like(z), smooth=False
    )


def _minima() -> list[ClosedForm]:
    ridge = (_DATA, _TARGETS, _LAM)
    proximal = (_A, _B, _LAM, vector(2.0, 1.0))
    weighted = (vector(1.0, 0.5, 2.0, 1.5, 0.75), _DATA, _TARGETS)
    f = formulas
    return [
        _argmin(
            "ridge", "½‖Xw - y‖²/n + ½λ‖w‖² in λ: w = (XᵀX/n + λI)⁻¹Xᵀy/n",
            lambda w, X, y, lam: (X @ w - y).square().mean() / 2 + lam * w.square().sum() / 2,
            ridge, 2, f.ridge, f.ridge_first, f.ridge_second,
        ),
        _argmin(
            "proximal quadratic in the anchor", "½xᵀAx - bᵀx + ½λ‖x - θ‖² in θ: x = M(b + λθ), M = (A + λI)⁻¹",
            f.proximal_objective, proximal, 3, f.proximal, lambda A, b, lam, theta: lam * f.shifted_inverse(A, lam),
        ),
        _argmin(
            "proximal quadratic in its strength", "½xᵀAx - bᵀx + ½λ‖x - θ‖² in λ: dx/dλ = M(θ - x)",
            f.proximal_objective, proximal, 2, f.proximal, f.proximal_in_lam,
            lambda A, b, lam, theta: -2 * f.shifted_inverse(A, lam) @ f.proximal_in_lam(A, b, lam, theta),
        ),
        _argmin(
            "weighted least squares", "½Σwᵢ(yᵢ - xᵢᵀβ)² in w: β = (XᵀWX)⁻¹XᵀWy",
            lambda beta, w, X, y: (w * (y - X @ beta).square()).sum() / 2,
            weighted, 0, f.weighted, f.weighted_first, f.weighted_second,
        ),
        replace(
            _argmin(
                "lasso", "½‖Xβ - y‖²/n + λ‖β‖₁ in λ, with support S: dβ_S/dλ = -n(X_SᵀX_S)⁻¹ sign(β_S)",
                lambda beta, X, y, lam: (X @ beta - y).square().mean() / 2 + lam * beta.abs().sum(),
                (_DATA, _TARGETS, vector(0.25)), 2, f.lasso, f.lasso_first,
            ),
            smooth=False,
        ),
        _argmin(
            "exponential", "Σ exp xᵢ - θᵀx: x = log θ", lambda x, theta: x.exp().sum() - theta @ x,
            (vector(1.5, 2.0),), 0, torch.log, lambda theta: torch.diag(1 / theta),
            lambda theta: -torch.diag_embed(torch.diag(theta**-2)),
        ),
    ]  # fmt: skip


def _constrained() -> list[ClosedForm]:
    f = formulas
    return [
        _projection(
            "soft threshold", "½‖x - z‖² + ½‖x‖₁ in z", vector(2.0, 0.25, -1.0),
            lambda z: z.sign() * (z.abs() - 0.5).clamp_min(0), lambda z: torch.diag((z.abs() > 0.5).to(z)),
        ),
        _projection(
            "box", "projection on [0, 1]ⁿ", vector(2.0, 0.25, -1.0),
            lambda z: z.clamp(0, 1), lambda z: torch.diag(((z > 0) & (z < 1)).to(z)),
        ),
        _projection(
            "simplex", "projection on {x ≥ 0, Σx = 1}", vector(0.75, 0.5, -1.0), f.simplex, f.simplex_first
        ),
        _projection("l1 ball", "projection on ‖x‖₁ ≤ 1", vector(1.0, -0.5, 0.125), f.l1_ball, f.l1_ball_first),
        _projection(
            "l2 ball", "projection on ‖x‖₂ ≤ 1", vector(1.0, -2.0, 0.5), f.l2_ball, f.l2_ball_first, f.l2_ball_second
        ),
        replace(
            _projection(
                "entropy", "Σp log p - θᵀp over the simplex: p = softmax θ", vector(1.0, -0.5, 0.25),
                lambda theta: theta.softmax(0),
                lambda theta: torch.diag(theta.softmax(0)) - torch.outer(theta.softmax(0), theta.softmax(0)),
                f.softmax_second,
            ),
            function=lambda p, theta: (p * p.log()).sum() - theta @ p, x0=torch.full((3,), 1 / 3, dtype=torch.float64),
        ),
        replace(
            _argmin(
                "quadratic program", "½xᵀQx + qᵀx, Σx = 1, x ≥ 0, Q = [[4, 1], [1, 2]]: x = (¼, ¾) at q = (1, 1)",
                lambda x, q: x @ f.Q.to(x) @ x / 2 + q @ x, (vector(1.0, 1.0),), 0,
                f.program, lambda q: -f.kkt(q)[:2, :2],
            ),
            smooth=False,
        ),
    ]  # fmt: skip


def _equations() -> list[ClosedForm]:
    f = formulas
    return [
        ClosedForm(
            "cubic root", "root", "θx³ - x - 2 = 0 near θ = 1: x = 1.5213797068, x' = -0.5924469933",
            f.cubic, vector([1.5]), (vector(1.0),), 0, f.cubic_root, f.cubic_first, f.cubic_second,
        ),
        ClosedForm(
            "cosine", "fixed_point", "x = cos x + θ near θ = 0: x = 0.7390851332, x' = 0.5975100457",
            f.cosine, vector([0.7]), (vector(0.0),), 0, f.cosine_point,
            lambda theta: 1 / (1 + f.cosine_point(theta).sin()),
            lambda theta: -f.cosine_point(theta).cos() / (1 + f.cosine_point(theta).sin()) ** 3,
        ),
        ClosedForm(
            "affine contraction in b", "fixed_point", "x = Mx + b in b: dx/db = (I - M)⁻¹", f.affine, _ZERO, (_M, _B),
            1, lambda M, b: f.resolvent(M) @ b, lambda M, b: f.resolvent(M),
            _flat_second(lambda M, b: f.resolvent(M), 1),
        ),
        ClosedForm(
            "affine contraction in M", "fixed_point", "x = Mx + b in M: ∂xᵢ/∂Mⱼₖ = Rᵢⱼxₖ with R = (I - M)⁻¹",
            f.affine, _ZERO, (_M, _B), 0, lambda M, b: f.resolvent(M) @ b, f.affine_in_M, f.affine_in_M_twice,
        ),
    ]  # fmt: skip


def _landscapes() -> list[ClosedForm]:
    return [
        *(
            _nonconvex(f"Himmelblau at {name}", _himmelblau, vector(11.0, 7.0), near, "(x² + y - θ₀)² + (x + y² - θ₁)²")
            for name, near in _HIMMELBLAU.items()
        ),
        _nonconvex(
            "Rosenbrock", _rosenbrock, vector(1.0, 100.0), vector(0.9, 0.8), "(θ₀ - x)² + θ₁(y - x²)²: (θ₀, θ₀²)"
        ),
        _nonconvex(
            "Beale", _beale, vector(1.5, 2.25, 2.625), vector(2.9, 0.45), "Σₖ(θₖ - x + xyᵏ)², k = 1, 2, 3: (3, ½)"
        ),
        _nonconvex("Matyas", _matyas, vector(0.5, -0.25), _ZERO, "0.26(x² + y²) - 0.48xy - θᵀx"),
    ]  # fmt: skip


CLOSED_FORMS: dict[str, ClosedForm] = {
    problem.name: problem for problem in (*_minima(), *_constrained(), *_equations(), *_landscapes())
}
"""Every problem by its name."""


def _poisson(n: int = 100) -> Tensor:
    off = -torch.ones(n - 1, dtype=torch.float64)
    return 2 * torch.eye(n, dtype=torch.float64) + torch.diag(off, 1) + torch.diag(off, -1)


SYSTEMS: dict[str, Tensor] = {
    "Poisson, n = 100": _poisson(),
    "condition 4647": vector([3.9, 1.65], [6.845, 2.9]),
    "diag(1, 3)": vector([1.0, 0.0], [0.0, 3.0]),
    "singular": vector([1.0, 1.0], [1.0, 1.0]),
    "indefinite": vector([1.0, 2.0], [2.0, 1.0]),
    "one unknown": vector([[2.0]]),
}
"""Matrices that linear solvers are known to trip over."""
