"""The check of a linear solver: what it returns, and what it says about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import implicitlayers as il
from implicitlayers.testing import strategies
from implicitlayers.testing.checks import Checked, run_property
from implicitlayers.testing.gradients import TOLERANCES, expect_tolerance
from implicitlayers.testing.metamorphic import attempted, equal, tiny_factor
from implicitlayers.testing.quotients import contract
from implicitlayers.testing.report import Comparison, GradientReport
from implicitlayers.testing.solver_checks import altered, claim, expect
from implicitlayers.testing.strategies.tensors import expect_strategy

__all__ = ["check_linear_solver"]

F64 = torch.float64

SEVERAL = 12
"""Unknowns of the larger system."""


def check_linear_solver(
    solver: il.LinearSolver,
    *,
    matrices: SearchStrategy[Tensor] | None = None,
    dtype: torch.dtype = F64,
    tol: float | None = None,
    max_examples: int | None = None,
) -> Checked:
    """Check a linear solver on matrices that it is for.

    It solves A x = b and says CONVERGED, also from a start far away and for a dozen unknowns; it is linear in b, down
    to b whose square underflows and up to b whose square overflows; its transposed solve passes the dot test
    ⟨c, A⁻¹b⟩ = ⟨A⁻ᵀc, b⟩; b = 0 gives 0, and a b without dimensions an error if not the answer; a gradient flows from
    the solution to b; a batch is a loop, also when one lane of it is NaN, and each lane has a status of its own; and it
    does not say CONVERGED for a singular system, nor after one step unless it has.

    Args:
        solver: with a tolerance that `tol` can be met with.
        matrices: strategy for ``[n, n]`` tensors; by default `spd_matrices` for solvers that need symmetric ones, and
            `matrices` as well for the others.
        dtype: of the default matrices.
        tol: relative error; by default 1000 times the solver's `rtol`, at least that of `assert_gradients_match`.
        max_examples: how many systems.

    Raises:
        GradientMismatch: with the smallest system on which the solver fails.
        TypeError: `solver` is no linear solver.

    Examples:
        >>> check_linear_solver(il.CG(rtol=1e-12), max_examples=5)
        Checked(examples=5, inconclusive=0)
    """
    expect("solver", solver, il.LinearSolver)
    expect_tolerance(tol)
    if matrices is None:
        matrices = strategies.spd_matrices(dtype=dtype)
        if not solver.requires_symmetric:
            matrices = matrices | strategies.matrices(dtype=dtype)
    expect_strategy("matrices", matrices, "strategies.spd_matrices()")
    rtol = getattr(solver, "rtol", None) or 0.0
    bound = max(TOLERANCES[dtype], 1e3 * rtol) if tol is None else tol
    systems = matrices.flatmap(lambda A: st.tuples(st.just(A), strategies.tensors((3, len(A)), dtype=dtype)))

    def examine_one(system: tuple[Tensor, Tensor]) -> GradientReport:
        return GradientReport(tuple(_linear_claims(solver, *system, bound)))

    return run_property(systems, examine_one, max_examples)


def operator_of(A: Tensor) -> il.Operator:
    """The operator of a matrix, which is found to be symmetric or not."""

    def apply(B: Tensor) -> Any:
        return lambda y: (B @ y.unsqueeze(-1)).squeeze(-1)

    symmetric = bool((A.mT == A).all())
    # A general matrix may be symmetric by chance, but then it need not be positive definite, which solvers hope for.
    indefinite = symmetric and bool((torch.linalg.eigvalsh(A.double()) <= 0).any())
    return il.Operator(apply(A), symmetric=symmetric, indefinite=indefinite, apply_transpose=apply(A.mT))


def _accepted(solver: il.LinearSolver) -> set[il.Status]:
    # Rounding may stop a tolerance that is close to it; whether the solution is right is compared on its own.
    return {il.Status.CONVERGED, il.Status.STALLED} if solver.looks else {il.Status.NOT_CHECKED}


def _linear_claims(solver: il.LinearSolver, A: Tensor, rows: Tensor, tol: float) -> Iterator[Comparison]:
    operator, name = operator_of(A), type(solver).__name__
    b, c, _ = rows
    inverse = torch.linalg.inv(A)
    size = float(torch.linalg.matrix_norm(inverse, 2)) * max(float(rows.norm(dim=1).max()), 1.0)
    found = solver.solve(operator, b)
    yield equal(f"{name}, solution", "a dense solve", [found.x], [inverse @ b], tol, size)
    status = il.Status(int(found.status))
    words = f"{status.name}: {status.meaning}. Try: {status.remedy}."
    yield claim(f"{name}, status", status in _accepted(solver), words)
    yield from _other_right_hand_sides(solver, operator, rows, found.x, tol, size)
    hasty = altered(solver, max_steps=1)
    if hasty is not None and solver.looks:
        early = hasty.solve(operator, b)
        close = bool(((early.x - inverse @ b).abs() <= tol * size).all())
        honest = int(early.status) != il.Status.CONVERGED or close
        yield claim(f"{name}, status after one step", honest, "CONVERGED, and it has not.")
    transposed = solver.solve(operator.T, c).x
    dots = [contract([found.x], [c], 1)], [contract([transposed], [b], 1)]
    yield equal(f"{name}, ⟨c, A⁻¹b⟩", "⟨A⁻ᵀc, b⟩", *dots, tol, size * max(float(rows.norm(dim=1).max()), 1.0))
    yield from _other_systems(solver, A, rows, inverse, tol, size)
    yield from _lanes_of_systems(solver, operator, rows, tol, size)
    yield from _singular_systems(solver, A, b)


def _other_right_hand_sides(
    solver: il.LinearSolver, operator: il.Operator, rows: Tensor, x: Tensor, tol: float, size: float
) -> Iterator[Comparison]:
    name, (b, c, _) = type(solver).__name__, rows
    xc = solver.solve(operator, c).x
    summed = solver.solve(operator, 2 * b - 3 * c).x
    yield equal(f"{name}, solution for 2b - 3c", "2A⁻¹b - 3A⁻¹c", [summed], [2 * x - 3 * xc], tol, 5 * size)
    epsilon = tiny_factor([b])
    for factor in (epsilon, 1 / epsilon):
        scaled = solver.solve(operator, factor * b).x.double() / factor
        yield equal(f"{name}, solution for b of size {factor:.0e}", "that for b", [scaled], [x], tol, size)
    zero = torch.zeros_like(b)
    yield equal(f"{name}, solution for b = 0", "0", [solver.solve(operator, zero).x], [zero], tol, 1.0)

    def scalar() -> Comparison:
        what, double = f"{name}, b without dimensions", il.Operator(lambda y: 2 * y, symmetric=True)
        try:
            half = solver.solve(double, c.new_ones(())).x
        except Exception as error:  # A right-hand side has a dimension: refused in whatever way is better than wrong.
            return claim(f"{what}: {type(error).__name__}", True, "")
        return equal(what, "half of it", [half], [half.new_full((), 0.5)], tol, 1.0)

    def connected() -> Comparison:
        given = torch.where((b == 0).all(), torch.ones_like(b), b).requires_grad_()
        with torch.enable_grad():
            traced = solver.solve(operator, given).x
        return claim(f"{name}, graph of the solution", traced.requires_grad, "No gradient flows from x to b.")

    yield attempted(f"{name}, b without dimensions", scalar)
    yield attempted(f"{name}, graph of the solution", connected)


def _other_systems(
    solver: il.LinearSolver, A: Tensor, rows: Tensor, inverse: Tensor, tol: float, size: float
) -> Iterator[Comparison]:
    name, (b, c, other) = type(solver).__name__, rows
    # Several times the same block: of the same kind and condition as A.
    blocks = torch.arange(1, -(-SEVERAL // len(A)) + 1, dtype=b.dtype, device=b.device)
    several = blocks[:, None] * b - c + 1

    def larger() -> Comparison:
        operator = operator_of(torch.block_diag(*[A] * len(blocks)))
        found = solver.solve(operator, several.flatten()).x
        expected, largest = (several @ inverse.mT).flatten(), size * max(float(several.norm()), 1.0)
        return equal(f"{name}, {len(found)} unknowns", "a dense solve", [found], [expected], tol, largest)

    def started() -> Comparison:
        x0 = 10 * other + 30
        found = solver.solve(operator_of(A), b, x0).x
        return equal(f"{name}, from a start far away", "a dense solve", [found], [inverse @ b], tol, size)

    yield attempted(f"{name}, {SEVERAL} unknowns", larger)
    if solver.looks:
        yield attempted(f"{name}, from a start far away", started)


def _lanes_of_systems(
    solver: il.LinearSolver, operator: il.Operator, rows: Tensor, tol: float, size: float
) -> Iterator[Comparison]:
    name = type(solver).__name__

    def batch() -> Comparison:
        alone = torch.stack([solver.solve(operator, row).x for row in rows])
        return equal(f"{name}, batch", "a loop", [solver.solve(operator, rows).x], [alone], tol, size)

    def broken() -> Comparison:
        poisoned = rows.clone()
        poisoned[1] = torch.nan
        alone = torch.stack([solver.solve(operator, rows[k]).x for k in (0, 2)])
        found = solver.solve(operator, poisoned).x[[0, 2]]
        return equal(f"{name}, beside a lane of NaN", "the same lanes alone", [found], [alone], tol, size)

    def said() -> Comparison:
        poisoned = rows.clone()
        poisoned[1] = torch.nan
        first, nan, last = (il.Status(int(status)) for status in solver.solve(operator, poisoned).status)
        fine = {first, last} <= _accepted(solver) and nan != il.Status.CONVERGED
        return claim(f"{name}, status of each lane", fine, f"{first.name}, {nan.name}, {last.name}; the second is NaN.")

    yield attempted(f"{name}, batch", batch)
    yield attempted(f"{name}, beside a lane of NaN", broken)
    yield attempted(f"{name}, status of each lane", said)


def _singular_systems(solver: il.LinearSolver, A: Tensor, b: Tensor) -> Iterator[Comparison]:
    """The last unknown enters no equation, and the last equation reads 0 = 1."""
    if not solver.looks:
        return
    singular, rhs = A.clone(), b.clone()
    singular[-1], singular[:, -1], rhs[-1] = 0, 0, 1
    status = il.Status(int(solver.solve(operator_of(singular), rhs).status))
    what = f"{type(solver).__name__}, status for a singular system"
    yield claim(what, status != il.Status.CONVERGED, "CONVERGED, but no x solves it.")
