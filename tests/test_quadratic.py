"""Quadratic programs: values and multipliers, all six derivatives, lanes, and what cannot be solved."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayers as il
from tests.helpers.problems import F64, each, normal

N, P, M = 3, 1, 4
NAMES = ("Q", "q", "A", "b", "G", "h")
ALL = tuple(range(6))
# Rounding times condition numbers up to a thousand, for quantities of order one.
TOL = 1e-10


def random_program(seed, *lanes, n=N, p=P, m=M):
    """A feasible program: a point of it is drawn first."""
    L, point = normal(*lanes, n, n, seed=seed), normal(*lanes, n, seed=seed + 1)
    A, G = normal(*lanes, p, n, seed=seed + 2), normal(*lanes, m, n, seed=seed + 3)
    room = normal(*lanes, m, seed=seed + 4).abs() / 2
    Q = L @ L.mT + 0.5 * torch.eye(n, dtype=F64)
    return Q, 3 * normal(*lanes, n, seed=seed + 5), A, times(A, point), G, times(G, point) + room


def times(A, x):
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def layer(*program, **options):
    return torch.cat(il.quadratic_program(*program, **options).value, dim=-1)


def active_set_solution(active):
    """The solution as a differentiable linear solve: active inequalities are equations, the others are not there."""
    where = torch.nonzero(active)[:, 0]

    def oracle(Q, q, A, b, G, h):
        B = torch.cat([A, G[where]])
        K = torch.cat([torch.cat([(Q + Q.mT) / 2, B.mT], 1), torch.cat([B, torch.zeros(len(B), len(B), dtype=F64)], 1)])
        y = torch.linalg.inv(K) @ torch.cat([-q, b, h[where]])
        head = len(q) + len(b)
        return torch.cat([y[:head], torch.zeros_like(h).index_put((where,), y[head:])])

    return oracle


PROGRAM = random_program(13)
ACTIVE = il.quadratic_program(*PROGRAM).value.inequality > 0
ORACLE = active_set_solution(ACTIVE)


def assert_near(ours, expected, tol=TOL):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def assert_optimal(program, value, tol=TOL):
    """The conditions of Karush, Kuhn and Tucker, which a convex program needs no more than."""
    Q, q, A, b, G, h = program
    x, nu, lam = value
    assert_near(times(Q, x) + q + times(A.mT, nu) + times(G.mT, lam), torch.zeros_like(x), tol)
    assert_near(times(A, x), b.expand_as(nu), tol)
    slack = h - times(G, x)
    assert slack.min() >= -tol
    assert lam.min() >= 0
    assert_near(lam * slack, torch.zeros_like(lam), tol)


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


def test_a_bound_far_away_is_no_bound():
    far = torch.where(ACTIVE, PROGRAM[-1], torch.full_like(PROGRAM[-1], 1e12))
    q = PROGRAM[1].clone().requires_grad_()
    value = layer(PROGRAM[0], q, *PROGRAM[2:5], far)
    assert_near(value, ORACLE(*PROGRAM))
    weights = normal(N + P + M, seed=70)
    (g,) = torch.autograd.grad(value, q, weights)
    assert_near(g, jacrev(ORACLE, argnums=1)(*PROGRAM).T @ weights)


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


def test_single_precision_reaches_its_floor():
    program = [t.float() for t in PROGRAM]
    value = layer(*program)
    assert value.dtype == torch.float32
    # Machine epsilon 1.2e-7 times a condition number of the order of a hundred.
    assert_near(value.double(), ORACLE(*PROGRAM), 1e-5)
    ours = jacrev(layer, argnums=1)(*program)
    assert_near(ours.double(), jacrev(ORACLE, argnums=1)(*PROGRAM), 1e-5)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_all_six_first_derivatives_against_the_active_set(mode):
    for name, ours, expected in zip(
        NAMES, mode(layer, argnums=ALL)(*PROGRAM), jacrev(ORACLE, argnums=ALL)(*PROGRAM), strict=True
    ):
        assert expected.abs().max() > 1e-2, name
        assert_near(ours, expected)


@pytest.mark.parametrize("which", ALL, ids=NAMES)
def test_first_derivatives_against_finite_differences(which):
    direction, step = normal(*PROGRAM[which].shape, seed=90), 1e-5
    program = list(PROGRAM)

    def moved(t):
        program[which] = PROGRAM[which] + t * direction
        return layer(*program)

    difference = (moved(step) - moved(-step)) / (2 * step)
    _, ours = jvp(lambda t: layer(*PROGRAM[:which], t, *PROGRAM[which + 1 :]), (PROGRAM[which],), (direction,))
    # Truncation, step² times third derivatives of up to a hundred, and rounding over the step.
    assert_near(ours, difference, 1e-7)


def scalar(f):
    weights = normal(N + P + M, seed=91)
    return lambda *program: (f(*program) * weights).sin().sum()


@pytest.mark.parametrize(
    "second",
    [
        hessian,
        lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
        lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
    ],
    ids=["forward-reverse", "reverse-reverse", "forward-forward"],
)
def test_all_second_derivatives_against_the_active_set(second):
    ours = second(scalar(layer), ALL)(*PROGRAM)
    expected = jacrev(jacrev(scalar(ORACLE), ALL), ALL)(*PROGRAM)
    for mine, theirs in zip(ours, expected, strict=True):
        for block, reference in zip(mine, theirs, strict=True):
            assert_near(block, reference, 1e-8)


def test_double_backward_against_finite_differences():
    leaf, direction, step = PROGRAM[0].clone().requires_grad_(), normal(N, N, seed=92), 1e-5

    def slope(Q):
        return torch.autograd.grad(scalar(layer)(Q, *PROGRAM[1:]), Q, create_graph=True)[0]

    (ours,) = torch.autograd.grad((slope(leaf) * direction).sum(), leaf)
    ahead, behind = (slope((leaf.detach() + t * direction).requires_grad_()) for t in (step, -step))
    assert_near(ours, ((ahead - behind) / (2 * step)).detach(), 1e-6)


def test_the_derivative_in_Q_is_symmetric_and_only_its_symmetric_part_counts():
    skew = normal(N, N, seed=93) * 1e-3
    skew = skew - skew.mT
    assert_near(layer(PROGRAM[0] + skew, *PROGRAM[1:]), layer(*PROGRAM))
    g = grad(lambda Q: layer(Q, *PROGRAM[1:]).sum())(PROGRAM[0])
    assert_near(g, g.mT, 1e-14)


def test_multipliers_are_the_prices_of_the_right_hand_sides():
    def value(b, h):
        x = il.quadratic_program(*PROGRAM[:3], b, PROGRAM[4], h).value.x
        return x @ PROGRAM[0] @ x / 2 + PROGRAM[1] @ x

    db, dh = grad(value, argnums=(0, 1))(PROGRAM[3], PROGRAM[5])
    _, nu, lam = layer(*PROGRAM).split([N, P, M])
    assert_near(db, -nu)
    assert_near(dh, -lam)


def test_inside_an_argmin_it_is_differentiated_through():
    # The inner solution, x₁ = t and x₂ = 0, is known; the outer minimum of (t - 1)² + θ t is at 1 - θ/2.
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)

    def objective(t, theta):
        x = il.quadratic_program(eye, torch.stack([-t, 0 * t + 1]), G=-eye, h=zero).value.x
        return (x[0] - 1) ** 2 + theta * x[0]

    def outer(theta):
        solver = il.Newton(rtol=1e-12)
        return il.argmin(objective, torch.tensor(0.5, dtype=F64), theta, solver=solver).value

    theta = torch.tensor(0.4, dtype=F64)
    assert_near(outer(theta), torch.tensor(0.8, dtype=F64))
    assert_near(grad(outer)(theta), torch.tensor(-0.5, dtype=F64))


# --- lanes ------------------------------------------------------------------------------------------------------------


def test_shared_tensors_get_the_sum_and_lanes_broadcast():
    Q, _, A, b, G, h = PROGRAM
    q = normal(2, 3, N, seed=100)
    h = h + normal(3, M, seed=101).abs()
    program = (Q, q, A[None], b, G.expand(2, 1, M, N), h)

    def by_hand(f):
        rows = [f(Q, q[i, j], A, b, G, h[j]) for i in range(2) for j in range(3)]
        return torch.stack(rows).reshape(2, 3, -1)

    solution = il.quadratic_program(*program)
    assert solution.status.shape == solution.stats.steps.shape == (2, 3)
    assert_near(layer(*program), by_hand(layer))
    ours = grad(lambda Q, h: layer(Q, q, A[None], b, program[4], h).sin().sum(), argnums=(0, 1))(Q, h)
    shared = [
        grad(lambda Q, h, i=i, j=j: layer(Q, q[i, j], A, b, G, h).sin().sum(), argnums=(0, 1))(Q, h[j])
        for i in range(2)
        for j in range(3)
    ]
    assert_near(ours[0], sum(g for g, _ in shared))
    assert_near(ours[1], torch.stack([g for _, g in shared]).reshape(2, 3, M).sum(0))


def test_vmap_over_one_tensor_over_all_and_over_native_lanes():
    program = random_program(110, 3)
    assert_near(vmap(layer)(*program), layer(*program))
    q = normal(3, N, seed=111)
    assert_near(
        vmap(lambda q: layer(PROGRAM[0], q, *PROGRAM[2:]))(q), each(lambda q: layer(PROGRAM[0], q, *PROGRAM[2:]), q)
    )
    several = torch.stack([PROGRAM[3], PROGRAM[3] + 0.01])
    nested = vmap(lambda b: layer(PROGRAM[0], q, *PROGRAM[2:3], b, *PROGRAM[4:]))(several)
    assert nested.shape == (2, 3, N + P + M)
    assert_near(nested[1], each(lambda q: layer(PROGRAM[0], q, PROGRAM[2], several[1], *PROGRAM[4:]), q))


def test_jacobians_of_all_lanes_at_once():
    program = random_program(110, 3)
    ours = vmap(jacrev(layer, argnums=(1, 5)))(*program)
    forward = vmap(jacfwd(layer, argnums=(1, 5)))(*program)
    for lane in range(3):
        single = [t[lane] for t in program]
        oracle = active_set_solution(layer(*single)[N + P :] > 0)
        for mine, also, expected in zip(ours, forward, jacrev(oracle, argnums=(1, 5))(*single), strict=True):
            assert_near(mine[lane], expected, 1e-8)
            assert_near(also[lane], expected, 1e-8)


def failing_lanes():
    """Lanes 1 to 4 are infeasible, not convex, unbounded and NaN; 0 and 5 are fine."""
    Q = torch.eye(2, dtype=F64).repeat(6, 1, 1)
    q = normal(6, 2, seed=120)
    G = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=F64)
    h = torch.ones(6, 2, dtype=F64)
    h[1] = torch.tensor([-1.0, 0.5], dtype=F64)
    Q[2, 1, 1] = -1
    Q[3], q[3] = 0, torch.tensor([1.0, -1.0], dtype=F64)
    q[4, 0] = torch.nan
    return Q, q, None, None, G, h


FAILURES = {1: "INFEASIBLE", 2: "INDEFINITE", 3: "UNBOUNDED", 4: "NON_FINITE"}


def test_lanes_fail_alone():
    Q, q, _, _, G, h = failing_lanes()
    solution = il.quadratic_program(*failing_lanes(), on_failure="ignore")
    statuses = {lane: il.Status(int(code)).name for lane, code in enumerate(solution.status)}
    assert statuses == {0: "CONVERGED", 5: "CONVERGED", **FAILURES}
    for lane in (0, 5):
        assert_near(solution.value.x[lane], il.quadratic_program(Q[lane], q[lane], G=G, h=h[lane]).value.x, 1e-14)
    marked = il.quadratic_program(*failing_lanes(), on_failure="nan").value.x
    assert marked[[1, 2, 3, 4]].isnan().all()
    assert_near(marked[[0, 5]], solution.value.x[[0, 5]], 0)
    with pytest.raises(il.SolveError, match=r"failed in 4 of 6 lanes") as error:
        il.quadratic_program(*failing_lanes())
    for lane, name in FAILURES.items():
        assert f"lane {lane}: {name}" in str(error.value)
        assert il.Status[name].remedy in str(error.value)
    with pytest.warns(il.SolveWarning, match="INFEASIBLE"):
        il.quadratic_program(*failing_lanes(), on_failure="warn")


def test_good_lanes_are_differentiated_beside_bad_ones():
    Q, q, _, _, G, h = failing_lanes()
    keep = [0, 1, 5]
    shared = G.clone().requires_grad_()
    adjoint = il.Implicit(il.Dense(), on_failure="ignore")
    x = il.quadratic_program(Q[keep], q[keep], G=shared, h=h[keep], adjoint=adjoint, on_failure="ignore").value.x
    (g,) = torch.autograd.grad(x[[0, 2]].sin().sum(), shared)
    expected = grad(lambda G: il.quadratic_program(Q[[0, 5]], q[[0, 5]], G=G, h=h[[0, 5]]).value.x.sin().sum())(G)
    assert_near(g, expected)


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-6])
def test_contradictions_are_found_however_small(gap):
    one = torch.ones(1, dtype=F64)
    G = torch.tensor([[1.0], [-1.0]], dtype=F64)
    touching = il.quadratic_program(one[None], one, G=G, h=torch.tensor([1.0, gap - 1], dtype=F64))
    assert touching.status == il.Status.CONVERGED
    contradiction = torch.tensor([1.0, -1 - gap], dtype=F64)
    apart = il.quadratic_program(one[None], one, G=G, h=contradiction, on_failure="ignore")
    assert apart.status == il.Status.INFEASIBLE
    equations = il.quadratic_program(one[None], one, -G, contradiction, on_failure="ignore")
    # Equations that differ by so little that their multipliers cannot tell from rounding are not called infeasible.
    assert equations.status == (il.Status.INFEASIBLE if gap > 1e-5 else il.Status.STALLED)


def test_the_step_limit_is_kept_and_a_fixed_number_of_steps_is_not_checked():
    first = il.quadratic_program(*PROGRAM, solver=il.InteriorPoint(max_steps=1), on_failure="ignore")
    assert first.stats.steps == 1
    fixed = il.quadratic_program(*PROGRAM, solver=il.InteriorPoint(rtol=None, atol=None, max_steps=40))
    assert fixed.status == il.Status.NOT_CHECKED
    assert fixed.stats.steps == 40
    assert_near(torch.cat(fixed.value), ORACLE(*PROGRAM))


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


def test_the_report_of_the_derivative():
    q = PROGRAM[1].clone().requires_grad_()
    solution = il.quadratic_program(PROGRAM[0], q, *PROGRAM[2:])
    assert solution.adjoint == il.AdjointReport()
    solution.value.x.sum().backward()
    assert solution.adjoint.status == il.Status.CONVERGED
    assert solution.adjoint.residual < 1e-13
    assert solution.adjoint.damping == 0.0


# --- misuse -----------------------------------------------------------------------------------------------------------

Q2, ROW = torch.eye(2, dtype=F64), torch.ones(1, 2, dtype=F64)
MISUSES = {
    "half an equation": (dict(A=ROW), ["one of A and b is None", "both, or neither"]),
    "half an inequality": (dict(h=ZERO), ["one of G and h is None"]),
    "a number": (dict(A=ROW, b=1.0), ["b is a float", "torch.tensor"]),
    "a list": (dict(G=[[1.0, 1.0]], h=ZERO[:1]), ["G is a list"]),
    "another shape of Q": (dict(Q=torch.eye(3, dtype=F64)), ["Q has shape (3, 3)", "[..., 2, 2]"]),
    "a vector for a matrix": (dict(A=ZERO, b=ZERO[:1]), ["A has shape (2,)", "[..., "]),
    "a row too many": (dict(G=ROW, h=ZERO), ["h has shape (2,)", "[..., 1]"]),
    "lanes that do not broadcast": (
        dict(q=torch.zeros(3, 2, dtype=F64), Q=Q2.repeat(2, 1, 1)),
        ["do not broadcast", "Q (2,)", "q (3,)"],
    ),
    "no lanes": (dict(q=torch.zeros(0, 2, dtype=F64)), ["(0,)", "no problem"]),
    "nothing to solve for": (dict(q=ZERO[:0], Q=Q2[:0, :0]), ["no elements"]),
    "no vector": (dict(q=ZERO[0]), ["q is no vector"]),
    "half precision": (dict(q=ZERO.half()), ["float16", "float32 or float64"]),
    "integers": (dict(q=torch.zeros(2, dtype=torch.int64)), ["int64", "float32 or float64"]),
    "two dtypes": (dict(Q=Q2.float()), ["Q is torch.float32", "one dtype"]),
    "a triangle": (dict(Q=torch.tensor([[4.0, 1.0], [0.0, 2.0]], dtype=F64)), ["Q is not symmetric", "full matrix"]),
    "a triangle in one lane": (dict(Q=torch.stack([Q2, Q2 + Q2.flip(0).triu()])), ["not symmetric in 1 lanes"]),
    "a solver of another kind": (dict(solver=il.Newton()), ["solver is Newton", "no InteriorPoint"]),
    "a solver class": (dict(solver=il.InteriorPoint), ["the class InteriorPoint", "instance"]),
    "an adjoint of another kind": (dict(adjoint=il.Unrolled()), ["adjoint is Unrolled", "Implicit("]),
    "no adjoint": (dict(adjoint=il.CG()), ["no Adjoint"]),
    "a symmetric linear solver": (dict(adjoint=il.Implicit(il.CG())), ["CG solves symmetric systems only", "Dense()"]),
    "gauss-newton": (dict(adjoint=il.Implicit(curvature="gauss_newton")), ["gauss_newton", "leave curvature out"]),
    "a policy": (dict(on_failure="print"), ["on_failure is 'print'"]),
}


@pytest.mark.parametrize(("change", "words"), MISUSES.values(), ids=MISUSES.keys())
def test_calls_that_cannot_mean_what_they_say(change, words):
    with pytest.raises(il.MisuseError, match="(?s)" + ".*".join(map(re.escape, words))):
        il.quadratic_program(**{"Q": Q2, "q": ZERO, **change})


# --- other libraries --------------------------------------------------------------------------------------------------


def test_qpth_agrees():
    qp = pytest.importorskip("qpth.qp", reason="qpth is not installed")
    Q, q, A, b, G, h = random_program(130, 4)
    theirs = qp.QPFunction(verbose=-1)(Q, q, G, h, A, b)
    assert_near(il.quadratic_program(Q, q, A, b, G, h).value.x, theirs, 1e-7)


def test_cvxpylayers_agrees():
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    layers = pytest.importorskip("cvxpylayers.torch", reason="cvxpylayers is not installed")
    x, root, q, h = cp.Variable(N), cp.Parameter((N, N)), cp.Parameter(N), cp.Parameter(M)
    A, b, G = (t.numpy() for t in PROGRAM[2:5])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(root @ x) / 2 + q @ x), [A @ x == b, G @ x <= h])
    theirs = layers.CvxpyLayer(problem, [root, q, h], [x])
    tensors = [PROGRAM[1].clone().requires_grad_(), PROGRAM[5].clone().requires_grad_()]
    (value,) = theirs(torch.linalg.cholesky(PROGRAM[0]).mT, *tensors)
    ours = il.quadratic_program(PROGRAM[0], tensors[0], *PROGRAM[2:5], tensors[1]).value.x
    assert_near(ours, value, 1e-5)
    for mine, expected in zip(
        torch.autograd.grad(ours.sum(), tensors), torch.autograd.grad(value.sum(), tensors), strict=True
    ):
        assert_near(mine, expected, 1e-4)
