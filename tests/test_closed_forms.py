"""Problems with known answers: the oracles agree with each other, and the layer with both."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers import problems
from tests.helpers.cases import ADJOINT, SOLVERS, TIGHT
from tests.helpers.problems import F64, each, newton, normal, spd

# Rounding times a condition number below ten, for problems of order one.
TOL = 1e-9
N, M = 3, 6
X, Y = normal(M, N, seed=1), normal(M, seed=2)
LAM = torch.tensor(0.3, dtype=F64)
WEIGHTS = normal(M, seed=3).square() + 0.5
NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)


def assert_near(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOL)


def zeros():
    return torch.zeros(N, dtype=F64)


def ridge(X, y, lam, solver=NEWTON):
    return il.argmin(problems.ridge_objective, zeros(), X, y, lam, solver=solver, adjoint=ADJOINT).value


def weighted(w, X, y):
    return il.argmin(problems.weighted_objective, zeros(), w, X, y, solver=NEWTON, adjoint=ADJOINT).value


def logarithm(theta):
    return il.argmin(problems.exponential, torch.zeros_like(theta), theta, solver=NEWTON, adjoint=ADJOINT).value


def test_the_oracles_agree_with_the_formulas():
    assert_near(jacrev(problems.ridge_solution, argnums=2)(X, Y, LAM), problems.ridge_dlam(X, Y, LAM))
    # Not jacfwd(jacfwd(.)): PyTorch's own linalg.solve loses half of the second derivative there.
    assert_near(
        jacrev(jacrev(problems.ridge_solution, argnums=2), argnums=2)(X, Y, LAM), problems.ridge_d2lam(X, Y, LAM)
    )
    assert_near(jacrev(problems.weighted_solution)(WEIGHTS, X, Y), problems.weighted_dw(WEIGHTS, X, Y))


def test_the_newton_oracle_agrees_with_the_closed_forms():
    def by_newton(lam):
        return newton(lambda w, lam: problems.ridge_objective(w, X, Y, lam), zeros(), lam, steps=1, recorded=2)

    assert_near(by_newton(LAM), problems.ridge_solution(X, Y, LAM))
    assert_near(jacrev(by_newton)(LAM), problems.ridge_dlam(X, Y, LAM))
    assert_near(jacfwd(jacfwd(by_newton))(LAM), problems.ridge_d2lam(X, Y, LAM))
    theta = torch.tensor([1.5, 2.0], dtype=F64)
    by_newton = lambda t: newton(problems.exponential, torch.zeros(2, dtype=F64), t)  # noqa: E731
    assert_near(jacrev(jacrev(by_newton))(theta), jacrev(jacrev(torch.log))(theta))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_ridge_in_its_strength(solver):
    def layer(lam):
        return ridge(X, Y, lam, solver)

    assert_near(layer(LAM), problems.ridge_solution(X, Y, LAM))
    assert_near(jacrev(layer)(LAM), problems.ridge_dlam(X, Y, LAM))
    assert_near(jacfwd(layer)(LAM), problems.ridge_dlam(X, Y, LAM))
    assert_near(jacfwd(jacfwd(layer))(LAM), problems.ridge_d2lam(X, Y, LAM))
    assert_near(jacrev(jacrev(layer))(LAM), problems.ridge_d2lam(X, Y, LAM))


def test_ridge_in_data_and_targets():
    for mode in (jacrev, jacfwd):
        ours = mode(ridge, argnums=(0, 1, 2))(X, Y, LAM)
        for mine, expected in zip(ours, jacrev(problems.ridge_solution, argnums=(0, 1, 2))(X, Y, LAM), strict=True):
            assert_near(mine, expected)


def test_ridge_mixed_second_derivatives():
    def total(f):
        return lambda y, lam: f(X, y, lam).sin().sum()

    ours, expected = (hessian(total(f), argnums=(0, 1))(Y, LAM) for f in (ridge, problems.ridge_solution))
    for mine, row in zip(ours, expected, strict=True):
        for block, truth in zip(mine, row, strict=True):
            assert_near(block, truth)


def test_weighted_least_squares_in_its_weights():
    assert_near(weighted(WEIGHTS, X, Y), problems.weighted_solution(WEIGHTS, X, Y))
    assert_near(jacrev(weighted)(WEIGHTS, X, Y), problems.weighted_dw(WEIGHTS, X, Y))
    assert_near(jacfwd(weighted)(WEIGHTS, X, Y), problems.weighted_dw(WEIGHTS, X, Y))
    total = lambda f: lambda w: f(w, X, Y).cos().sum()  # noqa: E731
    assert_near(hessian(total(weighted))(WEIGHTS), jacrev(jacrev(total(problems.weighted_solution)))(WEIGHTS))


def test_weighted_least_squares_over_many_weights():
    batch = normal(5, M, seed=4).square() + 0.5
    ours = vmap(weighted, in_dims=(0, None, None))(batch, X, Y)
    assert_near(ours, each(lambda w: problems.weighted_solution(w, X, Y), batch))
    ours = vmap(jacrev(weighted), in_dims=(0, None, None))(batch, X, Y)
    assert_near(ours, each(lambda w: problems.weighted_dw(w, X, Y), batch))


def test_derivatives_of_the_logarithm_up_to_the_fifth():
    theta = torch.tensor(1.7, dtype=F64)
    f, expected = (lambda t: logarithm(t.reshape(1)).sum()), theta.log()
    assert_near(f(theta), expected)
    for order, truth in enumerate([1 / theta, -(theta**-2), 2 * theta**-3, -6 * theta**-4], start=1):
        f = grad(f)
        torch.testing.assert_close(f(theta), truth, rtol=0, atol=TOL, msg=f"derivative of order {order}")


def test_quadratic_in_its_matrix():
    A, b = spd(N), normal(N, seed=5)

    def layer(A):
        return il.argmin(problems.quadratic, zeros(), A, b, solver=NEWTON, adjoint=ADJOINT).value

    # The objective sees the symmetric part of A, and so does its derivative.
    expected = jacrev(lambda A: torch.linalg.solve((A + A.T) / 2, b))(A)
    assert_near(jacrev(layer)(A), expected)
    assert_near(jacfwd(layer)(A), expected)


def himmelblau(x, theta):
    return (x[0] ** 2 + x[1] - theta[0]) ** 2 + (x[0] + x[1] ** 2 - theta[1]) ** 2


@pytest.mark.parametrize(
    ("start", "minimum"),
    [
        ((3.2, 1.8), (3.0, 2.0)),
        ((-2.9, 3.2), (-2.805118086953, 3.131312518250)),
        ((-3.7, -3.2), (-3.779310253378, -3.283185991286)),
        ((3.5, -1.9), (3.584428340330, -1.848126526964)),
    ],
)
@pytest.mark.parametrize("solver", [NEWTON, il.LBFGS(**TIGHT)], ids=["newton", "lbfgs"])
def test_each_minimum_of_himmelblau_has_its_own_derivative(start, minimum, solver):
    theta, start = torch.tensor([11.0, 7.0], dtype=F64), torch.tensor(start, dtype=F64)

    def layer(theta):
        return il.argmin(himmelblau, start, theta, solver=solver, adjoint=ADJOINT).value

    x = layer(theta)
    # The minima are tabulated to twelve digits.
    torch.testing.assert_close(x, torch.tensor(minimum, dtype=F64), rtol=0, atol=1e-11)
    H = hessian(himmelblau)(x, theta)
    expected = -torch.linalg.solve(H, jacfwd(grad(himmelblau), argnums=1)(x, theta))
    assert_near(jacrev(layer)(theta), expected)
    assert_near(jacfwd(layer)(theta), expected)


def rosenbrock(x, theta):
    return (theta[0] - x[0]) ** 2 + theta[1] * (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("solver", [NEWTON, il.LBFGS(**TIGHT)], ids=["newton", "lbfgs"])
def test_rosenbrock_from_far_away(solver):
    theta, start = torch.tensor([1.0, 100.0], dtype=F64), torch.tensor([-1.2, 1.0], dtype=F64)

    def layer(theta):
        return il.argmin(rosenbrock, start, theta, solver=solver, adjoint=ADJOINT).value

    # x = (θ₀, θ₀²) whatever θ₁; condition number 2500, so three digits less than in the other problems.
    torch.testing.assert_close(layer(theta), torch.ones(2, dtype=F64), rtol=0, atol=1e-9)
    expected = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=F64)
    torch.testing.assert_close(jacrev(layer)(theta), expected, rtol=0, atol=1e-6)
