"""First and second derivatives with every linear solver: by the implicit function theorem and recorded."""

import pytest
import torch
from torch.func import hessian, jacfwd, jacrev

import implicitlayers as il
from tests.helpers.linear import assert_near, operator
from tests.helpers.problems import (
    F64,
    coupled,
    newton,
    normal,
    product,
    proximal_solution,
    quadratic,
    spd,
)

SOLVERS = {
    "CG": il.CG(rtol=1e-11),
    "MINRES": il.MINRES(rtol=1e-11),
    "GMRES": il.GMRES(rtol=1e-11),
    "BiCGStab": il.BiCGStab(rtol=1e-11),
    "NormalCG": il.NormalCG(rtol=1e-11),
    "LSMR": il.LSMR(rtol=1e-11),
    "Neumann": il.Neumann(steps=1000, step_size=0.2, rtol=1e-11, atol=0.0),
    "Dense": il.Dense(),
    "Auto": il.Auto(rtol=1e-11),
    "CG, Jacobi": il.CG(rtol=1e-11, preconditioner=il.Jacobi()),
    "MINRES, Nystrom": il.MINRES(rtol=1e-11, preconditioner=il.Nystrom(2)),
    "GMRES, Nystrom": il.GMRES(rtol=1e-11, preconditioner=il.Nystrom(2)),
    "BiCGStab, Jacobi": il.BiCGStab(rtol=1e-11, preconditioner=il.Jacobi(exact=0)),
}
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@every
def test_implicit_first_and_second_derivative_of_a_closed_form(solver):
    A, b, theta = spd(3), normal(3), normal(3, seed=1)
    lam = torch.tensor(0.7, dtype=F64)

    def layer(lam):
        regularizer = il.Proximal(anchor=theta, lam=lam)
        adjoint = il.Implicit(solver, on_failure="raise")
        start = torch.zeros(3, dtype=F64)
        return il.argmin(quadratic, start, A, b, regularizer=regularizer, solver=il.Newton(), adjoint=adjoint).value

    def closed(lam):
        return proximal_solution(A, b, lam, theta)

    assert_near(jacrev(layer)(lam), jacrev(closed)(lam), 1e-9)
    assert_near(jacfwd(layer)(lam), jacrev(closed)(lam), 1e-9)
    assert_near(jacrev(jacrev(layer))(lam), hessian(closed)(lam), 1e-8)


@every
def test_implicit_against_a_newton_oracle_and_on_lanes(solver):
    start, theta = torch.zeros(2, dtype=F64), normal(2, 3)

    def layer(theta):
        adjoint = il.Implicit(solver, on_failure="raise")
        return il.argmin(coupled, start, theta, solver=il.Newton(rtol=1e-12), adjoint=adjoint).value

    def oracle(theta):
        return newton(coupled, start, theta)

    assert_near(jacrev(layer)(theta[0]), jacrev(oracle)(theta[0]), 1e-8)
    together = torch.vmap(jacrev(layer))(theta)
    assert_near(together, torch.stack([jacrev(oracle)(each) for each in theta]), 1e-8)
    report = il.argmin(coupled, start, theta[0].requires_grad_(), adjoint=il.Implicit(solver))
    report.value.sum().backward()
    assert report.adjoint.status.item() == il.Status.CONVERGED
    assert report.adjoint.residual.item() < 1e-10


FIXED = {
    "CG": il.CG(rtol=None, atol=None, max_steps=5),
    "MINRES": il.MINRES(rtol=None, atol=None, max_steps=5),
    "GMRES": il.GMRES(rtol=None, atol=None, max_steps=5),
    "BiCGStab": il.BiCGStab(rtol=None, atol=None, max_steps=5),
    "NormalCG": il.NormalCG(rtol=None, atol=None, max_steps=5),
    "LSMR": il.LSMR(rtol=None, atol=None, max_steps=5),
    "Neumann": il.Neumann(steps=200, step_size=0.2),
    "Cholesky": il.Dense(),
}
recorded = pytest.mark.parametrize("solver", FIXED.values(), ids=FIXED.keys())


@recorded
def test_recorded_steps_differentiate_to_the_derivatives_of_the_solution(solver):
    b, B = normal(3), spd(3)

    def layer(t):
        A = B + t * torch.diag(torch.arange(3, dtype=F64))
        given = operator(A, symmetric=True, positive_definite=isinstance(solver, il.Dense))
        return solver.solve(given, b * t).x

    def direct(t):
        return torch.linalg.solve(B + t * torch.diag(torch.arange(3, dtype=F64)), b * t)

    t = torch.tensor(0.8, dtype=F64)
    assert_near(layer(t), direct(t), 1e-12)
    assert_near(jacrev(layer)(t), jacrev(direct)(t), 1e-10)
    assert_near(jacfwd(layer)(t), jacrev(direct)(t), 1e-10)
    assert_near(jacrev(jacrev(layer))(t), hessian(direct)(t), 1e-8)


@recorded
def test_nothing_becomes_nan_at_zero(solver):
    # A lane without a right-hand side, as at a converged Newton step, beside one that has one.
    A = spd(3).expand(2, 3, 3).clone().requires_grad_()
    b = torch.stack([torch.zeros(3, dtype=F64), normal(3)]).requires_grad_()
    given = il.Operator(product(A), symmetric=True, apply_transpose=product(A.mT))
    x = solver.solve(given, b).x
    for derivative in torch.autograd.grad(x.sum(), (A, b)):
        assert derivative.isfinite().all()
    (with_respect_to_b,) = torch.autograd.grad(solver.solve(given, b).x.sum(), b)
    assert_near(with_respect_to_b[1], torch.linalg.solve(spd(3), torch.ones(3, dtype=F64)), 1e-10)


@recorded
def test_unrolled_newton(solver):
    start, theta = torch.zeros(2, dtype=F64), normal(3)
    if isinstance(solver, il.Neumann):
        # The curvature is 6 to 7 at the solution and larger before: a shorter step, and fewer terms to record.
        solver = il.Neumann(steps=40, step_size=0.1)
    fixed = il.Newton(linear_solver=solver, rtol=None, atol=None, max_steps=7)

    def layer(theta):
        return il.argmin(coupled, start, theta, solver=fixed, adjoint=il.Unrolled()).value

    expected = jacrev(lambda theta: newton(coupled, start, theta))(theta)
    assert_near(jacrev(layer)(theta), expected, 1e-8)
