"""Does a large problem take the time of its own matrix products?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import implicitlayers as il
from applications.imaml.device import keep_freed_memory
from benchmarks.report import Report, fastest_seconds

RIDGE_ROWS, RIDGE_FEATURES = 2_000, 1_000
ROWS, FEATURES, CLASSES = 1_000, 1_000, 1_000


class MatrixProducts(TorchDispatchMode):
    """Notes the matrix products inside the context, to be run again without anything else.

    Attributes:
        calls: the operation and its arguments, of every product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        """Run the same products on the same matrices."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "mv", "bmm", "addmm", "addmv", "baddbmm")}


class Solved(NamedTuple):
    """A solution and the gradient of an outer loss with respect to the log-penalties."""

    solution: il.Solution
    hypergradient: Tensor


def run(device: str, repeats: int) -> Report:
    """Time value and hypergradient, and the matrix products that they consist of.

    Args:
        device: where to run.
        repeats: timed runs of each; the fastest counts, because what else the machine does only slows it.
    """
    keep_freed_memory()
    rows = [
        _row("ridge", ridge(device), RIDGE_FEATURES, device, repeats),
        _row("multinomial", multinomial(device), FEATURES * CLASSES, device, repeats),
    ]
    worst = max(row["ratio"] for row in rows)
    return Report(
        f"value and hypergradient: ridge with {RIDGE_FEATURES} log-penalties, {RIDGE_ROWS} rows, float64; multinomial "
        f"logistic regression with {FEATURES} log-penalties, {CLASSES} classes, {ROWS} rows, float32",
        rows,
        f"at most {worst:.2f} times the time of the matrix products (must: 1.5); the ridge takes {rows[0]['ms']:.1f} "
        f"ms (jitted jaxopt L-BFGS + CG took 26 ms on the two cores where it was measured)",
    )


def _row(name: str, solve: Callable[[], Solved], unknowns: int, device: str, repeats: int) -> dict[str, Any]:
    products = MatrixProducts()
    with products:
        solved = solve()
    seconds = fastest_seconds({"all": solve, "products": products.again}, device, repeats)
    return {
        "problem": name,
        "unknowns": unknowns,
        "ms": 1e3 * seconds["all"],
        "products": len(products.calls),
        "products ms": 1e3 * seconds["products"],
        "ratio": seconds["all"] / seconds["products"],
        "‖∇f‖": solved.solution.stats.residual.item(),
        "adjoint residual": float(solved.solution.adjoint.residual or 0.0),
    }


def ridge(device: str) -> Callable[[], Solved]:
    """½‖Xw - y‖²/m + ½ Σ exp(λᵢ) wᵢ², by one Newton step: conjugate gradients with the known diagonal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    X, truth, log_penalties = normal(RIDGE_ROWS, RIDGE_FEATURES), normal(RIDGE_FEATURES), normal(RIDGE_FEATURES)
    y = X @ truth + normal(RIDGE_ROWS)
    start = torch.zeros_like(truth)

    def loss(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(X @ w, y) / 2

    def solve() -> Solved:
        leaf = log_penalties.clone().requires_grad_()
        diagonal = torch.linalg.vector_norm(X, dim=0).square() / len(X) + leaf.detach().exp()
        cg = il.CG(rtol=1e-8, preconditioner=lambda r: r / diagonal)
        solution = il.argmin(
            loss,
            start,
            X,
            y,
            regularizer=il.Ridge(leaf.exp()),
            solver=il.Newton(cg, rtol=0.0, atol=1e-6),
            adjoint=il.Implicit(il.CG(rtol=1e-6, preconditioner=cg.preconditioner)),
        )
        outer = (solution.value - truth).square().sum() / 2
        return Solved(solution, torch.autograd.grad(outer, leaf)[0])

    return solve


def multinomial(device: str) -> Callable[[], Solved]:
    """Cross-entropy of X W with a penalty for every feature, by L-BFGS."""
    generator = torch.Generator().manual_seed(0)
    X = (torch.randn(ROWS, FEATURES, generator=generator) / FEATURES**0.5).to(device)
    y = torch.randint(CLASSES, (ROWS,), generator=generator).to(device)
    log_penalties = (torch.randn(FEATURES, generator=generator) - 6).to(device)
    start = torch.zeros(FEATURES, CLASSES, device=device)

    def loss(W: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(X @ W, y)

    def solve() -> Solved:
        leaf = log_penalties.clone().requires_grad_()
        solution = il.argmin(
            loss,
            start,
            X,
            y,
            regularizer=il.Ridge(leaf.exp().unsqueeze(-1).expand(FEATURES, CLASSES)),
            solver=il.LBFGS(rtol=1e-3),
            adjoint=il.Implicit(il.CG(rtol=1e-3)),
        )
        outer = solution.value.square().sum() / 2
        return Solved(solution, torch.autograd.grad(outer, leaf)[0])

    return solve
