"""Solvers for roots and fixed points against closed forms, and their implicit derivatives."""

import pytest
import torch
from torch.func import jacrev, vmap

import implicitlayers as il
from implicitlayers.solvers.fixed_point import Anderson, Broyden, FixedPointIteration
from tests.helpers.problems import F64, normal

EXACT = il.Implicit(il.Dense(), on_failure="raise")
N = 5
# A contraction that is not symmetric, with eigenvalues of both signs.
MAP = 0.8 * torch.linalg.qr(normal(N, N, seed=3)).Q
SHIFT = normal(N, seed=4)
EYE = torch.eye(N, dtype=F64)
ZERO = torch.zeros(N, dtype=F64)

FIXED_POINT = {
    "picard": FixedPointIteration(),
    "picard-damped": FixedPointIteration(damping=0.3),
    "anderson": Anderson(),
    "anderson-damped": Anderson(memory=3, damping=0.5),
    "broyden": Broyden(),
}
ROOT = {
    "anderson": Anderson(),
    "broyden": Broyden(),
    "newton": il.Newton(),
    "newton-gmres": il.Newton(il.GMRES()),
    "newton-wolfe": il.Newton(il.Dense(), line_search=il.StrongWolfe()),
}
FULL_STEPS = il.Newton(line_search=il.Fixed())
fixed_point_solvers = pytest.mark.parametrize(
    "solver", [*FIXED_POINT.values(), *list(ROOT.values())[2:]], ids=[*FIXED_POINT, *list(ROOT)[2:]]
)
root_solvers = pytest.mark.parametrize("solver", ROOT.values(), ids=ROOT.keys())


def assert_near(ours, expected, tol=1e-8):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def tight(solver, **options):
    return type(solver)(**{**vars(solver), **options})


def cubic(x, theta):
    return theta * x**3 - x - 2


@fixed_point_solvers
def test_an_affine_contraction_and_its_derivative(solver):
    solver = tight(solver, rtol=1e-12)

    def layer(b):
        return il.fixed_point(lambda x, b: MAP @ x + b, ZERO, b, solver=solver, adjoint=EXACT).value

    inverse = torch.linalg.inv(EYE - MAP)
    assert_near(layer(SHIFT), inverse @ SHIFT, 1e-9)
    assert_near(jacrev(layer)(SHIFT), inverse, 1e-12)


@fixed_point_solvers
def test_cosine_and_its_derivative(solver):
    solver, theta = tight(solver, rtol=1e-12), torch.tensor(0.0, dtype=F64)

    def layer(t):
        return il.fixed_point(lambda x, t: x.cos() + t, torch.zeros_like(t), t, solver=solver, adjoint=EXACT).value

    assert_near(layer(theta), torch.tensor(0.7390851332, dtype=F64), 1e-9)
    assert_near(jacrev(layer)(theta), torch.tensor(0.5975100457, dtype=F64), 1e-9)
    value = il.fixed_point(lambda x: x.cos(), torch.zeros(()), solver=tight(solver, rtol=1e-6)).value
    assert value.dtype == torch.float32
    assert_near(value, torch.tensor(0.7390851), 1e-5)


@root_solvers
def test_a_cubic_and_its_derivative(solver):
    solver, theta = tight(solver, rtol=1e-12), torch.tensor(1.0, dtype=F64)

    def layer(t):
        start = torch.tensor(1.4, dtype=F64)
        return il.root(cubic, start, t, solver=solver, adjoint=EXACT).value

    assert_near(layer(theta), torch.tensor(1.5213797068, dtype=F64), 1e-9)
    assert_near(jacrev(layer)(theta), torch.tensor(-0.5924469933, dtype=F64), 1e-9)


@root_solvers
def test_lanes_and_the_one_that_breaks(solver):
    thetas = torch.tensor([1.0, torch.nan, 0.7, 1.3], dtype=F64)

    def layer(t):
        start = torch.tensor(1.4, dtype=F64)
        solution = il.root(cubic, start, t, solver=solver, adjoint=EXACT, on_failure="ignore")
        return solution.value, solution.status, solution.stats.steps, solution.stats.objective

    value, status, steps, objective = vmap(layer)(thetas)
    assert status.tolist() == [0, il.Status.NON_FINITE, 0, 0]
    assert objective.isnan().all()
    for lane in (0, 2, 3):
        alone = layer(thetas[lane])
        assert_near(value[lane], alone[0], 1e-12)
        assert steps[lane] == alone[2]


@pytest.mark.parametrize("solver", [*FIXED_POINT.values(), FULL_STEPS], ids=[*FIXED_POINT, "newton"])
def test_a_fixed_number_of_steps(solver):
    for steps in (1, 3, 100):
        fixed = tight(solver, rtol=None, atol=None, max_steps=steps)
        solution = il.fixed_point(lambda x, b: MAP @ x + b, ZERO, SHIFT, solver=fixed)
        assert solution.stats.steps.item() == steps
        assert solution.status.item() == il.Status.NOT_CHECKED
    # Long past the solution nothing may break: differences are zero by then.
    assert_near(solution.value, torch.linalg.solve(EYE - MAP, SHIFT), 1e-4)


def test_a_fixed_number_of_picard_steps_costs_one_evaluation_each():
    calls = []

    def mapping(x):
        calls.append(1)
        return x / 2 + 1

    il.fixed_point(mapping, ZERO, solver=FixedPointIteration(rtol=None, atol=None, max_steps=7))
    # One more for the probe that looks for captured tensors.
    assert len(calls) == 8


