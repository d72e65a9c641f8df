"""Forward solvers: that they go where they should, at the cost they should, and say how it went."""

import pytest
import torch
from torch.func import grad

import implicitlayers as il
from tests.helpers.cases import SOLVERS, TIGHT
from tests.helpers.problems import F64, coupled, newton, normal, quadratic, spd

ZERO = torch.zeros(3, dtype=F64)
THETA = normal(3, seed=1)
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


class Counted:
    """An objective that counts its evaluations."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, x, *params):
        self.calls += 1
        return self.fn(x, *params)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


FAR = torch.tensor([-1.2, 1.0], dtype=F64)


@each_solver
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_stops_when_the_residual_is_below_the_tolerance(solver, rtol):
    solver = type(solver)(**{**vars(solver), "rtol": rtol, "atol": 0.0})
    solution = il.argmin(coupled, ZERO, THETA, solver=solver)
    assert solution.status.item() == il.Status.CONVERGED
    F = grad(coupled)
    residual = F(solution.value, THETA).norm()
    # The scale is that of the start, or of the terms that cancel at the solution: largest eigenvalue times ‖x‖.
    curvature = torch.func.hessian(coupled)(solution.value, THETA)
    scale = torch.maximum(F(ZERO, THETA).norm(), 1.5 * torch.linalg.eigvalsh(curvature)[-1] * solution.value.norm())
    assert residual <= rtol * scale
    assert_near(solution.stats.residual, residual, 1e-14)


@each_solver
def test_atol_is_in_the_units_of_the_gradient(solver):
    solver = type(solver)(**{**vars(solver), "rtol": 0.0, "atol": 1e-3})
    solution = il.argmin(coupled, ZERO, THETA, solver=solver)
    assert solution.status.item() == il.Status.CONVERGED
    assert grad(coupled)(solution.value, THETA).norm() <= 1e-3


@each_solver
@pytest.mark.parametrize("steps", [1, 3, 60])
def test_a_fixed_number_of_steps(solver, steps):
    solver = type(solver)(**{**vars(solver), "rtol": None, "atol": None, "max_steps": steps})
    solution = il.argmin(coupled, ZERO, THETA, solver=solver)
    assert solution.stats.steps.item() == steps
    assert solution.status.item() == il.Status.NOT_CHECKED
    if steps == 60:
        # Long past the solution nothing may break: no division by a vanished step.
        assert_near(solution.value, newton(coupled, ZERO, THETA), 1e-6)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_fixed_number_of_gradient_steps_costs_one_evaluation_each(steps):
    objective = Counted(coupled)
    solver = il.GradientDescent(lr=0.1, rtol=None, atol=None, max_steps=steps)
    il.argmin(objective, ZERO, THETA, solver=solver)
    # One more for the probe that looks for captured tensors.
    assert objective.calls == steps + 1


def test_quadratic_convergence_of_newton():
    steps = il.argmin(coupled, ZERO, THETA, solver=il.Newton(il.Dense(), **TIGHT)).stats.steps.item()
    assert steps <= 8
    steps = il.argmin(quadratic, ZERO, spd(3), THETA, solver=il.Newton(il.Dense(), **TIGHT)).stats.steps.item()
    assert steps <= 2


@pytest.mark.parametrize(
    ("solver", "most"),
    [(il.LBFGS(), 60), (il.Newton(), 40), (il.Newton(il.Dense()), 40), (il.LBFGS(memory=1), 200)],
    ids=["lbfgs", "newton-cg", "newton-dense", "lbfgs-1"],
)
def test_rosenbrock_in_a_reasonable_number_of_steps(solver, most):
    solution = il.argmin(rosenbrock, FAR, solver=solver)
    assert_near(solution.value, torch.ones(2, dtype=F64), 1e-4)
    assert solution.stats.steps.item() <= most


def test_lbfgs_solves_a_quadratic_in_few_steps():
    A, b = spd(6), normal(6)
    solution = il.argmin(quadratic, torch.zeros(6, dtype=F64), A, b, solver=il.LBFGS())
    assert_near(solution.value, torch.linalg.solve(A, b), 1e-6)
    assert solution.stats.steps.item() <= 25


@pytest.mark.parametrize("linear_solver", [il.CG(), il.Dense()], ids=["cg", "dense"])
def test_newton_leaves_a_saddle_point_downhill(linear_solver):
    # Minima at ±1 in the second coordinate; started beside the saddle at the origin, where CG meets negative curvature.
    objective = lambda x: x[0] ** 2 + (x[1] ** 2 - 1) ** 2  # noqa: E731
    solution = il.argmin(objective, torch.tensor([0.5, 0.1], dtype=F64), solver=il.Newton(linear_solver))
    assert_near(solution.value.abs(), torch.tensor([0.0, 1.0], dtype=F64), 1e-6)


def test_damping_shortens_newtons_step():
    A, b = spd(3), normal(3)
    for damping in (0.0, 2.0):
        solver = il.Newton(il.Dense(), damping=damping, rtol=None, atol=None, max_steps=1)
        x = il.argmin(quadratic, ZERO, A, b, solver=solver).value
        assert_near(x, torch.linalg.solve(A + damping * torch.eye(3, dtype=F64), b), 1e-12)


# --- how it went --------------------------------------------------------------------------------------------


def status_of(objective, x0, solver):
    return il.Status(il.argmin(objective, x0, solver=solver, on_failure="ignore").status.item())


def test_too_large_a_step_diverges_and_says_so():
    assert status_of(lambda x: x.square().sum(), ZERO + 1, il.GradientDescent(lr=1.5)) == il.Status.NON_FINITE


@pytest.mark.parametrize("solver", [il.LBFGS(), il.Newton(), il.GradientDescent(lr=1.0, line_search=il.Armijo())])
def test_an_unbounded_objective_is_not_solved(solver):
    solver = type(solver)(**{**vars(solver), "max_steps": 60})
    assert status_of(lambda x: x.sum(), ZERO, solver) != il.Status.CONVERGED
    assert status_of(lambda x: -x.square().sum() + x.sum(), ZERO, solver) != il.Status.CONVERGED


def test_too_few_steps():
    assert status_of(rosenbrock, FAR, il.LBFGS(max_steps=3)) == il.Status.MAX_STEPS


@pytest.mark.parametrize("solver", [il.LBFGS(**TIGHT), il.Newton(**TIGHT)], ids=["lbfgs", "newton"])
def test_a_domain_that_ends_is_not_left(solver):
    # -log is infinite at 0 and NaN beyond; full steps from 3 would land there.
    objective = lambda x: (10 * x - x.log()).sum()  # noqa: E731
    solution = il.argmin(objective, torch.tensor([3.0], dtype=F64), solver=solver)
    assert_near(solution.value, torch.tensor([0.1], dtype=F64))


def test_tolerance_beyond_precision_stalls_and_names_it():
    target = normal(3, seed=4)
    objective = lambda x: ((x - target) * torch.tensor([1.0, 1e3, 1e5], dtype=F64)).square().sum() + 1e8  # noqa: E731
    solver = il.LBFGS(rtol=0.0, atol=0.0)
    assert status_of(objective, ZERO, solver) in (il.Status.STALLED, il.Status.CONVERGED)
    assert il.argmin(objective, ZERO, solver=solver, on_failure="ignore").stats.steps.item() < 500


@each_solver
def test_unknown_far_from_one_in_scale(solver):
    for scale in (1e-6, 1e6):
        target = scale * normal(3, seed=5)
        solver = type(solver)(**{**vars(solver), "rtol": 1e-10, "atol": 0.0})
        x = il.argmin(lambda x, t: (x - t).square().sum() / 2, ZERO, target, solver=solver).value
        assert_near(x / scale, target / scale, 1e-8)


# --- line search --------------------------------------------------------------------------------------------


def test_armijo_accepts_sufficient_decrease_only():
    # From x = 1 on x⁴ the full gradient step of length 4 overshoots to -3; halving once gives -1, twice 0.
    solver = il.GradientDescent(lr=1.0, line_search=il.Armijo(), rtol=None, atol=None, max_steps=1)
    x = il.argmin(lambda x: (x**4).sum(), torch.ones(1, dtype=F64), solver=solver).value
    assert_near(x, torch.zeros(1, dtype=F64), 0)
    strict = il.Armijo(sufficient_decrease=0.9)
    solver = il.GradientDescent(lr=1.0, line_search=strict, rtol=None, atol=None, max_steps=1)
    x = il.argmin(lambda x: (x**4).sum(), torch.ones(1, dtype=F64), solver=solver).value
    # f(1 - 4t) ≤ 1 - 0.9·16t holds for t = 1/64 (0.772 ≤ 0.775), and not for t = 1/32 (0.586 > 0.55).
    assert_near(x, torch.full((1,), 1 - 4 / 64, dtype=F64), 0)


def test_lanes_search_each_their_own_step():
    solver = il.GradientDescent(lr=1.0, line_search=il.Armijo(), rtol=None, atol=None, max_steps=1)
    scales = torch.tensor([0.5, 4.0, 64.0], dtype=F64)

    def layer(scale):
        return il.argmin(lambda x: scale * x.square().sum() / 2, torch.ones(1, dtype=F64), solver=solver).value

    together = torch.func.vmap(layer)(scales)
    assert_near(together, torch.stack([layer(scale) for scale in scales]), 0)
    assert (together.abs() < 1).all()


def test_a_search_that_fails_names_itself():
    class Lying(torch.autograd.Function):
        """x ↦ -Σx with the gradient of +Σx: every step along -F climbs."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return -x.sum()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, v):
            return v * torch.ones_like(ctx.saved_tensors[0])

    # The operation before it is what the library sees of x.
    status = status_of(lambda x: Lying.apply(x * 1), ZERO + 1, il.LBFGS())
    assert status == il.Status.LINE_SEARCH_FAILED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-10, -6, -2, 2, 4, 6])
