"""Quadratic programs: values and multipliers against closed forms, SciPy and the conditions that define them."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch.func import jacrev

import implicitlayers as il
from tests.helpers.problems import F64, normal
from tests.helpers.programs import (
    ACTIVE,
    ORACLE,
    PROGRAM,
    M,
    N,
    P,
    assert_near,
    assert_optimal,
    layer,
    random_program,
    times,
)

# --- values -----------------------------------------------------------------------------------------------------------


def test_the_textbook_example_and_the_sign_of_its_multiplier():
    Q, one = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=F64), torch.ones(2, dtype=F64)
    solution = il.quadratic_program(Q, one, one[None], one[:1], -torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))
    assert_near(solution.value.x, torch.tensor([0.25, 0.75], dtype=F64), 1e-15)
    assert_near(solution.value.equality, torch.tensor([-2.75], dtype=F64), 1e-15)
    assert_near(solution.value.inequality, torch.zeros(2, dtype=F64), 1e-15)
    assert_near(solution.stats.objective, torch.tensor(1.875, dtype=F64), 1e-15)
    assert solution.status == il.Status.CONVERGED
    assert solution.stats.residual < 1e-14


def test_the_test_program_has_active_and_inactive_constraints():
    assert 0 < ACTIVE.sum() < M
    assert_near(layer(*PROGRAM), ORACLE(*PROGRAM))


def test_random_batches_are_optimal_and_agree_with_scipy():
    program = random_program(20, 30, n=6, p=2, m=9)
    solution = il.quadratic_program(*program)
    assert_optimal(program, solution.value)
    # Without the corrector it takes twice as many.
    assert solution.stats.steps.max() <= 12
    for lane in range(3):
        Q, q, A, b, G, h = (t[lane].numpy() for t in program)
        reference = minimize(
            lambda x, Q=Q, q=q: x @ Q @ x / 2 + q @ x,
            np.zeros(6),
            jac=lambda x, Q=Q, q=q: Q @ x + q,
            method="SLSQP",
            constraints=[
                {"type": "eq", "fun": lambda x, A=A, b=b: A @ x - b},
                {"type": "ineq", "fun": lambda x, G=G, h=h: h - G @ x},
            ],
            options={"ftol": 1e-15},
        )
        # SLSQP stops when the objective does, which is the square of the distance.
        assert_near(solution.value.x[lane], torch.from_numpy(reference.x), 1e-6)
        assert abs(solution.stats.objective[lane].item() - reference.fun) < 1e-8 * (1 + abs(reference.fun))


def test_linear_programs_agree_with_scipy():
    program = random_program(40, 12, n=4, p=1, m=6)
    program = (torch.zeros_like(program[0]), *program[1:])
    solution = il.quadratic_program(*program, on_failure="ignore")
    c, A, b, G, h = (t.numpy() for t in program[1:])
    seen = set()
    for lane in range(12):
        free = [(None, None)] * 4
        reference = linprog(c[lane], A_ub=G[lane], b_ub=h[lane], A_eq=A[lane], b_eq=b[lane], bounds=free)
        expected = {0: il.Status.CONVERGED, 3: il.Status.UNBOUNDED}[reference.status]
        assert solution.status[lane] == expected
        seen.add(expected)
        if reference.status == 0:
            assert_near(solution.value.x[lane], torch.from_numpy(reference.x), 1e-9)
            assert_near(solution.value.inequality[lane], -torch.from_numpy(reference.ineqlin.marginals), 1e-9)
    assert len(seen) == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_a_singular_Q_where_the_solution_is_unique(rank):
    L = normal(10, 5, rank, seed=60)
    _, q, A, b, _, _ = random_program(61, 10, n=5, p=1, m=0)
    G, h = torch.cat([torch.eye(5, dtype=F64), -torch.eye(5, dtype=F64)]), torch.full((10,), 4.0, dtype=F64)
    program = (L @ L.mT, q, A, b, G, h)
    assert_optimal(program, il.quadratic_program(*program).value)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("which", ["objective", "solution", "rows"])
def test_units_do_not_matter(scale, which):
    Q, q, A, b, G, h = PROGRAM
    scaled, factors = {
        "objective": ((Q * scale, q * scale, A, b, G, h), (1, scale, scale)),
        "solution": ((Q / scale, q, A, b * scale, G, h * scale), (scale, 1, 1)),
        "rows": ((Q, q, A * scale, b * scale, G * scale, h * scale), (1, 1 / scale, 1 / scale)),
    }[which]
    for ours, expected, factor in zip(
        il.quadratic_program(*scaled).value, ORACLE(*PROGRAM).split([N, P, M]), factors, strict=True
    ):
        assert_near(ours / factor, expected)


@pytest.mark.parametrize("distance", [1e6, 1e12, 1e18])
def test_a_bound_far_away_is_no_bound(distance):
    far = torch.where(ACTIVE, PROGRAM[-1], torch.full_like(PROGRAM[-1], distance))
    q = PROGRAM[1].clone().requires_grad_()
    value = layer(PROGRAM[0], q, *PROGRAM[2:5], far)
    assert_near(value, ORACLE(*PROGRAM))
    weights = normal(N + P + M, seed=70)
    (g,) = torch.autograd.grad(value, q, weights)
    assert_near(g, jacrev(ORACLE, argnums=1)(*PROGRAM).T @ weights)


@pytest.mark.parametrize("distance", [1e12, 1e300])
@pytest.mark.parametrize("curved", [True, False], ids=["quadratic", "linear"])
def test_far_bounds_beside_others_in_many_lanes(curved, distance):
    Q, q, A, b, G, h = random_program(160, 20, n=5, p=1, m=8)
    box = torch.eye(5, dtype=F64).expand(20, 5, 5)
    G, h = torch.cat([G, box, -box], -2), torch.cat([h, torch.full((20, 10), 5.0, dtype=F64)], -1)
    Q = Q * curved
    without = il.quadratic_program(Q, q, A, b, G[:, 2:], h[:, 2:]).value
    far = h.clone()
    far[:, :2] = distance
    assert_near(il.quadratic_program(Q, q, A, b, G, far).value.x, without.x, 1e-9)


def test_projections_onto_simplex_and_box():
    y = normal(8, 5, seed=50)
    eye, zero, one = torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64), torch.ones(1, 5, dtype=F64)
    simplex = il.quadratic_program(eye, -y, one, one[0, :1], -eye, zero).value
    descending = y.sort(-1, descending=True).values
    thresholds = (descending.cumsum(-1) - 1) / torch.arange(1, 6, dtype=F64)
    support = (descending > thresholds).sum(-1, keepdim=True)
    assert_near(simplex.x, (y - thresholds.gather(-1, support - 1)).clamp_min(0))
    jacobian = jacrev(lambda y: il.quadratic_program(eye, -y, one, one[0, :1], -eye, zero).value.x)(y[0])
    on = (simplex.x[0] > 0).to(F64)
    assert_near(jacobian, torch.diag(on) - torch.outer(on, on) / on.sum())
    box = il.quadratic_program(eye, -y, G=torch.cat([eye, -eye]), h=torch.full((10,), 0.5, dtype=F64)).value
    assert_near(box.x, y.clamp(-0.5, 0.5))
    assert_near(box.inequality[:, :5], (y - 0.5).clamp_min(0))
    assert box.equality.shape == (8, 0)


def test_without_inequalities_it_is_one_linear_solve():
    Q, q, A, b, _, _ = random_program(80, 4)
    solution = il.quadratic_program(Q, q, A, b)
    K = torch.cat([torch.cat([Q, A.mT], -1), torch.cat([A, torch.zeros(4, P, P, dtype=F64)], -1)], -2)
    expected = torch.linalg.solve(K, torch.cat([-q, b], -1))
    assert_near(torch.cat([solution.value.x, solution.value.equality], -1), expected)
    assert solution.stats.steps.max() <= 1
    free = il.quadratic_program(Q, q).value
    assert_near(free.x, -torch.linalg.solve(Q, q))


def test_inference_mode_and_what_was_made_in_it():
    with torch.inference_mode():
        program = [t.clone() for t in PROGRAM]
        assert_near(layer(*program), ORACLE(*PROGRAM))
    q = PROGRAM[1].clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(program[0], q, *program[2:]).sum(), q)
    assert_near(g, jacrev(ORACLE, argnums=1)(*PROGRAM).sum(0))


def test_single_precision_reaches_its_floor():
    program = [t.float() for t in PROGRAM]
    value = layer(*program)
    assert value.dtype == torch.float32
    # Machine epsilon 1.2e-7 times a condition number of the order of a hundred.
    assert_near(value.double(), ORACLE(*PROGRAM), 1e-5)
    ours = jacrev(layer, argnums=1)(*program)
    assert_near(ours.double(), jacrev(ORACLE, argnums=1)(*PROGRAM), 1e-5)


# --- where there is no derivative -------------------------------------------------------------------------------------

EYE, ZERO = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
DEGENERATE = {
    "an equation stated twice": (EYE, ZERO + 1, torch.ones(2, 2, dtype=F64), ZERO + 1, None, None),
    "active without a multiplier": (EYE, ZERO, None, None, EYE[:1], ZERO[:1]),
    "active without a multiplier, far from zero": (
        EYE,
        torch.tensor([-300.0, -700.0], dtype=F64),
        None,
        None,
        torch.full((1, 2), 0.3, dtype=F64),
        torch.tensor([300.0], dtype=F64),
    ),
    "three lines through a corner of the plane": (
        0 * EYE,
        ZERO - 1,
        None,
        None,
        torch.cat([EYE, torch.ones(1, 2, dtype=F64)]),
        torch.tensor([1.0, 1.0, 2.0], dtype=F64),
    ),
    "a flat direction": (torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), ZERO, None, None, EYE, ZERO + 1),
}


@pytest.mark.parametrize("program", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_the_solve_succeeds_and_the_derivative_says_singular(program):
    q = program[1].clone().requires_grad_()
    solution = il.quadratic_program(program[0], q, *program[2:])
    assert solution.status == il.Status.CONVERGED
    assert solution.stats.residual < 1e-9
    with pytest.warns(il.AdjointWarning, match="SINGULAR"):
        solution.value.x.sum().backward()
    assert solution.adjoint.status == il.Status.SINGULAR


def test_rounding_of_slack_and_multiplier_is_no_strict_complementarity():
    # The free minimizer lies on the constraint, and its entries are of order a thousand.
    Q, q, _, _, G, _ = random_program(140, 20, n=3, p=0, m=1)
    q = (300 * q).requires_grad_()
    h = times(G, -torch.linalg.solve(Q, q.detach()))
    solution = il.quadratic_program(Q, q, G=G, h=h, adjoint=il.Implicit(il.Dense(), on_failure="ignore"))
    solution.value.x.sum().backward()
    assert (solution.adjoint.status == il.Status.SINGULAR).all()


def test_the_report_of_the_derivative():
    q = PROGRAM[1].clone().requires_grad_()
    solution = il.quadratic_program(PROGRAM[0], q, *PROGRAM[2:])
    assert solution.adjoint == il.AdjointReport()
    solution.value.x.sum().backward()
    assert solution.adjoint.status == il.Status.CONVERGED
    assert solution.adjoint.residual < 1e-13
    assert solution.adjoint.damping == 0.0


# --- other libraries --------------------------------------------------------------------------------------------------


def test_qpth_agrees():
    qp = pytest.importorskip("qpth.qp", reason="qpth is not installed")
    Q, q, A, b, G, h = random_program(130, 4)
    theirs = qp.QPFunction(verbose=-1)(Q, q, G, h, A, b)
    assert_near(il.quadratic_program(Q, q, A, b, G, h).value.x, theirs, 1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cvxpylayers")
def test_cvxpylayers_agrees():
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    layers = pytest.importorskip("cvxpylayers.torch", reason="cvxpylayers is not installed")
    x, root, q, h = cp.Variable(N), cp.Parameter((N, N)), cp.Parameter(N), cp.Parameter(M)
    A, b, G = (t.numpy() for t in PROGRAM[2:5])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(root @ x) / 2 + q @ x), [A @ x == b, G @ x <= h])
    theirs = layers.CvxpyLayer(problem, [root, q, h], [x])
    tensors = [PROGRAM[1].clone().requires_grad_(), PROGRAM[5].clone().requires_grad_()]
    (value,) = theirs(torch.linalg.cholesky(PROGRAM[0]).mT, *tensors, solver_args={"eps": 1e-12})
    ours = il.quadratic_program(PROGRAM[0], tensors[0], *PROGRAM[2:5], tensors[1]).value.x
    assert_near(ours, value, 1e-5)
    for mine, expected in zip(
        torch.autograd.grad(ours.sum(), tensors), torch.autograd.grad(value.sum(), tensors), strict=True
    ):
        assert_near(mine, expected, 1e-4)
