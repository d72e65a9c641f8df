"""The face: thin entry points that check what they are given, hand over to an adjoint, and raise once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from implicitlayers.adjoints import Adjoint, Implicit
from implicitlayers.flat import Tree
from implicitlayers.functorch import opaque_to_compile
from implicitlayers.pose import Equation, Objective, Residuals
from implicitlayers.regularizers import Regularizer
from implicitlayers.solve import Call
from implicitlayers.solver import Solver
from implicitlayers.solvers.fixed_point import Anderson
from implicitlayers.solvers.lbfgs import LBFGS
from implicitlayers.solvers.least_squares import LevenbergMarquardt
from implicitlayers.solvers.newton import Newton
from implicitlayers.solvers.proximal import ProximalGradient
from implicitlayers.status import MisuseError, Policy, Solution

__all__ = ["argmin", "fixed_point", "least_squares", "root"]


# torch.compile breaks its graph here: tracing a solve gains nothing, and compiled autograd Functions have known faults
# that change gradients silently (pytorch#183604, #193279).
@opaque_to_compile
def argmin(
    objective: Callable[..., Any],
    x0: Tree,
    *params: Any,
    regularizer: Regularizer | None = None,
    solver: Solver[Any] | None = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    on_failure: Policy = "raise",
    gradient_tol: float | None = None,
) -> Solution:
    """Minimize a function, and differentiate the minimizer.

    x*(θ) = argmin_x  f(x, θ) + r(x)

    The optimality condition is F(x, θ) = ∇ₓf(x, θ) + ∇r(x) = 0, and dx*/dθ = -(∇²f + ∇²r)⁻¹ ∂F/∂θ. Derivatives of every
    order reach the params, the regularizer's tensors, and every tensor that `objective` captures.

    Args:
        objective: ``(x, *params) -> scalar``; a function, a module, or a `Composite`. Must be deterministic and must
            not change what it captures. It is called again by the backward: data that a loop rebinds or overwrites
            until then must be params, not captured.
        x0: where to start; a tensor or any tree of tensors of one floating dtype. Gets no gradient under `Implicit`.
        *params: what the objective depends on; trees of tensors and anything else.
        regularizer: added to the objective.
        solver: how to minimize; by default `LBFGS()`, or `ProximalGradient()` where the regularizer has kinks or
            constraints.
        adjoint: how to differentiate; `Implicit()` by default.
        has_aux: whether the objective returns ``(value, aux)``.
        on_failure: what to do about lanes that the solver could not finish: "raise", "warn", "ignore" (look at
            ``solution.status`` yourself) or "nan" (their value becomes NaN).
        gradient_tol: relative error of the gradient to aim at; short for ``adjoint=Implicit(gradient_tol=...)``, where
            it is said what it bounds.

    Returns:
        The solution; ``solution.value`` is a tree like ``x0``.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> b = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> x = argmin(lambda x, b: x @ A @ x / 2 - b @ x, torch.zeros(2, dtype=torch.float64), b).value
        >>> torch.allclose(torch.autograd.grad(x[0], b)[0], torch.linalg.inv(A)[0])
        True
    """
    return Call(
        objective,
        Objective(),
        x0,
        params,
        regularizer,
        _default(LBFGS(), regularizer) if solver is None else solver,
        _with_tolerance(adjoint, gradient_tol),
        has_aux,
        on_failure,
    ).run()


@opaque_to_compile
def least_squares(
    residuals: Callable[..., Any],
    x0: Tree,
    *params: Any,
    regularizer: Regularizer | None = None,
    solver: Solver[Any] | None = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    on_failure: Policy = "raise",
    gradient_tol: float | None = None,
) -> Solution:
    """Minimize half the sum of squares of residuals, and differentiate the minimizer.

    x*(θ) = argmin_x  ½ ‖r(x, θ)‖² + reg(x)

    With J = ∂r/∂x the optimality condition is F = Jᵀr + ∇reg = 0. Its Jacobian is JᵀJ + Σ rᵢ ∇²rᵢ + ∇²reg;
    ``Implicit(curvature="gauss_newton")`` drops the second summand, which is exact where the fit is perfect or r is
    affine in x.

    Args:
        residuals: ``(x, *params) -> r``, a tensor or a tree of tensors; otherwise as the objective of `argmin`.
        x0: see `argmin`.
        *params: see `argmin`.
        regularizer: added to the sum.
        solver: how to minimize; by default `LevenbergMarquardt()`, or `ProximalGradient()` where the regularizer has
            kinks or constraints.
        adjoint: see `argmin`.
        has_aux: whether `residuals` returns ``(r, aux)``.
        on_failure: see `argmin`.
        gradient_tol: see `argmin`.

    Returns:
        The solution; ``stats.objective`` is ½ ‖r‖² + reg.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> t = torch.linspace(0, 1, 9, dtype=torch.float64)
        >>> y = (2 * torch.exp(-3 * t)).requires_grad_()
        >>> x = least_squares(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2, dtype=torch.float64), y).value
        >>> torch.allclose(x, torch.tensor([2.0, 3.0], dtype=torch.float64))
        True
    """
    solver = _default(LevenbergMarquardt(), regularizer) if solver is None else solver
    adjoint = _with_tolerance(adjoint, gradient_tol)
    return Call(residuals, Residuals(), x0, params, regularizer, solver, adjoint, has_aux, on_failure).run()


@opaque_to_compile
def root(
    residual: Callable[..., Any],
    x0: Tree,
    *params: Any,
    solver: Solver[Any] | None = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    on_failure: Policy = "raise",
    gradient_tol: float | None = None,
) -> Solution:
    """Solve a system of equations, and differentiate the solution.

    F(x*(θ), θ) = 0,  as many equations as unknowns

    The derivative is dx*/dθ = -A⁻¹ ∂F/∂θ with A = ∂F/∂x, of which nothing is known: the backward solves with Aᵀ by a
    linear solver for general systems.

    Args:
        residual: ``(x, *params) -> F``, a tree like x; otherwise as the objective of `argmin`.
        x0: see `argmin`.
        *params: see `argmin`.
        solver: how to solve; `Newton()` by default.
        adjoint: see `argmin`.
        has_aux: whether `residual` returns ``(F, aux)``.
        on_failure: see `argmin`.
        gradient_tol: see `argmin`.

    Returns:
        The solution; ``stats.objective`` is NaN.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> theta = torch.ones((), dtype=torch.float64, requires_grad=True)
        >>> x = root(lambda x, t: t * x**3 - x - 2, torch.tensor(1.5, dtype=torch.float64), theta).value
        >>> round(torch.autograd.grad(x, theta)[0].item(), 10)
        -0.5924469933
    """
    solver = Newton() if solver is None else solver
    adjoint = _with_tolerance(adjoint, gradient_tol)
    return Call(residual, Equation(), x0, params, None, solver, adjoint, has_aux, on_failure).run()


@opaque_to_compile
def fixed_point(
    mapping: Callable[..., Any],
    x0: Tree,
    *params: Any,
    solver: Solver[Any] | None = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    on_failure: Policy = "raise",
    gradient_tol: float | None = None,
) -> Solution:
    """Find a fixed point, and differentiate it.

    x = g(x, θ)

    With F = x - g(x, θ) the solution is a root, A = I - ∂g/∂x, and dx/dθ = A⁻¹ ∂g/∂θ; a deep equilibrium model
    is such a layer (Bai, Kolter & Koltun 2019).

    Args:
        mapping: ``(x, *params) -> g``, a tree like x; otherwise as the objective of `argmin`.
        x0: see `argmin`.
        *params: see `argmin`.
        solver: how to solve; `Anderson()` by default.
        adjoint: see `argmin`.
        has_aux: whether `mapping` returns ``(g, aux)``.
        on_failure: see `argmin`.
        gradient_tol: see `argmin`.

    Returns:
        The solution; ``stats.objective`` is NaN.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> x = fixed_point(lambda x, t: x.cos() + t, torch.tensor(1.0, dtype=torch.float64), theta).value
        >>> round(torch.autograd.grad(x, theta)[0].item(), 8)
        0.59751005
    """
    solver = Anderson() if solver is None else solver
    adjoint = _with_tolerance(adjoint, gradient_tol)
    return Call(
        mapping, Equation("mapping", fixed_point=True), x0, params, None, solver, adjoint, has_aux, on_failure
    ).run()


def _default(solver: Solver[Any], regularizer: Regularizer | None) -> Solver[Any]:
    return solver if getattr(regularizer, "smooth", True) else ProximalGradient()


def _with_tolerance(adjoint: Adjoint | None, gradient_tol: float | None) -> Adjoint:
    adjoint = Implicit() if adjoint is None else adjoint
    if gradient_tol is None:
        return adjoint
    if not isinstance(adjoint, Implicit):
        raise MisuseError(
            f"gradient_tol={gradient_tol} with adjoint={adjoint!r}: only the error of an implicit derivative is known; "
            "pass adjoint=Implicit(...), or leave gradient_tol out."
        )
    return replace(adjoint, gradient_tol=gradient_tol)
