"""Problems that are drawn together with their answers, and layers that solve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor
from torch.func import grad, hessian, jacrev

import implicitlayers as il
from implicitlayers.testing.strategies.tensors import (
    Device,
    eighths,
    expect_strategy,
    matrices,
    sizes,
    spd_matrices,
    tensors,
)

__all__ = ["Example", "Problem", "contractions", "layers", "strongly_convex_problems"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A problem together with its answer as a differentiable function of its params.

    Attributes:
        name: which family it is of.
        kind: "argmin" (`function` is an objective), "root" (a residual) or "fixed_point" (a mapping); the entry point
            of this library of that name solves it.
        function: ``(x, *params)``.
        x0: a start.
        params: tensors that the answer depends on.
        solution: ``(*params) -> x``, by a formula or by a dense solve; differentiable by torch.func, twice.

    What `function` and `solution` capture follows the type and device of what they are given, so that a problem in
    float32 has a known answer in float64 as well.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    x0: Tensor
    params: tuple[Tensor, ...]
    solution: Callable[..., Tensor]

    def first(self, argnum: int = 0) -> Tensor:
        """dx/dp ``[n, *p]``."""
        return jacrev(self.solution, argnums=argnum)(*self.params)

    def second(self, argnum: int = 0) -> Tensor:
        """d²x/dp² ``[n, *p, *p]``."""
        return jacrev(jacrev(self.solution, argnums=argnum), argnums=argnum)(*self.params)

    def solve(self, x0: Tensor, *params: Tensor, **options: Any) -> il.Solution:
        """Solve it with this library; options as those of `implicitlayers.argmin`."""
        entry: Callable[..., il.Solution] = getattr(il, self.kind)
        return entry(self.function, x0, *params, **options)


def newton(function: Callable[..., Tensor], x0: Tensor) -> Callable[..., Tensor]:
    """The minimizer by dense Newton steps, the last of which are left to torch.func to differentiate.

    A step that starts at the solution with derivatives right up to order k ends with derivatives right up to 2k + 1.
    """

    def solution(*params: Tensor) -> Tensor:
        fixed, x = [p.detach() for p in params], x0.to(params[0])
        for at in [fixed] * 20 + [params] * 2:
            x = x - torch.linalg.solve(hessian(function)(x, *at), grad(function)(x, *at))
        return x

    return solution


@st.composite
def strongly_convex_problems(
    draw: DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    max_size: int = 4,
    condition: float = 10.0,
) -> Problem:
    """Problems with one minimizer, known in closed form or by a dense solve, with its derivatives.

    Quadratics in their right-hand side, ridge regressions in targets and strength, linear iMAML in anchor and strength,
    and one without a closed form: ½xᵀAx + ¼Σx⁴ - θᵀx.

    Args:
        draw: given by Hypothesis; leave it out.
        dtype: of the tensors.
        device: of the tensors.
        max_size: most unknowns.
        condition: largest condition number of the quadratic part.

    Examples:
        >>> problem = strongly_convex_problems().example()
        >>> answer = problem.solution(*problem.params)
        >>> slope = torch.func.grad(problem.function)(answer, *problem.params)
        >>> bool(slope.abs().max() < 1e-9)
        True
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    n = draw(sizes("n", None, max_size))
    A = draw(spd_matrices(n, condition, **options))
    b, x0 = draw(tensors((n,), **options)), draw(tensors((n,), **options))
    lam = draw(tensors((), elements=eighths(0.125, 2.0), **options))
    # A is made symmetric inside, so that the answer depends on it in every direction.
    family = draw(st.sampled_from(["quadratic", "proximal", "ridge", "quartic"]))
    if family == "quadratic":
        return Problem(family, "argmin", _quadratic, x0, (A, b), lambda A, b: torch.linalg.solve((A + A.mT) / 2, b))
    if family == "proximal":
        return Problem(family, "argmin", _proximal(A, b), x0, (x0 + 1, lam), _proximal_solution(A, b))
    if family == "ridge":
        X = torch.cat([A, draw(tensors((2, n), **options))])
        y = draw(tensors((n + 2,), **options))
        return Problem(family, "argmin", _ridge(X), x0, (y, lam), _ridge_solution(X))

    def quartic(x: Tensor, theta: Tensor) -> Tensor:
        return x @ A.to(x) @ x / 2 + x.pow(4).sum() / 4 - theta @ x

    return Problem(family, "argmin", quartic, x0, (b,), newton(quartic, x0))


