"""How wrong is a gradient, how does that depend on the tolerances, and does the certificate know?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import implicitlayers as il
from benchmarks.report import Report

PROBLEMS = 1000
SWEPT = 40
MOST_DECADES = 6.0
LARGEST = 100
LADDER = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Problem:
    """min f(x) - bᵀx with a solution and a derivative in closed form, in float64 from the data as rounded.

    The gradient of vᵀx* with respect to b is A⁻¹v: the adjoint itself.

    Attributes:
        objective: ``(x, b) -> scalar``.
        b: ``[n]``.
        solution: x*.
        v: the cotangent.
        gradient: A(x*)⁻¹ v.
    """

    objective: Callable[[Tensor, Tensor], Tensor]
    b: Tensor
    solution: Tensor
    v: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Outcome:
    """Of one gradient: its relative error, and what the certificate said."""

    true: float
    estimate: float

    @property
    def holds(self) -> bool:
        """Whether the estimate is no less than the truth."""
        return self.true <= self.estimate


def run(device: str, repeats: int) -> Report:
    """Compare the true relative error of the gradient with `AdjointReport.error_estimate`.

    Quadratics, for which only the adjoint's residual matters, and sums of exponentials, for which an inexact solution
    changes the curvature. Size, condition number, spectrum, cotangent, the tolerance of CG and the relative error of
    the solution are drawn at random; then one of the two errors is swept with the other out of the way.

    Args:
        device: where to run.
        repeats: not used: nothing is timed.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    everything: list[Outcome] = []
    for kind in KINDS:
        for dtype in (F64, F32):
            outcomes = [_random(kind, dtype, device, generator) for _ in range(PROBLEMS // 4)]
            everything += outcomes
            rows.append(_row(f"{kind}, {str(dtype).removeprefix('torch.')}", outcomes))
    rows.append(_row("all of these", everything))
    adjoint, inner = [], []
    for level in LADDER:
        adjoint.append(_row(f"CG to rtol={level:g}, exact solution", _swept("quadratic", level, 0.0, device)))
    for level in LADDER:
        inner.append(_row(f"solution off by {level:g}, exact adjoint", _swept("exponential", 1e-13, level, device)))
    kept = [_row(f"gradient_tol={level:g}", _aimed(level, device)) for level in LADDER[1::2]]
    total = rows[-1]
    return Report(
        f"relative error of gradients, {PROBLEMS} random problems, n = 2 … {LARGEST}, condition number 1 … 1e6; "
        f"below the first five rows {SWEPT} problems in float64 each",
        [*rows, *adjoint, *inner, *kept],
        f"the estimate holds in {total['holds']} (must: 95 %), is {total['estimate / true']:.3g} times the truth on "
        f"the median (must: 10); the error falls with the power {_slope(adjoint):.2f} of the adjoint's tolerance and "
        f"{_slope(inner):.2f} of the solution's error (predicted: 1, 1)",
    )


def _row(what: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ratios = torch.tensor([o.estimate / max(o.true, 1e-300) for o in outcomes], dtype=F64)
    errors = torch.tensor([o.true for o in outcomes], dtype=F64)
    return {
        "what": what,
        "problems": len(outcomes),
        "holds": f"{100 * sum(o.holds for o in outcomes) / len(outcomes):.1f} %",
        "estimate / true": ratios.median().item(),
        "5 %": ratios.quantile(0.05).item(),
        "95 %": ratios.quantile(0.95).item(),
        "true error": errors.median().item(),
        "largest": errors.max().item(),
    }


def _slope(rows: Sequence[dict[str, Any]]) -> float:
    """Of the logarithm of the error in that of the tolerance, by least squares."""
    x = torch.tensor(LADDER, dtype=F64).log10()
    y = torch.tensor([row["true error"] for row in rows], dtype=F64).log10()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def _random(kind: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> Outcome:
    finest = -8 if dtype is F64 else -5
    rtol, off = (10 ** _uniform(finest, -1, generator) for _ in range(2))
    return _differentiate(_problem(kind, dtype, device, generator), rtol, off, generator)


def _swept(kind: str, rtol: float, off: float, device: str) -> list[Outcome]:
    generator = torch.Generator().manual_seed(1)
    return [_differentiate(_problem(kind, F64, device, generator, 3.0), rtol, off, generator) for _ in range(SWEPT)]


def _aimed(gradient_tol: float, device: str) -> list[Outcome]:
    """Solved by Newton's method from a start nearby, to tolerances that are too loose by themselves."""
    generator = torch.Generator().manual_seed(2)
    outcomes = []
    for _ in range(SWEPT):
        problem = _problem("exponential", F64, device, generator, 3.0)
        adjoint = il.Implicit(il.CG(rtol=1e-1), gradient_tol=gradient_tol, on_failure="ignore")
        outcomes.append(_outcome(problem, torch.zeros_like(problem.b), il.Newton(rtol=1e-1), adjoint))
    return outcomes


def _differentiate(problem: Problem, rtol: float, off: float, generator: torch.Generator) -> Outcome:
    """At a solution that is off by a known relative error, with CG to this tolerance."""
    x = problem.solution.double()
    away = torch.randn(len(x), generator=generator, dtype=F64).to(x.device)
    moved = (x + off * x.norm() * away / away.norm()).to(problem.b.dtype)
    # Tolerances are not kept here, only measured.
    adjoint = il.Implicit(il.CG(rtol=rtol, max_steps=5000), gradient_tol=math.inf, on_failure="ignore")
    return _outcome(problem, moved, il.Given(moved, rtol=None, atol=None), adjoint)


def _outcome(problem: Problem, x0: Tensor, solver: il.Solver[Any], adjoint: il.Implicit) -> Outcome:
    b = problem.b.clone().requires_grad_()
    solution = il.argmin(problem.objective, x0, b, solver=solver, adjoint=adjoint, on_failure="ignore")
    (g,) = torch.autograd.grad(solution.value, b, problem.v)
    assert solution.adjoint.error_estimate is not None
    true = (g.double() - problem.gradient).norm() / g.double().norm()
    return Outcome(true.item(), solution.adjoint.error_estimate.item())


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=F64).item()


def _spectrum(n: int, decades: float, generator: torch.Generator) -> Tensor:
    """Eigenvalues between 1 and 10^-decades: evenly spread on a logarithmic scale, at random on it, or at random."""
    spread = int(torch.randint(3, (), generator=generator))
    places = torch.rand(n, generator=generator, dtype=F64)
    places[0], places[-1] = 0, 1
    if spread == 0:
        return torch.logspace(0, -decades, n, dtype=F64)
    if spread == 1:
        return 10 ** (-decades * places)
    return 1 - places * (1 - 10**-decades)


def _problem(
    kind: str, dtype: torch.dtype, device: str, generator: torch.Generator, decades: float = MOST_DECADES
) -> Problem:
    n = int(torch.randint(2, LARGEST + 1, (), generator=generator))
    values = _spectrum(n, _uniform(0, decades, generator), generator)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    x, v = (torch.randn(n, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    return KINDS[kind](Q.to(device), values.to(device), x.to(device), v.to(device))


def _quadratic(Q: Tensor, values: Tensor, x: Tensor, v: Tensor) -> Problem:
    """xᵀAx/2 - bᵀx."""
    A = (Q * values) @ Q.T
    A = ((A + A.T) / 2).to(v.dtype)
    b = A @ x
    solution, gradient = torch.linalg.solve(A.double(), torch.stack([b, v], -1).double()).unbind(-1)
    return Problem(lambda x, b: x @ A @ x / 2 - b @ x, b, solution, v, gradient)


def _exponential(Q: Tensor, values: Tensor, x: Tensor, v: Tensor) -> Problem:
    """Σ exp(Qx)ᵢ - bᵀx: with θ = Q⁻ᵀb the solution is Q⁻¹ log θ, and A = Qᵀ diag(θ) Q there."""
    Q = Q.to(v.dtype)
    b = (Q.double().T @ values).to(v.dtype)
    exact = Q.double()
    # Rounding b may have moved the smallest θ by more than itself.
    theta = torch.linalg.solve(exact.T, b.double())
    solution = torch.linalg.solve(exact, theta.log())
    gradient = torch.linalg.solve(exact, torch.linalg.solve(exact.T, v.double()) / theta)
    return Problem(lambda x, b: (Q @ x).exp().sum() - b @ x, b, solution, v, gradient)


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Problem]] = {
    "quadratic": _quadratic,
    "exponential": _exponential,
}
