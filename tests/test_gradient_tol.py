"""Solving until the gradient is good enough: `gradient_tol`."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import vmap

import implicitlayers as il
from implicitlayers.inexact import solve_to_error
from tests.helpers.inexact import EXACT, GRADIENT, B, N, Q, V, conditioned, exponential, relative
from tests.helpers.problems import F64, normal

LOOSE = {
    "LBFGS": il.LBFGS(rtol=1e-2),
    "Newton": il.Newton(rtol=1e-1),
    "best": il.BestSoFar(il.LBFGS(rtol=1e-2)),
    "Scipy": il.Scipy("BFGS", rtol=1e-2),
}


@pytest.mark.parametrize("gradient_tol", [1e-2, 1e-5])
@pytest.mark.parametrize("solver", LOOSE.values(), ids=LOOSE.keys())
def test_solver_and_linear_solver_go_on_until_the_gradient_is_good(solver, gradient_tol):
    b = B.clone().requires_grad_()
    start, linear_solver = torch.zeros(N, dtype=F64), il.CG(rtol=0.3)
    loose = il.argmin(exponential, start, b, solver=solver, adjoint=il.Implicit(linear_solver))
    assert relative(torch.autograd.grad(loose.value, b, V)[0], GRADIENT) > gradient_tol
    adjoint = il.Implicit(linear_solver, on_failure="raise")
    solution = il.argmin(exponential, start, b, solver=solver, adjoint=adjoint, gradient_tol=gradient_tol)
    (g,) = torch.autograd.grad(solution.value, b, V)
    assert relative(g, GRADIENT) <= solution.adjoint.error_estimate.item() <= gradient_tol
    assert relative(solution.value.detach(), EXACT) <= gradient_tol
    assert solution.status.item() == il.Status.CONVERGED
    assert solution.stats.steps > loose.stats.steps


def test_every_step_is_counted():
    b, start = B.clone().requires_grad_(), torch.zeros(N, dtype=F64)
    solver = il.Newton(rtol=1e-4)
    once = il.argmin(exponential, start, b, solver=solver).stats.steps
    tightened = il.argmin(exponential, start, b, solver=solver, gradient_tol=1e-9).stats.steps
    assert 4 <= once < tightened <= once + 3  # from 1e-4 on Newton's method needs two or three steps
    calls = []
    A = conditioned(30, 2)

    def apply(y):
        calls.append(1)
        return A @ y

    operator = il.Operator(apply, symmetric=True)
    solution, error = solve_to_error(il.CG(rtol=0.1), operator, normal(30), None, 1e-6)
    restarts = 3
    assert error.item() <= 1e-6
    assert len(calls) - restarts <= solution.steps.item() < len(calls)


def test_lanes_and_other_problems():
    t = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    options = {"gradient_tol": 1e-6}
    start = torch.tensor(1.5, dtype=F64)

    def cubic(t):
        return il.root(lambda x, t: t * x**3 - x - 2, start, t, solver=il.Newton(rtol=1e-1), **options).value

    def cosine(t):
        return il.fixed_point(lambda x, t: x.cos() + t, start, t, solver=il.Anderson(rtol=1e-1), **options).value

    def fit(t):
        return il.least_squares(
            lambda x, t: x.exp() - t, start, t, solver=il.LevenbergMarquardt(rtol=1e-1), **options
        ).value

    theta = t[0].detach().requires_grad_()
    for solution in (
        il.root(lambda x, t: t * x**3 - x - 2, start, theta, **options),
        il.fixed_point(lambda x, t: x.cos() + t, start, theta, **options),
        il.least_squares(lambda x, t: x.exp() - t, start, theta, **options),
    ):
        torch.autograd.grad(solution.value, theta)
        assert solution.adjoint.inner_error <= solution.adjoint.error_estimate <= 1e-6
    # The adjoint u = 1/F′ is what is certified, here with ∂F/∂t that depends on x for the cubic alone.
    for f, derivative in (
        (cubic, lambda x, t: -(x**3) / (3 * t * x**2 - 1)),
        (cosine, lambda x, t: 1 / (1 + x.sin())),
        (fit, lambda x, t: 1 / t),
    ):
        x = vmap(f)(t)
        (g,) = torch.autograd.grad(x.sum(), t)
        torch.testing.assert_close(g, derivative(x, t).detach(), rtol=4e-6, atol=0)


def test_what_cannot_be_reached_is_said():
    b = B.float().requires_grad_()

    def objective(x, b):
        return (Q.float() @ x).exp().sum() - b @ x

    start = torch.zeros(N)
    with pytest.raises(il.SolveError, match=r"(?s)estimated relative error of .*STALLED"):
        il.argmin(objective, start, b, solver=il.LBFGS(rtol=1e-4), gradient_tol=1e-9)
    adjoint = il.Implicit(il.CG(rtol=1e-4), on_failure="raise", gradient_tol=1e-9)
    solution = il.argmin(objective, start, b, solver=il.LBFGS(rtol=1e-4), adjoint=adjoint, on_failure="ignore")
    assert solution.status.item() == il.Status.STALLED
    assert 1e-9 < solution.adjoint.inner_error.item() < 1e-2
    with pytest.raises(il.AdjointError, match=r"gradient_tol=1e-09 \(estimated relative error [0-9.e-]+\)"):
        torch.autograd.grad(solution.value, b, V.float())
    assert solution.adjoint.status.item() == il.Status.STALLED


def test_measuring_changes_nothing():
    b = B.clone().requires_grad_()
    for solver in (il.LBFGS(rtol=1e-2), il.GradientDescent(lr=0.5, rtol=None, atol=None, max_steps=7)):
        plain = il.argmin(exponential, torch.zeros(N, dtype=F64), b, solver=solver)
        measured = il.argmin(exponential, torch.zeros(N, dtype=F64), b, solver=solver, gradient_tol=math.inf)
        assert torch.equal(plain.value, measured.value)
        assert torch.equal(plain.status, measured.status)
        ours, expected = (torch.autograd.grad(s.value, b, V)[0] for s in (measured, plain))
        assert torch.equal(ours, expected)
        assert measured.adjoint.inner_error.item() > 0


def test_the_warm_start_survives():
    adjoint = il.Implicit(il.CG(rtol=1e-10), warm_start=True)
    steps = []
    for _ in range(2):
        b = B.clone().requires_grad_()
        start = torch.zeros(N, dtype=F64)
        solution = il.argmin(exponential, start, b, solver=il.Newton(), adjoint=adjoint, gradient_tol=1e-4)
        torch.autograd.grad(solution.value, b, V)
        steps.append(solution.adjoint.steps.item())
    assert steps[1] < steps[0]
    assert replace(adjoint, damping=0.0) == adjoint


MISUSES = {
    "adjoint": ({"adjoint": il.Unrolled(), "gradient_tol": 1e-3}, ["only the error of an implicit", "Implicit("]),
    "sign": ({"gradient_tol": -1.0}, ["gradient_tol=-1.0", "positive"]),
    "NaN": ({"gradient_tol": math.nan}, ["positive"]),
    "fixed solver": (
        {"gradient_tol": 1e-3, "solver": il.LBFGS(rtol=None, atol=None)},
        ["LBFGS that runs a fixed number", "math.inf"],
    ),
    "fixed linear solver": (
        {"gradient_tol": 1e-3, "adjoint": il.Implicit(il.CG(rtol=None, atol=None))},
        ["CG that runs a fixed number", "rtol"],
    ),
}


@pytest.mark.parametrize(("options", "parts"), MISUSES.values(), ids=MISUSES.keys())
def test_misuse(options, parts):
    with pytest.raises(il.MisuseError) as caught:
        il.argmin(exponential, torch.zeros(N, dtype=F64), B, **options)
    assert all(part in str(caught.value) for part in parts)
