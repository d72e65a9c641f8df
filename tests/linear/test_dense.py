"""Direct solves, and the operator they factorize."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.problems import F64, normal, product, spd


def solve(A, b):
    return il.Dense().solve(il.Operator(product(A), symmetric=True), b)


def assert_near(ours, expected, tol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_against_lapack(n):
    A, b = spd(n), normal(n)
    solution = solve(A, b)
    assert_near(solution.x, torch.linalg.solve(A, b))
    assert solution.status.item() == il.Status.CONVERGED
    assert solution.steps.item() == 1
    assert solution.residual.item() < 1e-14
    assert solution.curvature_min.isnan()


def test_indefinite_and_unsymmetric_matrices():
    for A in (torch.diag(torch.tensor([1.0, -2.0], dtype=F64)), torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=F64)):
        b = normal(2)
        assert_near(solve(A, b).x, torch.linalg.solve(A, b))


def test_ill_conditioned_matrix_keeps_a_small_residual():
    B = torch.tensor([[3.9, 1.65], [6.845, 2.9]], dtype=F64)  # condition number 4647
    solution = solve(B, torch.ones(2, dtype=F64))
    assert solution.status.item() == il.Status.CONVERGED
    assert_near(B @ solution.x, torch.ones(2, dtype=F64), 1e-11)


def test_each_lane_has_its_own_status():
    good = spd(3)
    A = torch.stack([good, torch.zeros(3, 3, dtype=F64), torch.full((3, 3), torch.nan, dtype=F64), good, good])
    A[1, 0, 0] = 1
    b = normal(5, 3)
    b[3, 1] = torch.inf
    solution = solve(A, b)
    Status = il.Status
    expected = [Status.CONVERGED, Status.SINGULAR, Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED]
    assert [Status(code) for code in solution.status.tolist()] == expected
    assert_near(solution.x[[0, 4]], torch.linalg.solve(good, b[[0, 4]].T).T)


def test_scale_does_not_make_a_matrix_singular():
    for scale in (1e-30, 1e30):
        A, b = (spd(3) * scale).float(), normal(3).float()
        solution = solve(A, b)
        assert solution.status.item() == il.Status.CONVERGED
        # Machine epsilon of float32 times a condition number below ten.
        torch.testing.assert_close(solution.x * scale, torch.linalg.solve(spd(3).float(), b), rtol=1e-5, atol=1e-6)


def test_operator_is_its_matrix():
    A = normal(2, 3, 3)
    operator = il.Operator(product(A), symmetric=False)
    assert_near(operator.dense(normal(2, 3)), A, 0)
    y = normal(2, 3, seed=1)
    assert_near(operator(y), product(A)(y), 0)
