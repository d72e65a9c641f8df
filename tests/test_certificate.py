"""The certificate: what is said of an error, against the error."""

import math

import pytest
import torch
from torch.func import jacrev, jvp, vmap

import implicitlayers as il
from implicitlayers.certificate import Lanczos, adjoint_error
from tests.helpers.inexact import EXACT, GRADIENT, THETA, B, N, Q, V, conditioned, exponential, relative
from tests.helpers.linear import orthogonal
from tests.helpers.problems import F64, normal, product, quadratic, spd

# --- the smallest singular value ----------------------------------------------------------------------------


def test_the_trace_is_that_of_the_lanczos_matrix():
    alpha, beta = normal(6, 3, seed=1).exp(), normal(6, 3, seed=2).exp()
    lanczos = Lanczos.begin(alpha[0])
    for k in range(6):
        lanczos = lanczos.advance(alpha[k], beta[k])
        for lane in range(3):
            a, b = alpha[: k + 1, lane], beta[:k, lane]
            R = torch.diag(a.rsqrt()) + torch.diag((b / a[:-1]).sqrt(), 1)
            T = R.T @ R
            trace = (torch.linalg.inv(T) ** 2).sum()
            torch.testing.assert_close(lanczos.trace[lane], trace, rtol=1e-10, atol=0)
            assert lanczos.smallest()[lane] <= torch.linalg.eigvalsh(T)[0] * (1 + 1e-10)
    # A lane that does not move any more keeps what it knows.
    after = lanczos.advance(torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64))
    assert torch.equal(after.trace, lanczos.trace)


@pytest.mark.parametrize("decades", [0, 1, 4])
def test_conjugate_gradients_know_the_smallest_eigenvalue(decades):
    A = conditioned(12, decades)
    smallest = il.CG(rtol=1e-12).solve(il.Operator(product(A), symmetric=True), normal(12)).smallest.item()
    # From below, and at most by the square root of the number of eigenvalues that are as small.
    assert 10**-decades / 12**0.5 <= smallest <= 10**-decades * (1 + 1e-6)


def test_a_preconditioner_hides_the_spectrum():
    A = conditioned(12, 2)
    solver = il.CG(preconditioner=lambda r: 3 * r)
    assert solver.solve(il.Operator(product(A), symmetric=True), normal(12)).smallest.isnan()


@pytest.mark.parametrize("definite", [True, False])
def test_a_factorization_knows_the_smallest_singular_value(definite):
    A = torch.stack([conditioned(N, d, seed=d) for d in (0, 1, 3, 6)])
    if not definite:
        A = A @ orthogonal(N, seed=9)
    operator = il.Operator(product(A), symmetric=definite, positive_definite=definite)
    smallest = il.Dense().solve(operator, normal(4, N, seed=3)).smallest
    exact = torch.linalg.svdvals(A)[:, -1]
    assert (smallest >= exact * (1 - 1e-9)).all()
    assert (smallest <= 2 * exact).all()


# --- the adjoint's part -------------------------------------------------------------------------------------


