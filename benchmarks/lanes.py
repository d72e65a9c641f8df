"""How much does it gain to solve many small problems in one call?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.device import keep_freed_memory
from benchmarks.report import Report, fastest_seconds

LANES = (1, 4, 16, 64, 256, 1024, 4096)
ROWS, FEATURES = 100, 20
TOLERANCE = 1e-6
# More than a few are not needed to know what a loop over more of them takes.
LONGEST_LOOP = 8


class Problems(NamedTuple):
    """Logistic regressions with a penalty for every feature, all with a leading lane dimension.

    Attributes:
        X: ``[lanes, ROWS, FEATURES]``.
        y: ``[lanes, ROWS]``, 0 or 1.
        log_penalties: ``[lanes, FEATURES]``.
    """

    X: Tensor
    y: Tensor
    log_penalties: Tensor


def run(device: str, repeats: int) -> Report:
    """Time values and hypergradients of 1 … 4096 problems at once, and of a loop over them.

    Args:
        device: where to run.
        repeats: timed runs of each; the fastest counts, because what else the machine does only slows it.
    """
    keep_freed_memory()
    rows = [_row(lanes, device, repeats) for lanes in LANES]
    each = {row["lanes"]: row["µs a lane"] for row in rows}
    many = max((lanes for lanes in LANES if lanes <= 1024), default=LANES[-1])
    extra, same = _with_a_failure(min(256, LANES[-1]), device, repeats)
    at_256 = next((row["ms"] for row in rows if row["lanes"] == 256), float("nan"))
    return Report(
        f"logistic regression, {FEATURES} features, {ROWS} rows, float64, ‖∇f‖ ≤ {TOLERANCE:g}: values and "
        "hypergradients by Newton's method with Dense",
        rows,
        f"from {LANES[0]} to {many} lanes the time of a lane falls {each[LANES[0]] / each[many]:.0f} times (must: 50); "
        f"256 lanes take {at_256:.1f} ms (jitted JAX took 17 ms where a 2048³ product runs at 169 GFLOP/s; here: "
        f"{_speed(device, repeats):.0f}); a lane that fails makes the others {extra:.2f} times as slow and leaves "
        f"{'every bit of' if same else 'NOT every bit of'} their values and gradients",
    )


def _row(lanes: int, device: str, repeats: int) -> dict[str, Any]:
    problems = _given(lanes, device)
    looped = Problems(*(t[:LONGEST_LOOP] for t in problems))
    seconds = fastest_seconds(
        {"lanes": lambda: solve(problems), "loop": lambda: _loop(looped)}, device, repeats + (lanes < 64) * 4 * repeats
    )
    w, _ = solve(problems)
    slopes = torch.vmap(torch.func.grad(objective))(w, *problems)
    loop = seconds["loop"] * lanes / len(looped.y)
    return {
        "lanes": lanes,
        "ms": 1e3 * seconds["lanes"],
        "µs a lane": 1e6 * seconds["lanes"] / lanes,
        "loop ms": 1e3 * loop,
        "loop / lanes": loop / seconds["lanes"],
        "largest ‖∇f‖": slopes.norm(dim=-1).max().item(),
    }


def objective(w: Tensor, X: Tensor, y: Tensor, log_penalties: Tensor) -> Tensor:
    """Mean logistic loss and the penalties."""
    z = X @ w
    return (F.softplus(z) - y * z).mean() + (log_penalties.exp() * w * w).sum() / 2


def solve(problems: Problems, along: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The weights, and the gradient of Σ sin w with respect to the log-penalties, of all lanes in one call."""
    leaf = problems.log_penalties.clone().requires_grad_()
    w = (along or torch.vmap(_layer))(problems.X, problems.y, leaf)
    return w.detach(), torch.autograd.grad(w.sin().nansum(), leaf)[0]


def _layer(X: Tensor, y: Tensor, log_penalties: Tensor) -> Tensor:
    solver = il.Newton(il.Dense(), rtol=0.0, atol=TOLERANCE)
    start = torch.zeros_like(log_penalties.detach())
    adjoint = il.Implicit(il.Dense(), on_failure="ignore")
    return il.argmin(objective, start, X, y, log_penalties, solver=solver, adjoint=adjoint, on_failure="ignore").value


def _loop(problems: Problems) -> tuple[Tensor, Tensor]:
    return solve(problems, lambda *batch: torch.stack([_layer(*one) for one in zip(*batch, strict=True)]))


def _with_a_failure(lanes: int, device: str, repeats: int) -> tuple[float, bool]:
    """The time with one lane whose data are not finite over that without, and whether the others are the same bits."""
    good = _given(lanes, device)
    X = good.X.clone()
    X[0, 0, 0] = torch.nan
    bad = good._replace(X=X)
    seconds = fastest_seconds({"good": lambda: solve(good), "bad": lambda: solve(bad)}, device, repeats)
    same = all(torch.equal(a[1:], b[1:]) for a, b in zip(solve(good), solve(bad), strict=True))
    return seconds["bad"] / seconds["good"], same


def _speed(device: str, repeats: int) -> float:
    """GFLOP/s of a product of two matrices of 2048 rows in float32."""
    A = torch.randn(2048, 2048, device=device)
    return 2 * 2048**3 / fastest_seconds({"product": lambda: A @ A}, device, repeats)["product"] / 1e9


def _given(lanes: int, device: str) -> Problems:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X, w, log_penalties = normal(lanes, ROWS, FEATURES), normal(lanes, FEATURES, 1), normal(lanes, FEATURES)
    chances = torch.rand(lanes, ROWS, generator=generator, dtype=torch.float64)
    y = (torch.sigmoid((X @ w).squeeze(-1)) > chances).double()
    return Problems(X.to(device), y.to(device), log_penalties.to(device))
