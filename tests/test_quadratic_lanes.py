"""Quadratic programs: lanes from inside and outside, lanes that fail alone, and calls that mean nothing."""

import re

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

import implicitlayers as il
from implicitlayers.kkt import Saddle
from tests.helpers.problems import F64, each, normal
from tests.helpers.programs import PROGRAM, M, N, P, active_set_solution, assert_near, layer, random_program

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


def test_the_step_limit_is_kept():
    first = il.quadratic_program(*PROGRAM, solver=il.InteriorPoint(max_steps=1), on_failure="ignore")
    assert first.stats.steps == 1


@pytest.mark.parametrize("steps", [40, 400])
def test_a_fixed_number_of_steps_is_not_checked_and_survives_what_follows_convergence(steps):
    program = random_program(150, 100, n=5, p=2, m=8)
    fixed = il.quadratic_program(*program, solver=il.InteriorPoint(rtol=None, atol=None, max_steps=steps))
    assert (fixed.status == il.Status.NOT_CHECKED).all()
    assert (fixed.stats.steps == steps).all()
    assert_near(torch.cat(fixed.value, -1), layer(*program), 1e-9)


# --- misuse -----------------------------------------------------------------------------------------------------------

ZERO = torch.zeros(2, dtype=F64)
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


def test_a_pivot_that_is_lost_beside_large_weights_does_not_break_the_solve():
    # 2⁵⁶ + 1 is 2⁵⁶: the second pivot is zero to the last bit.
    rows = torch.full((2, 2), 2.0**56, dtype=F64) + torch.eye(2, dtype=F64)
    x = Saddle.factor(rows, 2).solve(torch.ones(2, dtype=F64), 1)
    assert_near(x.sum(), torch.tensor(2.0**-56, dtype=F64), 1e-20)
