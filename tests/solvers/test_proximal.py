"""The proximal gradient method on the lasso and on a box, against optimality conditions and fixed-support formulas."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

import implicitlayers as il
from implicitlayers.problem import Bounded, Nonsmooth
from implicitlayers.regularizers import Pieces
from implicitlayers.solvers.proximal import ProximalGradient
from tests.helpers.problems import F64, coupled, newton, normal

M, N = 30, 8
X = normal(M, N, seed=1) * torch.logspace(0, -1, N, dtype=F64)
Y = X @ normal(N, seed=2) + 0.1 * normal(M, seed=3)
LAM = torch.tensor(0.03, dtype=F64)
ZERO = torch.zeros(N, dtype=F64)
EXACT = il.Implicit(il.Dense(), on_failure="raise")
SOLVERS = {
    "fista": ProximalGradient(rtol=1e-10),
    "ista": ProximalGradient(accelerated=False, rtol=1e-10),
    "too-long": ProximalGradient(step_size=1e3, rtol=1e-10),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class SoftThreshold(Nonsmooth):
    """λ‖x‖₁."""

    def __init__(self, slot):
        self.slots = (slot,)

    def prox(self, y, step, lam):
        return y.sign() * torch.relu(y.abs() - step * lam)

    def value(self, x, lam):
        return lam * x.abs().sum()


class Clamp(Bounded):
    """The indicator of [0, upper]ⁿ."""

    def __init__(self, slot):
        self.slots = (slot,)

    def prox(self, y, step, upper):
        return torch.minimum(torch.relu(y), upper)

    def value(self, x, upper):
        return torch.zeros_like(x[0])

    def bounds(self, x, upper):
        return torch.zeros_like(x), upper.expand_as(x)


class Hard(il.Regularizer):
    """One of the two."""

    def __init__(self, kind, tensor):
        self.kind, self.tensor = kind, tensor

    def pose(self, structure, start, first_slot):
        return Pieces([], self.kind(first_slot), [self.tensor])


def assert_near(ours, expected, tol=1e-8):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def misfit(b, y):
    return (X.to(b.dtype) @ b - y).square().sum() / (2 * M)


def lasso(lam, solver, y=Y, adjoint=EXACT, start=ZERO):
    hard = Hard(SoftThreshold, lam)
    return il.argmin(misfit, start, y, regularizer=hard, solver=solver, adjoint=adjoint, on_failure="ignore")


def assert_optimal(b, lam, tol):
    """|∇f| ≤ λ where b = 0, and ∇f = -λ sign b elsewhere."""
    slope, on = grad(misfit)(b, Y.to(b.dtype)), b != 0
    assert 0 < on.sum() < N, "the support is trivial and would pass a method without prox"
    assert (slope[~on].abs() <= lam + tol).all()
    assert_near(slope[on], -lam * b[on].sign(), tol)


@each_solver
def test_the_lasso_and_its_derivative(solver):
    solution = lasso(LAM, solver)
    assert solution.status.item() == il.Status.CONVERGED
    b = solution.value
    assert_optimal(b, LAM, 1e-8)
    assert_near(solution.stats.objective, misfit(b, Y) + LAM * b.abs().sum(), 1e-14)
    # Coordinates off the support stay, and on it dβ/dλ = -M (XᵀX)⁻¹ sign β.
    on, expected = b != 0, torch.zeros(N, dtype=F64)
    expected[on] = -M * torch.linalg.solve(X[:, on].T @ X[:, on], b[on].sign())
    assert_near(jacrev(lambda lam: lasso(lam, solver).value)(LAM), expected, 1e-9)


@each_solver
def test_the_residual_is_the_gradient_mapping_at_the_answer(solver):
    loose = type(solver)(**{**vars(solver), "rtol": 1e-4})
    solution = lasso(LAM, loose)
    b, t = solution.value, 1e-4
    moved = b - t * grad(misfit)(b, Y)
    # The mapping does not grow with its step, so that a tiny one bounds it from above.
    mapping = (b - moved.sign() * torch.relu(moved.abs() - t * LAM)) / t
    assert solution.stats.residual <= mapping.norm() * (1 + 1e-5)
    assert solution.stats.residual >= mapping.norm() / 100


def test_acceleration_pays_and_is_restarted():
    fast, slow = (lasso(LAM / 3, ProximalGradient(how, rtol=1e-5)).stats.steps.item() for how in (True, False))
    assert fast < slow / 2


def test_single_precision_and_a_smooth_problem():
    b = lasso(LAM.float(), ProximalGradient(rtol=1e-5), Y.float(), start=ZERO.float()).value
    assert b.dtype == torch.float32
    assert_optimal(b, LAM.float(), 1e-4)
    theta, start = normal(3, seed=1), torch.zeros(3, dtype=F64)
    x = il.argmin(coupled, start, theta, solver=ProximalGradient(rtol=1e-10)).value
    assert_near(x, newton(coupled, start, theta), 1e-8)


def test_lanes_and_the_one_that_breaks():
    lams = torch.tensor([0.03, torch.nan, 0.1], dtype=F64)

    def layer(lam):
        solution = lasso(lam, ProximalGradient(rtol=1e-5))
        return solution.value, solution.status, solution.stats.steps

    value, status, steps = vmap(layer)(lams)
    assert status.tolist() == [0, il.Status.NON_FINITE, 0]
    for lane in (0, 2):
        alone = layer(lams[lane])
        assert_near(value[lane], alone[0], 1e-10)
        assert steps[lane] == alone[2]


@pytest.mark.parametrize("backtracks", [0, 3])
def test_a_fixed_number_of_steps(backtracks):
    fixed = {"rtol": None, "atol": None, "max_steps": 40, "backtracks": backtracks}
    solution = lasso(LAM, ProximalGradient(accelerated=False, step_size=0.5, **fixed))
    assert (solution.stats.steps.item(), solution.status.item()) == (40, il.Status.NOT_CHECKED)
    b = ZERO
    for _ in range(40):
        moved = b - 0.5 * grad(misfit)(b, Y)
        b = moved.sign() * torch.relu(moved.abs() - 0.5 * LAM)
    assert_near(solution.value, b, 1e-13)


def test_unrolled_and_implicit_agree():
    def layer(lam, adjoint):
        return lasso(lam, SOLVERS["ista"], adjoint=adjoint).value

    implicit = jacrev(lambda lam: layer(lam, EXACT))(LAM)
    assert_near(jacrev(lambda lam: layer(lam, il.Unrolled()))(LAM), implicit, 1e-5)


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP", "trust-constr"])
def test_scipy_takes_a_box_as_bounds(method):
    box = Hard(Clamp, torch.tensor(0.5, dtype=F64))

    def layer(y, solver):
        return il.argmin(misfit, ZERO, y, regularizer=box, solver=solver, adjoint=EXACT).value

    ours = layer(Y, SOLVERS["fista"])
    assert {bool((ours == bound).any()) for bound in (0, 0.5)} == {True}
    assert ((ours > 0) & (ours < 0.5)).any()
    # An interior method ends that much inside.
    assert_near(layer(Y, il.Scipy(method, rtol=1e-4)), ours, 2e-2 if method == "trust-constr" else 1e-3)


def test_given_is_checked_by_the_mapping():
    b = lasso(LAM, SOLVERS["fista"]).value
    assert lasso(LAM, il.Given(b)).status.item() == il.Status.CONVERGED
    assert lasso(LAM, il.Given(b + 0.01)).status.item() == il.Status.MAX_STEPS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProximalGradient(step_size=0.0), "positive step size"),
        (lambda: ProximalGradient(backtracks=-1), ">= 0"),
        (lambda: lasso(LAM, il.Scipy("L-BFGS-B")), "take bounds"),
        (lambda: lasso(LAM, il.LBFGS()), "not made for"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(il.MisuseError, match=message):
        make()