def test_lbfgs_finds_the_scale_of_the_unknown(exponent, dtype):
    scale = 10.0**exponent
    start = torch.zeros(3, dtype=dtype)
    solution = il.argmin(lambda x: ((x - scale) / scale).square().sum(), start, solver=il.LBFGS())
    torch.testing.assert_close(solution.value / scale, torch.ones_like(start), rtol=0, atol=1e-5)
    # A quadratic with one curvature: the first step is all but exact.
    assert solution.stats.steps <= 3


def test_many_recorded_steps_of_lbfgs_at_the_solution_do_no_harm():
    """Pairs of steps of rounding size would multiply the derivative without bound."""
    theta = normal(4, seed=1)
    A = spd(4)

    def layer(theta, adjoint):
        objective = lambda x, t: (x @ A @ x) / 2 - (x * t.sin()).sum() + 0.1 * (x * t).pow(4).sum()  # noqa: E731
        solver = il.LBFGS(rtol=1e-10)
        return il.argmin(objective, torch.zeros(4, dtype=F64), theta, solver=solver, adjoint=adjoint).value

    exact = torch.func.jacrev(lambda t: layer(t, il.Implicit(il.Dense())))(theta)
    for steps in (10, 30, 60):
        ours = torch.func.jacrev(lambda t, steps=steps: layer(t, il.OneStep(steps)))(theta)
        assert (ours - exact).abs().max() < 1e-3