def test_the_formula():
    residual, size = (
        torch.tensor([1e-3, 1e-3, 1e-3, 0.0], dtype=F64),
        torch.tensor([4.0, 4.0, 0.0, math.nan], dtype=F64),
    )
    sigma, largest = torch.tensor([0.1, 7.0, 0.1, 0.1], dtype=F64), torch.full((4,), torch.nan, dtype=F64)
    # ‖û‖ = 4‖v‖ rules out that A shrinks nothing by more than 7; û = 0 says nothing; v = 0 has no error.
    expected = torch.tensor([1e-3 / 0.4, 1e-3, torch.inf, 0], dtype=F64)
    torch.testing.assert_close(adjoint_error(residual, size, sigma, largest), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(adjoint_error(residual, size, None, largest)[0].item(), 1e-2, rtol=1e-10, atol=0)
    # In single precision the rounding of products with a matrix of norm 100 is more than this residual.
    rounding = adjoint_error(torch.tensor(0.0), torch.tensor(4.0), torch.tensor(0.1), torch.tensor(100.0))
    assert rounding.item() == pytest.approx(1000 * torch.finfo(torch.float32).eps, rel=1e-5)


def layer(A, b, adjoint, solver=None):
    solver = il.Newton(il.Dense()) if solver is None else solver
    return il.argmin(lambda x, b: quadratic(x, A, b), torch.zeros_like(b), b, solver=solver, adjoint=adjoint)


METHODS = {
    "CG": il.CG(rtol=1e-4),
    "preconditioned": il.CG(rtol=1e-4, preconditioner=il.Jacobi(exact=N)),
    "MINRES": il.MINRES(rtol=1e-4),
    "GMRES": il.GMRES(rtol=1e-4),
    "BiCGStab": il.BiCGStab(rtol=1e-4),
    "LSMR": il.LSMR(rtol=1e-4),
    "NormalCG": il.NormalCG(rtol=1e-4),
}


@pytest.mark.parametrize("linear_solver", METHODS.values(), ids=METHODS.keys())
def test_the_estimate_holds(linear_solver):
    A = torch.stack([conditioned(40, 4 * i / 29, seed=i) for i in range(30)])
    b = normal(30, 40, seed=5).requires_grad_()
    reports = []

    def lane(A, b):
        solution = layer(A, b, il.Implicit(linear_solver))
        reports.append(solution.adjoint)
        return solution.value

    v = normal(30, 40, seed=6)
    (g,) = torch.autograd.grad(vmap(lane)(A, b), b, v)
    exact = torch.linalg.solve(A, v.unsqueeze(-1)).squeeze(-1)
    true, estimate = (g - exact).norm(dim=-1) / g.norm(dim=-1), reports[0].error_estimate
    assert estimate.shape == (30,)
    assert estimate.isfinite().all()
    holds = (true <= estimate).double().mean()
    assert holds >= 0.95
    assert (estimate / true).median() < 40


def test_the_estimate_holds_for_what_rounding_leaves():
    A = torch.stack([conditioned(20, 4 * i / 29, seed=i) for i in range(30)]).float()
    b, v = normal(30, 20, seed=5).float(), normal(30, 20, seed=6).float()
    reports = []

    def lane(A, b):
        solution = layer(A, b, il.Implicit(il.Dense()), il.LBFGS(rtol=1e-3))
        reports.append(solution.adjoint)
        return solution.value

    _, g = vmap(lambda A, b, v: jvp(lambda b: lane(A, b), (b,), (v,)))(A, b, v)
    exact = torch.linalg.solve(A.double(), v.double().unsqueeze(-1)).squeeze(-1)
    true, estimate = (g - exact).norm(dim=-1) / g.norm(dim=-1), reports[0].error_estimate
    assert (true <= estimate).double().mean() >= 0.95
    assert (estimate / true).median() < 40
    assert estimate.max() < 0.1


def test_nothing_to_do_and_nothing_known():
    b = normal(N).requires_grad_()
    solution = layer(conditioned(N, 1), b, il.Implicit(il.CG()))
    torch.autograd.grad(solution.value, b, torch.zeros(N, dtype=F64))
    assert solution.adjoint.error_estimate.item() == 0
    # CG takes a step before it meets the negative direction.
    saddle = torch.diag(torch.tensor([1.0, -0.1], dtype=F64))
    b = torch.ones(2, dtype=F64, requires_grad=True)
    given = il.Given(torch.zeros(2, dtype=F64), rtol=None, atol=None)
    solution = layer(saddle, b, il.Implicit(il.CG(), on_failure="ignore"), given)
    (g,) = torch.autograd.grad(solution.value, b, torch.tensor([1.0, 0.5], dtype=F64))
    assert g.norm() > 0
    assert solution.adjoint.status.item() == il.Status.INDEFINITE
    assert solution.adjoint.error_estimate.item() == torch.inf


# --- the inner part -----------------------------------------------------------------------------------------


def off_by(error, adjoint, objective=exponential, exact=EXACT):
    away = normal(N, seed=8)
    x = exact + error * exact.norm() * away / away.norm()
    b = B.clone().requires_grad_()
    given = il.Given(x, rtol=None, atol=None)
    solution = il.argmin(objective, x, b, solver=given, adjoint=adjoint, on_failure="ignore")
    return torch.autograd.grad(solution.value, b, V)[0], solution


@pytest.mark.parametrize("error", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("linear_solver", [il.Dense(), il.CG(rtol=1e-12)], ids=["dense", "cg"])
def test_an_inexact_solution_is_accounted_for(error, linear_solver):
    g, solution = off_by(error, il.Implicit(linear_solver, gradient_tol=math.inf))
    true = relative(g, GRADIENT)
    # Exact to first order in the error, but for the quarter that is added for the second.
    assert solution.adjoint.inner_error.item() == pytest.approx(1.25 * true, rel=10 * error + 1e-4)
    assert solution.adjoint.error_estimate >= solution.adjoint.inner_error
    assert solution.adjoint.status.item() == il.Status.CONVERGED


def test_a_constant_curvature_knows_no_inner_error():
    A = spd(N)
    _, solution = off_by(
        1e-1, il.Implicit(il.Dense(), gradient_tol=math.inf), lambda x, b: quadratic(x, A, b), torch.linalg.solve(A, B)
    )
    assert solution.adjoint.inner_error.item() < 1e-13


def test_before_a_derivative_the_error_is_that_of_the_solution_or_of_its_own_adjoint():
    b, error = torch.full((N,), 1.1, dtype=F64), 1e-5 * normal(N, seed=8)
    adjoint = il.Implicit(il.Dense(), gradient_tol=math.inf)

    def inner(objective, exact):
        x = exact + error
        given = il.Given(x, rtol=None, atol=None)
        return il.argmin(objective, x, b, solver=given, adjoint=adjoint).adjoint.inner_error.item()

    A = spd(N)
    exact = torch.linalg.solve(A, b)
    assert inner(lambda x, b: quadratic(x, A, b), exact) == pytest.approx(
        (error.norm() / exact.norm()).item(), rel=1e-3
    )
    # The curvature here is 30 b, and its relative change 30 times that of x.
    steep = 1 + b.log() / 30
    expected = 1.25 * 30 * (error * error).norm() / error.norm()
    assert inner(lambda x, b: (30 * (x - 1)).exp().sum() / 30 - b @ x, steep) == pytest.approx(
        expected.item(), rel=1e-2
    )


def test_the_transposed_system_of_an_equation():
    M, t = torch.tensor([[0.0, 2.0], [0.1, 0.0]], dtype=F64), torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)

    def equation(x, t):
        return x + (M @ x) ** 2 - t

    def jacobian(x):
        return torch.eye(2, dtype=F64) + 2 * (M @ x)[:, None] * M

    exact = il.root(equation, torch.zeros(2, dtype=F64), t, solver=il.Newton(rtol=1e-14)).value.detach()
    x, v = exact + torch.tensor([1e-5, 2e-5], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)
    adjoint = il.Implicit(il.Dense(), gradient_tol=math.inf)
    given = il.Given(x, rtol=None, atol=None)
    solution = il.root(equation, x, t, solver=given, adjoint=adjoint)
    (g,) = torch.autograd.grad(solution.value, t, v)
    true = relative(g, torch.linalg.solve(jacobian(exact).T, v))
    assert solution.adjoint.inner_error.item() == pytest.approx(1.25 * true, rel=1e-3)
    other = relative(torch.linalg.solve(jacobian(x), v), torch.linalg.solve(jacobian(exact), v))
    assert abs(other - true) > 0.1 * true  # so that the two directions are told apart


def test_every_row_of_a_jacobian_has_its_own_error():
    reports = []

    def value(b):
        start = EXACT + 1e-3
        adjoint = il.Implicit(il.Dense(), gradient_tol=math.inf)
        solver = il.Given(start, rtol=None, atol=None)
        solution = il.argmin(exponential, start, b, solver=solver, adjoint=adjoint)
        reports.append(solution.adjoint)
        return solution.value

    J = jacrev(value)(B)
    exact = Q.T @ (Q / THETA[:, None])
    true = (J - exact).norm(dim=-1) / J.norm(dim=-1)
    torch.testing.assert_close(reports[0].inner_error, 1.25 * true, rtol=0.02, atol=0)
    (_, dx), report = jvp(value, (B,), (V,)), reports[-1]
    assert relative(dx, GRADIENT) == pytest.approx(report.inner_error.item() / 1.25, rel=0.02)
