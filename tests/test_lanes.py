"""A thousand lanes, ten of which cannot be solved: the others do not notice, and the ten are named."""

import functools
import re

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

import implicitlayers as il
from tests.helpers.problems import F64, normal, quadratic

LANES, N = 1000, 3
NAN, UNBOUNDED, FLAT = (7, 99, 500, 999), (0, 123, 777), (42, 456, 888)
BAD = sorted(NAN + UNBOUNDED + FLAT)
GOOD = [lane for lane in range(LANES) if lane not in BAD]
SOLVERS = {
    "gradient": il.GradientDescent(lr=0.2, max_steps=200),
    "lbfgs": il.LBFGS(max_steps=25),
    "newton-cg": il.Newton(max_steps=8),
    "newton-dense": il.Newton(il.Dense(), max_steps=8),
}
each_solver = pytest.mark.parametrize("solver", [pytest.param(solver, id=name) for name, solver in SOLVERS.items()])
QUICK = SOLVERS["gradient"]


@functools.cache
def data():
    """Matrices and right-hand sides with NaN, a negative eigenvalue, or nothing but a slope in the bad lanes."""
    G = normal(LANES, N, N, seed=1)
    A, b = G @ G.mT / N + torch.eye(N, dtype=F64), normal(LANES, N, seed=2)
    b[list(NAN), 1] = torch.nan
    A[list(UNBOUNDED)] = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    A[list(FLAT)] = 0
    return A, b


def objective(x, A, b):
    # Elementwise, so that the arithmetic of a lane cannot depend on how many lanes there are.
    return (A * x[:, None] * x[None, :]).sum() / 2 - (b * x).sum()


def solve(A, b, solver, on_failure="raise", adjoint=None):
    adjoint = adjoint or il.Implicit(on_failure="ignore")
    start = torch.zeros(N, dtype=F64)
    report = []

    def layer(A, b):
        solution = il.argmin(objective, start, A, b, solver=solver, adjoint=adjoint, on_failure=on_failure)
        report.append(solution.adjoint)
        return solution.value, solution.status, solution.stats

    value, status, stats = vmap(layer)(A, b)
    return il.Solution(value, status, stats, None, report[0])


def assert_good_lanes_are_right(value):
    A, b = data()
    expected = torch.linalg.solve(A[GOOD], b[GOOD])
    # The default tolerance is a residual of 1e-8 relative to terms of order three, and all eigenvalues are at least 1.
    torch.testing.assert_close(value[GOOD], expected, rtol=0, atol=1e-7)


def assert_names(message, lanes, total=LANES):
    """The message counts the failed lanes, lists each, and says what their statuses mean."""
    assert f"failed in {len(lanes)} of {total} lanes" in message
    assert [int(lane) for lane in re.findall(r"lane (\d+): [A-Z_]+ after", message)] == list(lanes)
    for name in set(re.findall(r"lane \d+: ([A-Z_]+) after", message)):
        assert il.Status[name].meaning in message
        assert il.Status[name].remedy in message


@each_solver
def test_good_lanes_are_right_and_bitwise_unaffected(solver):
    A, b = data()
    mixed = solve(A, b, solver, "ignore")
    alone = solve(A[GOOD], b[GOOD], solver, "raise")
    assert_good_lanes_are_right(mixed.value)
    assert torch.equal(mixed.value[GOOD], alone.value)
    assert torch.equal(mixed.stats.steps[GOOD], alone.stats.steps)
    assert torch.equal(mixed.stats.residual[GOOD], alone.stats.residual)
    assert (mixed.status[GOOD] == il.Status.CONVERGED).all()
    assert (mixed.status[BAD] != il.Status.CONVERGED).all()
    assert (mixed.status[BAD] != il.Status.NOT_CHECKED).all()
    assert (mixed.status[list(NAN)] == il.Status.NON_FINITE).all()
    assert (mixed.stats.steps[list(NAN)] == 0).all()


@each_solver
def test_raise_names_the_ten(solver):
    with pytest.raises(il.SolveError) as error:
        solve(*data(), solver)
    assert_names(str(error.value), BAD)
    assert type(solver).__name__ in str(error.value)
    assert "lane 7: NON_FINITE after 0 steps" in str(error.value)


