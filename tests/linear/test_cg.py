"""Conjugate gradients: against SciPy and direct solves, at the edges, and free of the faults of other libraries."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, relative_residual, solve
from tests.helpers.problems import F64, normal, poisson, product, spd, symmetrized

F32 = torch.float32


# --- systems with known answers -----------------------------------------------------------------------------


def test_poisson():
    A, b = poisson(100), torch.ones(100, dtype=F64)
    solution = solve(A, b, rtol=1e-12)
    assert solution.status.item() == il.Status.CONVERGED
    # The solution of -u'' = 1 is exact for second differences, x(n + 1 - x)/2; condition number 4e3.
    i = torch.arange(1, 101, dtype=F64)
    assert_near(solution.x, i * (101 - i) / 2, 1e-7)
    # By symmetry fifty eigenvectors take part, and each step takes one of them out.
    assert solution.steps.item() == 50
    eigenvalues = torch.linalg.eigvalsh(A)
    assert eigenvalues[0] * (1 - 1e-9) <= solution.curvature_min <= solution.curvature_max
    assert solution.curvature_max <= eigenvalues[-1] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_takes_the_steps_of_scipy(seed):
    A, b = poisson(60) + 0.05 * torch.eye(60, dtype=F64), normal(60, seed=seed)
    iterates = []
    options = {"rtol": 1e-9, "atol": 0.0, "callback": lambda x: iterates.append(x.copy())}
    expected, info = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), **options)
    solution = solve(A, b, rtol=1e-9)
    assert info == 0
    assert solution.steps.item() == len(iterates)
    # Both run the same recurrence, up to rounding that grows with the condition number, 80.
    assert_near(solution.x, torch.from_numpy(expected), 1e-9)
    for steps in (1, 2, 5, 20):
        x = solve(A, b, rtol=None, atol=None, max_steps=steps).x
        assert_near(x, torch.from_numpy(np.asarray(iterates[steps - 1])), 1e-9)


def test_diagonal_system_converges_in_as_many_steps_as_it_has_eigenvalues():
    A, b = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.tensor([1.0, 1.0], dtype=F64)
    solution = solve(A, b, rtol=1e-12)
    assert_near(solution.x, torch.tensor([1.0, 1 / 3], dtype=F64), 1e-14)
    assert solution.steps.item() == 2
    # The first direction is b: its Rayleigh quotient is (1 + 3)/2; the second is conjugate to it, (3, -1): 12/10.
    assert_near(solution.curvature_max, torch.tensor(2.0, dtype=F64), 1e-14)
    assert_near(solution.curvature_min, torch.tensor(1.2, dtype=F64), 1e-14)


def test_identity_needs_one_step():
    b = normal(5)
    solution = solve(torch.eye(5, dtype=F64), b)
    assert_near(solution.x, b, 1e-15)
    assert solution.steps.item() == 1


def test_ill_conditioned_system():
    A = symmetrized()
    assert 1e7 < torch.linalg.cond(A) < 1e8
    x = torch.tensor([1.0, -2.0], dtype=F64)
    solution = solve(A, A @ x, rtol=1e-14)
    # What can be attained is machine epsilon times the condition number 2e7, times the norm of x, with room for ten.
    assert_near(solution.x, x, 2.2e-16 * 2.2e7 * 2.3 * 10)
    assert solution.status.item() in (il.Status.CONVERGED, il.Status.STALLED)
    assert relative_residual(A, solution.x, A @ x) < 1e-9


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_against_a_direct_solve(n, dtype):
    A, b = spd(n, seed=n, dtype=dtype), normal(n, seed=n + 1, dtype=dtype)
    tolerance = 50 * torch.finfo(dtype).eps
    solution = solve(A, b, rtol=tolerance)
    assert solution.status.item() == il.Status.CONVERGED
    assert solution.x.dtype == dtype
    assert_near(solution.x.double(), torch.linalg.solve(A.double(), b.double()), 20 * tolerance)
    assert relative_residual(A.double(), solution.x.double(), b.double()) < 3 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_single(dtype):
    n = 256
    b = torch.ones(n, dtype=dtype)
    solution = solve(2 * torch.eye(n, dtype=dtype), b, rtol=0.05)
    assert solution.x.dtype == dtype
    assert_near(solution.x.double(), torch.full((n,), 0.5, dtype=F64), 0.01)


def test_unknown_of_one_element():
    solution = solve(torch.tensor([[4.0]], dtype=F64), torch.tensor([2.0], dtype=F64))
    assert_near(solution.x, torch.tensor([0.5], dtype=F64), 1e-15)
    assert solution.steps.item() == 1
    assert solution.status.item() == il.Status.CONVERGED


# --- what cannot be solved says so --------------------------------------------------------------------------


def test_singular_and_consistent():
    A = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=F64))
    solution = solve(A, torch.tensor([1.0, 1.0, 0.0], dtype=F64), rtol=1e-12)
    assert solution.status.item() == il.Status.CONVERGED
    assert_near(solution.x, torch.tensor([1.0, 1 / 3, 0.0], dtype=F64), 1e-13)


def test_singular_and_inconsistent():
    A = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=F64))
    solution = solve(A, torch.ones(3, dtype=F64), rtol=1e-12)
    assert solution.status.item() in (il.Status.SINGULAR, il.Status.INDEFINITE, il.Status.MAX_STEPS, il.Status.STALLED)
    assert solution.residual.item() > 0.1
    assert solution.x.isfinite().all()


def test_a_matrix_of_zeros_is_singular():
    solution = solve(torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64))
    assert solution.status.item() == il.Status.SINGULAR
    assert torch.equal(solution.x, torch.zeros(3, dtype=F64))
    assert solution.residual.item() == pytest.approx(1.0)


def test_indefinite_keeps_the_iterate_before_the_negative_curvature():
    A = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=F64))
    b = torch.tensor([1.0, 1.0, 0.1], dtype=F64)
    solution = solve(A, b)
    assert solution.status.item() == il.Status.INDEFINITE
    assert solution.curvature_min.item() <= 0
    # Before it broke down it had made progress: never the starting vector without saying so.
    kept = solve(A, b, rtol=None, atol=None, max_steps=solution.steps.item() - 1).x
    assert torch.equal(solution.x, kept)
    assert kept.norm() > 0
    assert_near(solution.residual, (A @ kept - b).norm() / b.norm(), 1e-12)


def test_negative_definite_is_indefinite_at_once():
    solution = solve(-torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    assert solution.status.item() == il.Status.INDEFINITE
    assert torch.equal(solution.x, torch.zeros(3, dtype=F64))
    assert solution.curvature_max.item() == solution.curvature_min.item() == -1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_right_hand_side_that_is_not_finite(bad):
    solution = solve(torch.eye(2, dtype=F64), torch.tensor([1.0, bad], dtype=F64))
    assert solution.status.item() == il.Status.NON_FINITE
    assert solution.steps.item() == 0


def test_operator_that_is_not_finite():
    solution = solve(torch.tensor([[1.0, 0.0], [0.0, torch.nan]], dtype=F64), torch.ones(2, dtype=F64))
    assert solution.status.item() == il.Status.NON_FINITE
    assert solution.x.isfinite().all()


def test_zero_right_hand_side():
    solution = solve(spd(3), torch.zeros(3, dtype=F64))
    assert torch.equal(solution.x, torch.zeros(3, dtype=F64))
    assert (solution.steps.item(), solution.status.item()) == (0, il.Status.CONVERGED)
    assert solution.residual.item() == 0


def test_too_few_steps_say_so():
    A, b = poisson(50), normal(50)
    solution = solve(A, b, max_steps=5)
    assert (solution.steps.item(), solution.status.item()) == (5, il.Status.MAX_STEPS)
    assert_near(solution.residual, (A @ solution.x - b).norm() / b.norm(), 1e-12)


def test_a_tolerance_beyond_precision_stalls_or_converges_but_ends():
    A, b = symmetrized(), normal(2)
    solution = solve(A, b, rtol=0.0, atol=0.0, max_steps=100_000)
    assert solution.status.item() in (il.Status.STALLED, il.Status.CONVERGED)
    assert solution.steps.item() < 1000


def test_a_residual_that_rises_for_long_before_it_falls_is_no_stall():
    # Eigenvalues spread over six decades, and every eigenvector in b: the residual stays above its start for hundreds
    # of steps, more than the patience of n + 20, while the energy falls in all of them.
    n = 60
    eigenvalues = torch.logspace(0, -6, n, dtype=F64)
    solver = il.CG(rtol=1e-8, max_steps=5000)
    risen = il.CG(rtol=None, atol=None, max_steps=n + 21)
    operator = il.Operator(lambda y: eigenvalues * y, symmetric=True)
    b = normal(n)
    assert risen.solve(operator, b).residual.item() > 1
    solution = solver.solve(operator, b)
    assert solution.status.item() == il.Status.CONVERGED
    assert solution.steps.item() > n + 21
    assert ((eigenvalues * solution.x - b).norm() / b.norm()).item() < 1e-8 * 1.01


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_exactly_max_steps_without_looking(steps):
    calls = []
    A = spd(4)

    def counted(y):
        calls.append(1)
        return product(A)(y)

    cg = il.CG(rtol=None, atol=None, max_steps=steps)
    solution = cg.solve(il.Operator(counted, symmetric=True), normal(4))
    assert len(calls) == steps == solution.steps.item()
    assert solution.status.item() == il.Status.NOT_CHECKED
    assert not cg.looks


def test_steps_after_the_exact_solution_do_no_harm():
    A, b = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.ones(2, dtype=F64)
    for steps in (2, 3, 10, 50):
        x = solve(A, b, rtol=None, atol=None, max_steps=steps).x
        assert_near(x, torch.tensor([1.0, 1 / 3], dtype=F64), 1e-14)
    x = solve(A, torch.zeros(2, dtype=F64), rtol=None, atol=None, max_steps=5).x
    assert torch.equal(x, torch.zeros(2, dtype=F64))


def test_stops_at_the_tolerance_it_was_given():
    A, b = poisson(100) + 0.01 * torch.eye(100, dtype=F64), normal(100)
    previous = 0
    for rtol in (1e-2, 1e-5, 1e-9):
        solution = solve(A, b, rtol=rtol)
        assert relative_residual(A, solution.x, b) <= rtol * (1 + 1e-6)
        earlier = solve(A, b, rtol=None, atol=None, max_steps=solution.steps.item() - 1)
        assert relative_residual(A, earlier.x, b) > rtol
        assert solution.steps.item() > previous
        previous = solution.steps.item()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_atol_is_in_the_units_of_the_right_hand_side(scale):
    A, b = poisson(50), scale * normal(50)
    solution = solve(A, b, rtol=0.0, atol=1e-3 * scale)
    residual = (A @ solution.x - b).norm().item()
    assert 1e-9 * scale < residual <= 1e-3 * scale


def test_atol_larger_than_the_right_hand_side_takes_no_step():
    solution = solve(spd(3), normal(3), rtol=0.0, atol=100.0)
    assert (solution.steps.item(), solution.status.item()) == (0, il.Status.CONVERGED)


def test_warm_start():
    A, b = poisson(50), normal(50)
    x = torch.linalg.solve(A, b)
    warm = solve(A, b, x, rtol=1e-9)
    assert warm.steps.item() == 0
    assert_near(warm.x, x, 1e-9)
    near = solve(A, b, x + 1e-6 * normal(50, seed=3), rtol=1e-9)
    cold = solve(A, b, rtol=1e-9)
    assert 0 < near.steps.item() < cold.steps.item()
    # The tolerance 1e-9 on the residual allows an error of 1e-9·‖b‖ over the smallest eigenvalue, 4e-3.
    assert_near(near.x, x, 3e-6)
    assert relative_residual(A, near.x, b) <= 1.1e-9


def test_warm_start_is_scaled_like_the_right_hand_side():
    A, b = poisson(20), 1e6 * normal(20)
    solution = solve(A, b, torch.linalg.solve(A, b))
    assert solution.steps.item() == 0


def test_exact_preconditioner_needs_one_step():
    A, b = poisson(40), normal(40)
    inverse = torch.linalg.inv(A)
    solution = solve(A, b, rtol=1e-10, preconditioner=product(inverse))
    assert solution.steps.item() == 1
    assert_near(solution.x, inverse @ b, 1e-9)


def test_jacobi_preconditioner_is_the_symmetrically_scaled_system():
    D = torch.logspace(0, 4, 30, dtype=F64)
    A, b = spd(30) * D.sqrt() * D.sqrt()[:, None], normal(30)
    plain = solve(A, b, rtol=1e-9)
    jacobi = solve(A, b, rtol=1e-9, preconditioner=lambda r: r / A.diagonal())
    assert jacobi.steps.item() < plain.steps.item()
    assert relative_residual(A, jacobi.x, b) <= 1.1e-9
    # Iterates in exact agreement with CG on D^-1/2 A D^-1/2, which is what the method means.
    root = A.diagonal().sqrt()
    scaled = solve(A / root / root[:, None], b / root, rtol=None, atol=None, max_steps=7).x / root
    ours = solve(A, b, rtol=None, atol=None, max_steps=7, preconditioner=lambda r: r / A.diagonal()).x
    torch.testing.assert_close(ours, scaled, rtol=1e-8, atol=0)