def test_picard_is_the_loop_written_by_hand_and_unrolls_to_it():
    def loop(b, steps):
        x = ZERO
        for _ in range(steps):
            x = 0.25 * x + 0.75 * (MAP @ x + b)
        return x

    def layer(b):
        solver = FixedPointIteration(damping=0.25, rtol=None, atol=None, max_steps=6)
        return il.fixed_point(lambda x, b: MAP @ x + b, ZERO, b, solver=solver, adjoint=il.Unrolled()).value

    assert_near(layer(SHIFT), loop(SHIFT, 6), 1e-14)
    assert_near(jacrev(layer)(SHIFT), jacrev(lambda b: loop(b, 6))(SHIFT), 1e-14)


def test_one_picard_step_is_a_truncated_neumann_series():
    def layer(b, steps):
        solver, adjoint = FixedPointIteration(rtol=1e-13), il.OneStep(steps)
        return il.fixed_point(lambda x, b: MAP @ x + b, ZERO, b, solver=solver, adjoint=adjoint).value

    for steps in (1, 4):
        neumann = sum(torch.linalg.matrix_power(MAP, k) for k in range(steps))
        assert_near(jacrev(lambda b, k=steps: layer(b, k))(SHIFT), neumann, 1e-12)


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_anderson_is_walker_and_ni_by_hand(memory):
    """The same iterates from constrained weights, Σα = 1, solved by lstsq (type II in its textbook form)."""
    steps = 6

    def mapping(x):
        return torch.tanh(MAP @ x) + SHIFT

    xs = [ZERO]
    for k in range(steps):
        window = xs[max(0, k - memory) :]
        G = torch.stack([mapping(x) for x in window], -1)
        R = G - torch.stack(window, -1)
        if len(window) == 1:
            alpha = torch.ones(1, dtype=F64)
        else:
            gamma = torch.linalg.lstsq(R[:, :-1] - R[:, -1:], -R[:, -1:]).solution.squeeze(-1)
            alpha = torch.cat([gamma, 1 - gamma.sum(0, keepdim=True)])
        xs.append(G @ alpha)
    solver = Anderson(memory=memory, rtol=None, atol=None, max_steps=steps)
    assert_near(il.fixed_point(mapping, ZERO, solver=solver).value, xs[-1], 1e-7)


def test_anderson_and_broyden_end_on_a_linear_equation_where_krylov_does():
    # n + 1 steps of Anderson (as GMRES) and 2n of Broyden (Gay 1979), plus the first.
    A = normal(N, N, seed=8) / 2 + EYE
    for solver, most in ((Anderson(memory=N), N + 4), (Broyden(), 2 * N + 2)):
        solution = il.root(lambda x: A @ x - SHIFT, ZERO, solver=solver)
        assert solution.stats.steps.item() <= most
        assert_near(solution.value, torch.linalg.solve(A, SHIFT), 1e-6)


def test_broyden_is_the_dense_good_method():
    A = normal(N, N, seed=8) / 2 + EYE
    F = lambda x: A @ x + 0.1 * x**3 - SHIFT  # noqa: E731
    x, H = ZERO, EYE.clone()
    for _ in range(6):
        s = -H @ F(x)
        y = F(x + s) - F(x)
        H = H + torch.outer(s - H @ y, s @ H) / (s @ H @ y)
        x = x + s
    solver = Broyden(rtol=None, atol=None, max_steps=6)
    assert_near(il.root(F, ZERO, solver=solver).value, x, 1e-11)


def test_newton_finds_a_root_by_its_line_search_that_full_steps_miss():
    # arctan from 3: full Newton steps diverge.
    start = torch.tensor([3.0], dtype=F64)
    wild = il.root(lambda x: x.atan(), start, solver=FULL_STEPS, on_failure="ignore")
    assert wild.status.item() != il.Status.CONVERGED
    assert_near(il.root(lambda x: x.atan(), start, solver=il.Newton()).value, torch.zeros(1, dtype=F64))


def test_an_equation_without_a_root_is_not_solved():
    # x² + 1 has none; its smallest square is at 0, where Newton's matrix is singular.
    solution = il.root(lambda x: x * x + 1, torch.tensor([2.0], dtype=F64), solver=il.Newton(), on_failure="ignore")
    assert solution.status.item() != il.Status.CONVERGED
    assert solution.stats.residual.item() >= 1


def test_a_diverging_iteration_says_so():
    solution = il.fixed_point(lambda x: 3 * x + 1, ZERO, solver=FixedPointIteration(), on_failure="ignore")
    assert solution.status.item() == il.Status.NON_FINITE
    assert_near(il.fixed_point(lambda x: 3 * x + 1, ZERO, solver=Anderson()).value, ZERO - 0.5)


def test_best_so_far_keeps_the_smallest_residual_of_an_equation():
    solver = il.BestSoFar(FixedPointIteration(rtol=None, atol=None, max_steps=8))
    solution = il.root(lambda x: 3 * x - 1, ZERO, solver=solver)
    # x ← 1 - 2x runs away from ⅓; its start is the best it has.
    assert_near(solution.value, ZERO, 0)
    assert solution.stats.objective.isnan()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedPointIteration(damping=1.0), r"\[0, 1\)"),
        (lambda: Anderson(memory=0), "positive integer"),
        (lambda: Anderson(regularization=-1.0), "number >= 0"),
        (lambda: Broyden(scale=0.0), "no length"),
        (lambda: il.root(cubic, ZERO, 1.0, solver=il.Newton(il.CG())), "symmetric systems only"),
        (lambda: il.root(cubic, ZERO, 1.0, solver=il.LBFGS()), "not made for an equation"),
        (lambda: il.argmin(lambda x: (x * x).sum(), ZERO, solver=Anderson()), "not made for a smooth objective"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(il.MisuseError, match=message):
        make()
