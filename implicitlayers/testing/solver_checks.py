"""Checks of the parts a layer is made of: forward solvers and adjoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import vmap

import implicitlayers as il
from implicitlayers.testing import strategies
from implicitlayers.testing.checks import Checked, examine, run_property
from implicitlayers.testing.compare import Mode
from implicitlayers.testing.gradients import MODES, TOLERANCES, expect_tolerance
from implicitlayers.testing.metamorphic import attempted, equal, error_falls
from implicitlayers.testing.report import Comparison, GradientReport, combined
from implicitlayers.testing.strategies import Problem
from implicitlayers.testing.strategies.tensors import expect_strategy
from implicitlayers.testing.vectors import generator, normal_like

__all__ = ["altered", "check_adjoint", "check_solver", "claim", "expect"]

F64 = torch.float64


def expect(what: str, given: Any, kind: type) -> None:
    """Raise a TypeError that says what to pass."""
    if isinstance(given, type) and issubclass(given, kind):
        raise TypeError(f"{what} is the class {given.__name__}; pass an instance, {given.__name__}(...).")
    if not isinstance(given, kind):
        raise TypeError(f"{what} is {given!r}, which is no {kind.__name__}; pass one of the library's or your own.")


def claim(what: str, holds: bool, reason: str) -> Comparison:
    """A comparison of a truth value."""
    return Comparison(what, "what it should be", "agree" if holds else "disagree", reason="" if holds else reason)


def altered(config: Any, **fields: Any) -> Any | None:
    """A configuration with other fields, or None where it has no such fields."""
    if not dataclasses.is_dataclass(config) or not set(fields) <= {f.name for f in dataclasses.fields(config)}:
        return None
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def check_solver(
    solver: il.Solver[Any],
    *,
    problems: SearchStrategy[Problem] | None = None,
    dtype: torch.dtype = F64,
    tol: float | None = None,
    max_examples: int | None = None,
) -> Checked:
    """Check a forward solver on problems with known answers.

    It finds the answer and says CONVERGED; it finds the same one from another start; a tighter tolerance does not make
    the answer worse; it does not say CONVERGED after one step unless it has; and vmapped lanes are solved as if alone.

    Args:
        solver: with a tolerance that `tol` can be met with.
        problems: what to solve; `strongly_convex_problems` by default. For solvers of roots and fixed points pass their
            problems, such as `strategies.contractions()`.
        dtype: of the default problems.
        tol: error of the answer, relative to its largest entry; by default 1000 times the solver's `rtol`, at least
            that of `assert_gradients_match`.
        max_examples: how many problems.

    Raises:
        GradientMismatch: with the smallest problem on which the solver fails.
        TypeError: `solver` is no solver.

    Examples:
        >>> check_solver(il.Newton(il.Dense(), rtol=1e-12), max_examples=5)
        Checked(examples=5, inconclusive=0)
    """
    expect("solver", solver, il.Solver)
    expect_tolerance(tol)
    if problems is None:
        problems = strategies.strongly_convex_problems(dtype=dtype)
    expect_strategy("problems", problems, "strategies.contractions()")
    tol = max(TOLERANCES[dtype], 1e3 * (solver.rtol or 0.0)) if tol is None else tol
    return run_property(problems, lambda p: GradientReport(tuple(_solver_claims(solver, p, tol))), max_examples)


def _solver_claims(solver: il.Solver[Any], problem: Problem, tol: float) -> Iterator[Comparison]:
    truth = problem.solution(*problem.params)
    name, params = f"{type(solver).__name__} on {problem.name}", problem.params
    size = max(float(truth.abs().max()), 1.0)

    def solve(x0: Tensor, *given: Tensor, by: il.Solver[Any] = solver) -> il.Solution:
        return problem.solve(x0, *given, solver=by, on_failure="ignore")

    def right(solution: il.Solution) -> bool:
        return bool(((solution.value - truth).abs() <= tol * size).all())

    found = solve(problem.x0, *params)
    yield equal(f"{name}, solution", "the known answer", [found.value], [truth], tol, size)
    status = il.Status(int(found.status))
    # Rounding may stop a tolerance that is close to it; the answer above is then what counts.
    fine = {il.Status.CONVERGED, il.Status.STALLED} if solver.looks else {il.Status.NOT_CHECKED}
    yield claim(f"{name}, status", status in fine, f"{status.name}: {status.meaning}. Try: {status.remedy}.")
    other = solve(problem.x0 + 0.5, *params).value
    yield equal(f"{name}, from another start", "the known answer", [other], [truth], tol, size)
    hasty = altered(solver, max_steps=1)
    if solver.looks and hasty is not None:
        early = solve(problem.x0, *params, by=hasty)
        honest = int(early.status) != il.Status.CONVERGED or right(early)
        yield claim(f"{name}, status after one step", honest, "CONVERGED, and it has not.")

    def at(tolerance: float) -> Any:
        loose = dataclasses.replace(solver, rtol=max(tolerance, solver.rtol or 0.0))  # type: ignore[type-var]
        return lambda: [solve(problem.x0, *params, by=loose).value]

    if solver.looks and altered(solver, rtol=1e-3) is not None:
        yield from error_falls(at, (1e-1, 1e-3, 1e-5, 1e-7, 0.0), [truth], tol)

    def solved(*given: Any) -> Tensor:
        return solve(problem.x0, *given).value

    def lanes() -> Comparison:
        stacked = [torch.stack([p, p * (1 + 1 / 32)]) for p in params]
        values = vmap(solved)(*stacked)
        alone = [solved(*(p[k] for p in stacked)) for k in range(2)]
        return equal(f"{name}, two lanes", "one after the other", [values], [torch.stack(alone)], tol, size)

    yield attempted(f"{name}, two lanes", lanes)


def check_adjoint(
    adjoint: il.Adjoint,
    *,
    solver: il.Solver[Any] | None = None,
    problems: SearchStrategy[Problem] | None = None,
    order: Literal[1, 2] = 2,
    modes: Sequence[Mode] = MODES,
    dtype: torch.dtype = F64,
    tol: float | None = None,
    max_examples: int | None = None,
) -> Checked:
    """Check a way to differentiate on problems whose derivatives are known.

    First and second derivatives against the known ones and against finite differences, in all modes, and the properties
    of `check_layer`.

    Args:
        adjoint: as for `implicitlayers.argmin`.
        solver: how to solve; by default Newton's method to rounding, so that the derivative is what is tested.
        problems: what to solve; `strongly_convex_problems` by default.
        order: 1 for adjoints that are right to first order only.
        modes: as in `assert_gradients_match`.
        dtype: of the default problems.
        tol: as in `assert_gradients_match`.
        max_examples: how many problems.

    Raises:
        GradientMismatch: with the smallest problem on which the derivative is wrong.
        InconclusiveGradients: most problems said nothing.
        TypeError: `adjoint` is no adjoint.

    Examples:
        >>> check_adjoint(il.Implicit(il.Dense()), order=1, max_examples=3)
        Checked(examples=3, inconclusive=0)
    """
    expect("adjoint", adjoint, il.Adjoint)
    expect_tolerance(tol)
    rtol = 1e-13 if dtype == F64 else 1e-6
    forward = il.Newton(il.Dense(), rtol=rtol, atol=rtol) if solver is None else solver
    if problems is None:
        problems = strategies.strongly_convex_problems(dtype=dtype)
    expect_strategy("problems", problems, "strategies.contractions()")
    bound = TOLERANCES[dtype] if tol is None else tol

    def examine_one(problem: Problem) -> GradientReport:
        def layer(*params: Tensor) -> Tensor:
            x0 = problem.x0.to(params[0])
            return problem.solve(x0, *params, solver=forward, adjoint=adjoint, on_failure="ignore").value

        known = GradientReport(tuple(_known_derivatives(layer, problem, order, bound)))
        return combined([known, examine(layer, problem.params, order=order, modes=modes, tol=bound)])

    return run_property(problems, examine_one, max_examples)


def _known_derivatives(layer: Any, problem: Problem, order: int, tol: float) -> Iterator[Comparison]:
    """Gradients of ⟨v, x*⟩, and products of its Hessian, against those of the known answer."""
    double = [p.double() for p in problem.params]

    def derivatives(f: Any, params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = [p.detach().clone().requires_grad_() for p in params]
        x = f(*given)
        v, *w = normal_like([x, *given], generator(0))
        first = torch.autograd.grad((x * v).sum(), given, create_graph=order == 2)
        if order == 1:
            return list(first), []
        along = torch.stack([(g * d).sum() for g, d in zip(first, w, strict=True)]).sum()
        second = torch.autograd.grad(along, given, allow_unused=True)
        return [g.detach() for g in first], [
            torch.zeros_like(p) if g is None else g for p, g in zip(given, second, strict=True)
        ]

    def compare(which: int, what: str) -> Comparison:
        found, expected = derivatives(layer, problem.params)[which], derivatives(problem.solution, double)[which]
        size = max(float(t.abs().max()) for t in expected)
        return equal(f"{what} derivative", f"the known one of {problem.name}", found, expected, tol, max(size, 1e-3))

    yield attempted("first derivative", lambda: compare(0, "first"))
    if order == 2:
        yield attempted("second derivative", lambda: compare(1, "second"))
