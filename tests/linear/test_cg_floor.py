"""Conjugate gradients with a floor under the curvature: where a lane stops, and that its solution is bounded."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, orthogonal, solve
from tests.helpers.problems import F64, normal, poisson, spd

FLOOR = 0.1
N = 12


def with_eigenvalues(*values, seed=1):
    Q = orthogonal(len(values), seed=seed)
    return Q @ torch.tensor(values, dtype=F64).diag() @ Q.T


def lowest(A, b, steps):
    """The smallest Ritz value of A on the Krylov space of that many dimensions, by an orthonormal basis."""
    vectors = [b / b.norm()]
    for _ in range(steps - 1):
        y = A @ vectors[-1]
        for _ in range(2):
            for v in vectors:
                y = y - (v @ y) * v
        vectors.append(y / y.norm())
    V = torch.stack(vectors, 1)
    return torch.linalg.eigvalsh(V.T @ A @ V)[0]


def after(A, b, steps, floor=0.0):
    return solve(A, b, rtol=None, atol=None, max_steps=steps, curvature_floor=floor)


@pytest.mark.parametrize("small", [1e-2, 1e-4, 1e-8])
def test_a_positive_eigenvalue_next_to_zero_no_longer_makes_a_solution_next_to_infinite(small):
    A, b = with_eigenvalues(small, 1.0, 2.0, 3.0), torch.ones(4, dtype=F64)
    unbounded = after(A, b, 4)
    assert unbounded.status.item() == il.Status.NOT_CHECKED
    assert unbounded.x.norm() > 0.1 * b.norm() / small
    bounded = after(A, b, 4, FLOOR)
    assert bounded.status.item() == il.Status.INDEFINITE
    assert bounded.x.norm() <= b.norm() / FLOOR
    # It stops, and keeps what it had: nothing is scaled down.
    kept = next(steps for steps in range(1, 5) if lowest(A, b, steps) <= FLOOR) - 1
    assert kept > 0
    assert torch.equal(bounded.x, after(A, b, kept).x)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_stops_exactly_where_the_krylov_space_has_less_curvature(seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    A, b = with_eigenvalues(*(2 * torch.rand(N, generator=draw) - 0.3).tolist(), seed=seed), normal(N, seed=seed)
    steps = next((k for k in range(1, 8) if lowest(A, b, k) <= FLOOR), 8)
    assert steps > 1
    solution = after(A.to(dtype), b.to(dtype), 7, FLOOR)
    assert (solution.status.item() == il.Status.INDEFINITE) == (steps < 8)
    assert torch.equal(solution.x, after(A.to(dtype), b.to(dtype), steps - 1).x)
    assert solution.x.norm() <= b.norm() / FLOOR * (1 + 1e-5)


def test_single_directions_above_the_floor_are_not_enough():
    # Every direction has a Rayleigh quotient above 1 here, but the space that they span has less curvature than that.
    A, b = torch.diag(torch.tensor([0.6, 8.0], dtype=F64)), torch.tensor([1.0, 0.4], dtype=F64)
    free = after(A, b, 2)
    assert free.curvature_min > 0.601
    assert free.x.norm() > b.norm() / 0.601 * 0.9
    assert after(A, b, 2, 0.601).status.item() == il.Status.INDEFINITE
    assert after(A, b, 2, 0.599).status.item() == il.Status.NOT_CHECKED


def test_above_the_floor_it_changes_nothing():
    for A, b in ((spd(6, shift=1.0), normal(6)), (poisson(30) + torch.eye(30), normal(3, 30))):
        for options in ({"rtol": 1e-9}, {"rtol": None, "atol": None, "max_steps": 5}):
            for ours, expected in zip(solve(A, b, curvature_floor=0.9, **options), solve(A, b, **options), strict=True):
                assert torch.equal(ours, expected)


def test_without_a_floor_the_default_stops_where_curvature_is_not_positive():
    A, b = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=F64)), torch.tensor([1.0, 1.0, 0.1], dtype=F64)
    # A floor of nearly nothing is none: the pivots of the Lanczos matrix have the signs of pᵀA p.
    for ours, expected in zip(solve(A, b, curvature_floor=1e-300), solve(A, b), strict=True):
        assert torch.equal(ours, expected)


def test_lanes_stop_alone_and_zero_stays_zero():
    flat, steep = with_eigenvalues(1e-6, 1.0, 2.0), with_eigenvalues(0.5, 1.0, 2.0)
    A, b = torch.stack([flat, steep, flat]), torch.ones(3, 3, dtype=F64)
    b[2] = 0
    operator = il.Operator(lambda y: (A @ y.unsqueeze(-1)).squeeze(-1), symmetric=True)
    solution = il.CG(rtol=1e-12, curvature_floor=FLOOR).solve(operator, b)
    expected = [il.Status.INDEFINITE, il.Status.CONVERGED, il.Status.CONVERGED]
    assert [il.Status(code) for code in solution.status.tolist()] == expected
    assert_near(solution.x[1], torch.linalg.solve(steep, b[1]), 1e-11)
    assert torch.equal(solution.x[2], torch.zeros(3, dtype=F64))
    assert_near(solution.residual[0], (flat @ solution.x[0] - b[0]).norm() / b[0].norm(), 1e-12)


def test_an_adjoint_with_a_floor_is_bounded_and_says_so():
    a = torch.tensor([1e-6, 1.0, 2.0], dtype=F64)
    Q = orthogonal(3)
    c = torch.ones(3, dtype=F64, requires_grad=True)
    linear = il.CG(rtol=None, atol=None, max_steps=3, curvature_floor=FLOOR)
    solution = il.argmin(
        lambda x, c: (a * (Q @ x) ** 2).sum() / 2 - c @ x, torch.zeros(3, dtype=F64), c,
        solver=il.GradientDescent(lr=0.1, rtol=None, atol=None, max_steps=3),
        adjoint=il.Implicit(linear, on_failure="ignore"),
    )  # fmt: skip
    v = torch.ones(3, dtype=F64)
    (u,) = torch.autograd.grad(solution.value @ v, c)
    assert solution.adjoint.status.item() == il.Status.INDEFINITE
    assert 0 < u.norm() <= v.norm() / FLOOR


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_floor_that_cannot_be(bad):
    with pytest.raises(il.MisuseError, match=r"curvature_floor=.*pass a number >= 0"):
        il.CG(curvature_floor=bad)


def test_a_floor_is_a_number():
    with pytest.raises(il.MisuseError, match=r"curvature_floor=tensor.*plain Python numbers"):
        il.CG(curvature_floor=torch.tensor(0.1))


def test_a_floor_with_a_preconditioner_is_refused():
    with pytest.raises(il.MisuseError, match=r"curvature_floor=0.1, preconditioner.*leave one of them out"):
        il.CG(curvature_floor=0.1, preconditioner=lambda r: r)