def _quadratic(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return x @ A @ x / 2 - b @ x


def _proximal(A: Tensor, b: Tensor) -> Callable[..., Tensor]:
    return lambda x, theta, lam: _quadratic(x, A.to(x), b.to(x)) + lam * (x - theta).square().sum() / 2


def _proximal_solution(A: Tensor, b: Tensor) -> Callable[..., Tensor]:
    def solution(theta: Tensor, lam: Tensor) -> Tensor:
        return torch.linalg.solve(A.to(theta) + lam * _eye(theta), b.to(theta) + lam * theta)

    return solution


def _eye(b: Tensor) -> Tensor:
    return torch.eye(len(b), dtype=b.dtype, device=b.device)


def _ridge(X: Tensor) -> Callable[..., Tensor]:
    return lambda w, y, lam: (X.to(w) @ w - y).square().sum() / 2 + lam * w.square().sum() / 2


def _ridge_solution(X: Tensor) -> Callable[..., Tensor]:
    def solution(y: Tensor, lam: Tensor) -> Tensor:
        A, b = X.to(y).mT @ X.to(y), X.to(y).mT @ y
        return torch.linalg.solve(A + lam * _eye(b), b)

    return solution


@st.composite
def contractions(
    draw: DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    max_size: int = 4,
    rate: float = 0.5,
) -> Problem:
    """Fixed-point problems x = T(x) whose mapping shrinks distances by `rate`; their Jacobians are not symmetric.

    Affine ones, x = Mx + b with x = (I - M)⁻¹b, in M and b; and x = tanh(Mx) + b, whose answer is found by Newton.

    Args:
        draw: given by Hypothesis; leave it out.
        dtype: of the tensors.
        device: of the tensors.
        max_size: most unknowns.
        rate: Lipschitz constant of the mapping, below 1.

    Examples:
        >>> problem = contractions().example()
        >>> x = problem.solution(*problem.params)
        >>> torch.allclose(x, problem.function(x, *problem.params))
        True
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate!r}, but a contraction shrinks distances; pass a number between 0 and 1.")
    n = draw(sizes("n", None, max_size))
    M = draw(matrices(n, 4.0, **options))
    M = rate * M / torch.linalg.matrix_norm(M, 2)
    b, x0 = draw(tensors((n,), **options)), draw(tensors((n,), **options))
    if draw(st.booleans()):
        return Problem("tanh", "fixed_point", _tanh, x0, (M, b), _tanh_point(x0))
    return Problem("affine", "fixed_point", lambda x, M, b: M @ x + b, x0, (M, b), _affine_point)


def _tanh(x: Tensor, M: Tensor, b: Tensor) -> Tensor:
    return (M @ x).tanh() + b


def _affine_point(M: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(_eye(b) - M, b)


def _tanh_point(x0: Tensor) -> Callable[..., Tensor]:
    def residual(x: Tensor, M: Tensor, b: Tensor) -> Tensor:
        return x - _tanh(x, M, b)

    def solution(*params: Tensor) -> Tensor:
        fixed, x = [p.detach() for p in params], x0.to(params[0])
        for at in [fixed] * 30 + [params] * 2:
            x = x - torch.linalg.solve(jacrev(residual)(x, *at), residual(x, *at))
        return x

    return solution


@dataclass(frozen=True, eq=False)
class Example:
    """A layer with inputs, and what it should return.

    Attributes:
        layer: a function of the inputs.
        inputs: tensors.
        solution: the right function of the inputs.
        description: what the layer is made of.
    """

    layer: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    solution: Callable[..., Tensor]
    description: str


@st.composite
def layers(
    draw: DrawFn,
    problems: SearchStrategy[Problem] | None = None,
    solvers: SearchStrategy[Any] | None = None,
    adjoints: SearchStrategy[Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    max_size: int = 4,
) -> Example:
    """Layers of this library that are right: for testing what is built on layers, and tests of layers.

    Args:
        draw: given by Hypothesis; leave it out.
        problems: what is solved; `strongly_convex_problems` by default.
        solvers: how; tight Newton and L-BFGS by default.
        adjoints: how it is differentiated; `Implicit` with tight CG and with Dense by default.
        dtype: of the default problems.
        device: of the default problems.
        max_size: of the default problems.

    Examples:
        >>> example = layers().example()
        >>> torch.allclose(example.layer(*example.inputs), example.solution(*example.inputs))
        True
    """
    if problems is None:
        problems = strongly_convex_problems(dtype=dtype, device=device, max_size=max_size)
    tight: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    if solvers is None:
        solvers = st.sampled_from([il.Newton(il.Dense(), **tight), il.LBFGS(**tight)])
    if adjoints is None:
        adjoints = st.sampled_from([il.Implicit(il.Dense()), il.Implicit(il.CG(rtol=tight["rtol"]))])
    problem = draw(expect_strategy("problems", problems, "strategies.strongly_convex_problems()"))
    solver = draw(expect_strategy("solvers", solvers, "st.sampled_from([il.Newton(), il.LBFGS()])"))
    adjoint = draw(expect_strategy("adjoints", adjoints, "st.sampled_from([il.Implicit()])"))

    def layer(*params: Tensor) -> Tensor:
        return problem.solve(problem.x0, *params, solver=solver, adjoint=adjoint).value

    return Example(layer, problem.params, problem.solution, f"{problem.name} by {solver} and {adjoint}")