def test_warn_names_the_ten_and_points_at_the_caller():
    with pytest.warns(il.SolveWarning) as caught:
        solution = solve(*data(), QUICK, "warn")
    assert len(caught) == 1
    assert_names(str(caught[0].message), BAD)
    assert_good_lanes_are_right(solution.value)


def test_ignore_and_nan():
    ignored = solve(*data(), QUICK, "ignore")
    marked = solve(*data(), QUICK, "nan")
    assert_good_lanes_are_right(ignored.value)
    assert torch.equal(marked.value[GOOD], ignored.value[GOOD])
    assert marked.value[BAD].isnan().all()
    assert torch.equal(marked.status, ignored.status)


def test_more_failures_than_fit_are_counted():
    A, b = data()
    with pytest.raises(il.SolveError, match=r"failed in 20 of 20 lanes(?s:.*)… and 10 more lanes"):
        solve(A[:20], torch.full_like(b[:20], torch.nan), il.LBFGS())


def test_nested_lanes_are_named_by_all_their_indices():
    A, b = data()
    start = torch.zeros(N, dtype=F64)
    inner = vmap(lambda A, b: il.argmin(objective, start, A, b, solver=QUICK).value)
    with pytest.raises(il.SolveError) as error:
        vmap(inner)(A[:20].reshape(4, 5, N, N), b[:20].reshape(4, 5, N))
    assert "failed in 2 of 20 lanes" in str(error.value)
    assert "lane (0, 0): " in str(error.value)
    assert "lane (1, 2): NON_FINITE" in str(error.value)


def test_a_single_problem_has_no_lane_to_name():
    A, b = data()
    with pytest.raises(il.SolveError, match=r"^The solve by LBFGS failed:\n  NON_FINITE after 0 steps") as error:
        il.argmin(objective, torch.zeros(N, dtype=F64), A[7], b[7])
    assert "lane" not in str(error.value)
    assert "already so at the start, x0" in str(error.value)


# --- the adjoint: lanes whose forward solve succeeds at once and whose linear system cannot be solved ----------------

SADDLE, SINGULAR, NAN_COTANGENT = (3, 30, 300), (11, 111, 911), (5, 50, 555, 998)
ADJOINT_BAD = sorted(SADDLE + SINGULAR + NAN_COTANGENT)
ADJOINT_GOOD = [lane for lane in range(LANES) if lane not in ADJOINT_BAD]
EXPECTED_STATUS = (
    dict.fromkeys(SADDLE, il.Status.INDEFINITE)
    | dict.fromkeys(SINGULAR, il.Status.SINGULAR)
    | dict.fromkeys(NAN_COTANGENT, il.Status.NON_FINITE)
)


@functools.cache
def stationary_data():
    """Problems whose start is stationary in the bad lanes: a saddle point, or no curvature at all."""
    G = normal(LANES, N, N, seed=3)
    A, b = G @ G.mT / N + torch.eye(N, dtype=F64), normal(LANES, N, seed=4)
    A[list(SADDLE)] = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=F64))
    A[list(SINGULAR)] = 0
    b[list(SADDLE + SINGULAR)] = 0
    v = normal(LANES, N, seed=5)
    v[list(NAN_COTANGENT), 0] = torch.nan
    return A, b, v


def gradient(on_failure, linear_solver=None, lanes=slice(None)):
    """The derivative with respect to b, which is A⁻¹v, and the solution."""
    A, b, v = (t[lanes] for t in stationary_data())
    b = b.clone().requires_grad_()
    adjoint = il.Implicit(linear_solver or il.CG(), on_failure=on_failure)
    solution = solve(A, b, il.LBFGS(), "raise", adjoint)
    return torch.autograd.grad(solution.value, b, v)[0], solution


