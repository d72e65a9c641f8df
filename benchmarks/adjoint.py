"""How many products, and how long, does an accurate adjoint take, and what do preconditioners and a warm start save?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import implicitlayers as il
from benchmarks.report import Report, median_seconds

N = 400
CONDITIONS = (1e2, 1e4)
# The largest take a minute each.
ALL_CONDITIONS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
ACCURACY = 1e-6
RANK = MEMORY = 40
# The outer step after which the adjoint is solved again from the last one.
DRIFT = 1e-3


@dataclass(frozen=True)
class Curvature:
    """A symmetric positive definite A, with the cotangent of one outer step and of the next.

    Attributes:
        A: ``[n, n]``.
        v: ``[n]``.
        next_v: v after an outer step, ‖next_v - v‖ = DRIFT·‖v‖.
        pairs: steps and changes of the gradient of L-BFGS on the quadratic with curvature A.
    """

    A: Tensor
    v: Tensor
    next_v: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]


def run(device: str, repeats: int) -> Report:
    """Count steps and measure time to an adjoint that is right to 1e-6, at two condition numbers.

    Three spectra with the same condition number: eigenvalues spread evenly on a logarithmic scale ("spread"), 30 of
    them so spread above a floor where the others lie ("outliers": a low-rank data matrix plus a ridge), and a
    well-conditioned matrix whose unknowns have different units ("scaled").

    Args:
        device: where to run.
        repeats: timed runs of each.
    """
    return _report(CONDITIONS, device, repeats)


def run_in_full(device: str, repeats: int) -> Report:
    """The same at every power of ten up to a million.

    Args:
        device: where to run.
        repeats: timed runs of each.
    """
    return _report(ALL_CONDITIONS, device, repeats)


def _report(conditions: Sequence[float], device: str, repeats: int) -> Report:
    rows = [row for kind in SPECTRA for condition in conditions for row in _measure(kind, condition, device, repeats)]
    wins = []
    for kind, name in (("scaled", "Jacobi"), ("outliers", "Nyström")):
        best = [_best(row) for row in rows if (row["spectrum"], row["measure"]) == (kind, "steps")]
        wins.append(f"{name} in {best.count(name)} of {len(conditions)} ({kind})")
    return Report(
        f"steps of CG to an adjoint with an error of at most {ACCURACY:g}, and their time; n = {N}, float64. "
        f"Nyström's {RANK} products are not counted but timed; L-BFGS has {MEMORY} pairs; warm: from the last adjoint, "
        f"after the cotangent moved by {DRIFT:g}. *: stopped before that accuracy",
        rows,
        f"fewest steps from cold: {'; '.join(wins)}",
    )


def _best(row: Mapping[str, Any]) -> str:
    return min(("plain", "Jacobi", "Nyström", "L-BFGS"), key=lambda name: int(row[name].rstrip("*")))


def _measure(kind: str, condition: float, device: str, repeats: int) -> list[dict[str, Any]]:
    """A row of steps, and one of milliseconds."""
    given = _curvature(kind, condition, device)
    exact, next_exact = torch.linalg.solve(given.A, torch.stack([given.v, given.next_v], -1)).unbind(-1)
    operator = il.Operator(lambda y: given.A @ y, symmetric=True, positive_definite=True)
    floor = torch.linalg.eigvalsh(given.A)[0].item()
    recipes: dict[str, il.Preconditioner | None] = {
        "plain": None,
        "Jacobi": il.Jacobi(exact=N),
        "Nyström": il.Nystrom(RANK, shift=floor if kind == "outliers" else 0.0),
        "L-BFGS": il.LBFGSPreconditioner(given.pairs),
    }
    found = {name: _to_accuracy(operator, given.v, None, exact, recipe) for name, recipe in recipes.items()}
    found["warm"] = _to_accuracy(operator, given.next_v, exact, next_exact, None)
    seconds = median_seconds({name: solve for name, (solve, _) in found.items()}, device, repeats)
    what = {"spectrum": kind, "κ": f"{condition:.0e}"}
    return [
        what | {"measure": "steps"} | {name: steps for name, (_, steps) in found.items()},
        what | {"measure": "ms"} | {name: f"{1e3 * taken:.1f}" for name, taken in seconds.items()},
    ]


def _to_accuracy(
    operator: il.Operator, v: Tensor, x0: Tensor | None, exact: Tensor, recipe: il.Preconditioner | None
) -> tuple[Callable[[], il.LinearSolution], str]:
    """The solve with the loosest tolerance, by factors of √10, that is right to the accuracy, and its steps.

    A star at the steps marks that none is.
    """
    # Prepared once for the search; what is timed prepares it again.
    prepared = None if recipe is None else recipe.prepare(operator, v)
    rtol = ACCURACY
    while True:
        found = il.CG(rtol=rtol, max_steps=20 * N, preconditioner=prepared).solve(operator, v, x0)
        reached = float((found.x - exact).norm() / exact.norm()) <= ACCURACY
        if reached or rtol < 1e-12:
            break
        rtol /= 10**0.5
    solver = il.CG(rtol=rtol, max_steps=20 * N, preconditioner=recipe)
    return lambda: solver.solve(operator, v, x0), f"{int(found.steps)}{'' if reached else '*'}"


def _spread(condition: float) -> Tensor:
    return torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=torch.float64)


def _outliers(condition: float) -> Tensor:
    top = torch.logspace(0, -torch.tensor(condition).log10().item(), 30, dtype=torch.float64)
    return torch.cat([top, top[-1:].expand(N - 30)])


SPECTRA: dict[str, Callable[[float], Tensor]] = {"spread": _spread, "outliers": _outliers, "scaled": _spread}


def _curvature(kind: str, condition: float, device: str) -> Curvature:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = SPECTRA[kind](condition)
    if kind == "scaled":
        G = normal(N, 4 * N)
        A = values.sqrt()[:, None] * (G @ G.T / (4 * N)) * values.sqrt()
    else:
        Q = torch.linalg.qr(normal(N, N))[0]
        A = (Q * values) @ Q.T
    A = ((A + A.T) / 2).to(device)
    v, drift = normal(N).to(device), normal(N).to(device)
    next_v = v + DRIFT * drift * v.norm() / drift.norm()
    return Curvature(A, v, next_v, _pairs(A, normal(N).to(device)))


def _pairs(A: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The last pairs of a forward solve of A x = b: on a quadratic L-BFGS with exact steps follows CG."""
    operator = il.Operator(lambda y: A @ y, symmetric=True)
    iterates = [torch.zeros_like(b)]
    for steps in range(1, MEMORY + 1):
        iterates.append(il.CG(rtol=None, atol=None, max_steps=steps).solve(operator, b).x)
    moves = [after - before for before, after in itertools.pairwise(iterates)]
    return tuple((s, A @ s) for s in moves)
