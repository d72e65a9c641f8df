"""Gauss-Newton and Levenberg-Marquardt on the classic landscapes, against SciPy, and their implicit derivatives."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacrev, vmap

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.landscapes import LANDSCAPES, ONE, powell, rosenbrock
from tests.helpers.problems import F64, normal

SOLVERS = {
    "gauss-newton": il.GaussNewton(),
    "gauss-newton-wolfe": il.GaussNewton(il.Dense(), line_search=il.StrongWolfe()),
    "levenberg-marquardt": il.LevenbergMarquardt(),
    "levenberg-marquardt-dense": il.LevenbergMarquardt(il.Dense()),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def tight(solver, **options):
    return type(solver)(**{**vars(solver), **options})


def start_of(name, dtype=F64):
    return torch.tensor(LANDSCAPES[name][1], dtype=dtype)


@each_solver
@pytest.mark.parametrize("name", LANDSCAPES)
def test_landscapes_in_few_steps(name, solver):
    residuals, _, expected, _ = LANDSCAPES[name]
    solution = il.least_squares(residuals, start_of(name), ONE, solver=solver)
    assert solution.status.item() == il.Status.CONVERGED
    assert solution.stats.steps.item() <= 30
    # Powell's function is flat to fourth order, so that the gradient says little about the place.
    assert_near(solution.value, torch.tensor(expected, dtype=F64), 1e-2 if name == "powell" else 1e-6)
    assert_near(solution.stats.objective, residuals(solution.value, ONE).square().sum() / 2, 1e-14)


@each_solver
@pytest.mark.parametrize("name", ["beale", "himmelblau"])
def test_the_derivative_is_that_of_the_minimizer(name, solver):
    residuals = LANDSCAPES[name][0]
    t = torch.tensor(1.1, dtype=F64)

    def layer(t, adjoint):
        exact = tight(solver, rtol=1e-13)
        return il.least_squares(residuals, start_of(name), t, solver=exact, adjoint=adjoint).value

    x = layer(t, il.Implicit(il.Dense()))

    def half_square(x, t):
        return residuals(x, t).square().sum() / 2

    expected = -torch.linalg.solve(hessian(half_square)(x, t), jacrev(grad(half_square), argnums=1)(x, t))
    assert_near(jacrev(lambda t: layer(t, il.Implicit(il.Dense())))(t), expected, 1e-8)
    assert_gradients_match(lambda t: layer(t, il.Implicit()), t, modes=("reverse",))


@pytest.mark.parametrize("adjoint", [il.Implicit(), il.OneStep(2), il.Unrolled()], ids=["implicit", "one", "unrolled"])
@pytest.mark.parametrize("solver", [il.GaussNewton(il.Dense()), il.LevenbergMarquardt(il.Dense())], ids=["gn", "lm"])
def test_where_the_fit_is_perfect_all_adjoints_agree(solver, adjoint):
    exact = tight(solver, rtol=1e-13)

    def layer(t):
        return il.least_squares(rosenbrock, start_of("rosenbrock"), t, solver=exact, adjoint=adjoint).value

    # The root is (t, t²), where the Gauss-Newton matrix is the Hessian; a damped step leaves what μ leaves.
    assert_near(jacrev(layer)(ONE), torch.tensor([1.0, 2.0], dtype=F64), 1e-4)


@pytest.mark.parametrize("method", ["trf", "lm"])
def test_a_curve_fit_agrees_with_scipy(method):
    times = torch.linspace(0, 1, 12, dtype=F64)
    data = 2 * torch.exp(-3 * times) + 0.05 * normal(12, seed=2)

    def residuals(x, y):
        return x[0] * torch.exp(-x[1] * times) - y

    theirs = scipy.optimize.least_squares(
        lambda z: residuals(torch.tensor(z), data).numpy(), np.ones(2), method=method, xtol=1e-15, gtol=1e-15
    )
    for solver in SOLVERS.values():
        ours = il.least_squares(residuals, torch.ones(2, dtype=F64), data, solver=tight(solver, rtol=1e-10))
        assert_near(ours.value, torch.tensor(theirs.x), 1e-6)
        assert ours.stats.objective.item() == pytest.approx(theirs.cost, rel=1e-10)


@each_solver
def test_single_precision(solver):
    for name in ("rosenbrock", "beale", "himmelblau"):
        residuals, _, expected, _ = LANDSCAPES[name]
        start, one = start_of(name, torch.float32), torch.ones(())
        solution = il.least_squares(residuals, start, one, solver=tight(solver, rtol=1e-6))
        assert solution.value.dtype == torch.float32
        assert_near(solution.value, torch.tensor(expected), 1e-3)


@each_solver
def test_a_broken_lane_breaks_alone(solver):
    ts = torch.tensor([1.0, torch.nan, 1.2, 0.8], dtype=F64)

    def layer(t):
        solution = il.least_squares(rosenbrock, start_of("rosenbrock"), t, solver=solver, on_failure="ignore")
        return solution.value, solution.status, solution.stats.steps

    value, status, steps = vmap(layer)(ts)
    assert status.tolist() == [0, il.Status.NON_FINITE, 0, 0]
    assert steps.tolist()[1] == 0
    for lane in (0, 2, 3):
        alone = layer(ts[lane])
        assert_near(value[lane], alone[0], 1e-12)
        assert steps[lane] == alone[2]


@each_solver
def test_a_fixed_number_of_steps_and_an_unknown_without_dimensions(solver):
    fixed = tight(solver, rtol=None, atol=None, max_steps=25)
    solution = il.least_squares(lambda x, t: x**3 - t, torch.tensor(2.0, dtype=F64), ONE, solver=fixed)
    assert solution.stats.steps.item() == 25
    assert solution.status.item() == il.Status.NOT_CHECKED
    assert_near(solution.value, torch.ones((), dtype=F64))


def test_levenberg_marquardt_never_climbs_and_starts_where_the_jacobian_has_no_rank():
    # At (0, 0) both columns of J are zero but for the second residual's.
    def residuals(x):
        return torch.stack([x[0] ** 2 * 10 - 10 * x[1] ** 2, 1 - x[0], x[1] - 1])

    start, heights = torch.tensor([0.0, 0.0], dtype=F64), []
    for steps in range(1, 15):
        solver = il.LevenbergMarquardt(rtol=None, atol=None, max_steps=steps)
        heights.append(il.least_squares(residuals, start, solver=solver).stats.objective.item())
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] < 1e-20


def test_levenberg_marquardt_comes_to_rest_where_gauss_newton_overshoots():
    # arctan: Gauss-Newton's full steps from 3 run to where it is flat; the damping keeps to the trusted region.
    solver = il.GaussNewton(il.Dense(), line_search=il.Fixed())
    start = torch.tensor([3.0], dtype=F64)
    wild = il.least_squares(lambda x: x.atan(), start, solver=solver, on_failure="ignore")
    assert wild.value.abs().item() > 1e3
    calm = il.least_squares(lambda x: x.atan(), start, solver=il.LevenbergMarquardt())
    assert_near(calm.value, torch.zeros(1, dtype=F64), 1e-6)


@pytest.mark.parametrize("solver", [il.GaussNewton(), il.LevenbergMarquardt()], ids=["gn", "lm"])
def test_a_plain_function_has_no_model(solver):
    with pytest.raises(il.MisuseError, match=f"{type(solver).__name__} needs to know where the model ends"):
        il.argmin(lambda x: powell(x, 1.0).square().sum(), torch.ones(4, dtype=F64), solver=solver)


def test_a_composite_with_another_loss_and_a_regularizer():
    X, y = normal(30, 3, seed=3), (normal(30, seed=4) > 0).to(F64)

    def cross_entropy(z, y):
        return torch.nn.functional.binary_cross_entropy_with_logits(z, y)

    logistic = il.Composite(lambda w, y: X @ w, cross_entropy)
    for solver in (il.GaussNewton(), il.LevenbergMarquardt()):
        exact = tight(solver, rtol=1e-12)
        ours = il.argmin(logistic, torch.zeros(3, dtype=F64), y, regularizer=il.Ridge(0.1), solver=exact).value
        F = grad(lambda w: cross_entropy(X @ w, y) + 0.05 * w.square().sum())(ours)
        assert_near(F, torch.zeros(3, dtype=F64), 1e-10)


@pytest.mark.parametrize(
    "make", [lambda: il.GaussNewton(damping=-1.0), lambda: il.LevenbergMarquardt(initial=0.0)], ids=["gn", "lm"]
)
def test_misuse_is_named(make):
    with pytest.raises(il.MisuseError, match="pass a number"):
        make()