def assert_good_gradients_are_right(g):
    A, _, v = stationary_data()
    expected = torch.linalg.solve(A[ADJOINT_GOOD], v[ADJOINT_GOOD])
    # CG's default tolerance is 1e-8 relative to v.
    torch.testing.assert_close(g[ADJOINT_GOOD], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("linear_solver", [il.CG(), il.Dense()], ids=["cg", "dense"])
def test_good_gradients_are_right_and_bitwise_unaffected(linear_solver):
    g, solution = gradient("ignore", linear_solver)
    assert_good_gradients_are_right(g)
    alone, without = gradient("raise", linear_solver, ADJOINT_GOOD)
    assert torch.equal(g[ADJOINT_GOOD], alone)
    assert torch.equal(solution.adjoint.steps[ADJOINT_GOOD], without.adjoint.steps)
    assert (solution.status == il.Status.CONVERGED).all()
    # A direct solve can do with an indefinite matrix.
    solvable = SADDLE if isinstance(linear_solver, il.Dense) else ()
    failing = {lane: status for lane, status in EXPECTED_STATUS.items() if lane not in solvable}
    statuses = solution.adjoint.status
    assert {lane: il.Status(int(statuses[lane])) for lane in range(LANES) if statuses[lane] != 0} == failing


def test_adjoint_raise_names_the_ten():
    with pytest.raises(il.AdjointError) as error:
        gradient("raise")
    assert_names(str(error.value), ADJOINT_BAD)
    assert "lane 3: INDEFINITE" in str(error.value)
    assert "lane 11: SINGULAR" in str(error.value)


def test_adjoint_warn_names_the_ten():
    with pytest.warns(il.AdjointWarning) as caught:
        g, _ = gradient("warn")
    assert len(caught) == 1
    assert_names(str(caught[0].message), ADJOINT_BAD)
    assert_good_gradients_are_right(g)


def test_adjoint_warns_by_default():
    A, b, v = stationary_data()
    b = b.clone().requires_grad_()
    x = vmap(lambda A, b: il.argmin(objective, torch.zeros(N, dtype=F64), A, b).value)(A, b)
    with pytest.warns(il.AdjointWarning, match="failed in 10 of 1000 lanes"):
        torch.autograd.grad(x, b, v)


def test_adjoint_ignore_and_nan():
    ignored, _ = gradient("ignore")
    marked, _ = gradient("nan")
    assert_good_gradients_are_right(ignored)
    assert torch.equal(marked[ADJOINT_GOOD], ignored[ADJOINT_GOOD])
    assert marked[ADJOINT_BAD].isnan().all()


def test_forward_policy_does_not_reach_the_adjoint():
    A, b, v = stationary_data()
    b = b.clone().requires_grad_()
    solution = solve(A, b, il.LBFGS(), "nan", il.Implicit(on_failure="raise"))
    assert solution.value.isfinite().all()
    with pytest.raises(il.AdjointError):
        torch.autograd.grad(solution.value, b, v)


@pytest.mark.parametrize("policy", ["raise", "nan"])
def test_adjoint_policy_under_vmapped_jacobians(policy):
    A, b, _ = stationary_data()
    adjoint = il.Implicit(on_failure=policy)

    def jacobian(A, b):
        start = torch.zeros(N, dtype=F64)
        return jacrev(lambda b: il.argmin(objective, start, A, b, adjoint=adjoint).value)(b)

    if policy == "raise":
        with pytest.raises(il.AdjointError, match="of 60 lanes"):
            vmap(jacobian)(A[:20], b[:20])
    else:
        J = vmap(jacobian)(A[:20], b[:20])
        good = [lane for lane in range(20) if lane not in SADDLE + SINGULAR]
        torch.testing.assert_close(J[good], torch.linalg.inv(A[good]), rtol=0, atol=1e-7)
        # The cotangents of a saddle point's Jacobian are unit vectors, eigenvectors of its matrix: two are solvable.
        assert J[3].isnan().any(-1).tolist() == [False, True, False]
        assert J[11].isnan().all()


@pytest.mark.parametrize("policy", ["ignore", "nan"])
def test_gradients_of_good_lanes_survive_failed_forward_solves(policy):
    A, b = data()
    b = b.clone().requires_grad_()
    solution = solve(A, b, QUICK, policy)
    ok = solution.status == il.Status.CONVERGED
    (g,) = torch.autograd.grad(torch.where(ok[:, None], solution.value, 0).sum(), b)
    expected = torch.linalg.solve(A[GOOD], torch.ones(len(GOOD), N, dtype=F64))
    torch.testing.assert_close(g[GOOD], expected, rtol=0, atol=1e-7)


def test_shared_parameters_survive_diverged_lanes_that_the_loss_leaves_out():
    b = normal(6, N, seed=6)
    shift = torch.tensor(0.5, dtype=F64, requires_grad=True)
    scale = torch.ones(6, dtype=F64)
    scale[2] = -1.0

    def layer(b, s):
        # Unbounded below in lane 2, where gradient descent runs off to infinity.
        f = lambda x: s * (1 + shift) * x.square().sum() / 2 - (b * x).sum()  # noqa: E731
        solver, start = il.GradientDescent(lr=0.5), torch.zeros(N, dtype=F64)
        solution = il.argmin(f, start, solver=solver, adjoint=il.Implicit(on_failure="ignore"), on_failure="ignore")
        return solution.value, solution.status

    value, status = vmap(layer)(b, scale)
    assert status.tolist() == [0, 0, il.Status.NON_FINITE, 0, 0, 0]
    (g,) = torch.autograd.grad(torch.where((status == 0)[:, None], value, 0).sum(), shift)
    expected = -b[[0, 1, 3, 4, 5]].sum() / 1.5**2
    torch.testing.assert_close(g, expected, rtol=0, atol=1e-6)


def test_unrolled_lanes_fail_alone_too():
    A, b = data()
    solver = il.GradientDescent(lr=0.2, max_steps=200)
    solution = solve(A, b, solver, "ignore", il.Unrolled())
    assert_good_lanes_are_right(solution.value)
    assert (solution.status[BAD] != il.Status.CONVERGED).all()
    with pytest.raises(il.SolveError) as error:
        solve(A, b, solver, "raise", il.Unrolled())
    assert_names(str(error.value), BAD)


def test_one_lane_is_the_unbatched_problem():
    A, b = data()
    alone = il.argmin(quadratic, torch.zeros(N, dtype=F64), A[1], b[1])
    lane = solve(A[1:2], b[1:2], il.LBFGS())
    torch.testing.assert_close(lane.value[0], alone.value, rtol=0, atol=1e-12)
    assert lane.status.shape == (1,)
    assert alone.status.shape == ()


# --- no lanes at all ----------------------------------------------------------------------------------------

EMPTY = torch.zeros(0, 2, dtype=F64)
ONE_OF_TWO = torch.zeros(2, dtype=F64)
WITHOUT_LANES = {
    "argmin": lambda a: il.argmin(lambda x: (x - a).square().sum(), ONE_OF_TWO).value,
    "certified": lambda a: il.argmin(lambda x: (x - a).square().sum(), ONE_OF_TWO, gradient_tol=1e-3).value,
    "lasso": lambda a: il.argmin(lambda x: (x - a).square().sum(), ONE_OF_TWO, regularizer=il.Lasso(0.1)).value,
    "simplex": lambda a: il.argmin(lambda x: (x - a).square().sum(), ONE_OF_TWO, regularizer=il.Simplex()).value,
    "root": lambda a: il.root(lambda x: x - a, ONE_OF_TWO).value,
    "fixed point": lambda a: il.fixed_point(lambda x: x / 2 - a, ONE_OF_TWO).value,
    "least squares": lambda a: il.least_squares(lambda x: x - a, ONE_OF_TWO).value,
    "linear": lambda a: il.linear_solve(lambda x: 2 * x, a).value,
    "quadratic program": lambda a: il.quadratic_program(torch.eye(2, dtype=F64), a).value.x,
}


@pytest.mark.parametrize("problem", WITHOUT_LANES)
def test_a_vmap_without_lanes_gives_nothing(problem):
    layer = WITHOUT_LANES[problem]
    assert vmap(layer)(EMPTY).shape == (0, 2)
    assert grad(lambda a: vmap(layer)(a).sum())(EMPTY).shape == (0, 2)
    assert jvp(vmap(layer), (EMPTY,), (EMPTY,))[1].shape == (0, 2)
