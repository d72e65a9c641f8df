"""The choice by what is known of the operator, and the direct solver it may fall on."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, operator, orthogonal, with_condition
from tests.helpers.problems import F64, normal, poisson, product, spd, symmetrized

Status = il.Status


@pytest.mark.parametrize(
    ("claims", "n", "expected"),
    [
        ({"symmetric": True}, 10, il.CG),
        ({"symmetric": True}, 10_000, il.CG),
        ({"symmetric": True, "minimizing": True}, 10, il.CG),
        ({"symmetric": True, "positive_definite": True}, 10, il.CG),
        ({"symmetric": True, "indefinite": True}, 10, il.MINRES),
        # A minimization must hear of it.
        ({"symmetric": True, "indefinite": True, "minimizing": True}, 10, il.CG),
        ({"symmetric": False}, 128, il.Dense),
        ({"symmetric": False}, 129, il.GMRES),
    ],
)
def test_choice(claims, n, expected):
    chosen = il.Auto(rtol=1e-5, atol=1e-7, max_steps=77, preconditioner=None).choose(
        il.Operator(lambda y: y, **claims), n
    )
    assert type(chosen) is expected
    if expected is not il.Dense:
        assert (chosen.rtol, chosen.atol, chosen.max_steps) == (1e-5, 1e-7, 77)


def test_is_conjugate_gradients_bit_for_bit_on_a_curvature():
    A, b = poisson(30), normal(30)
    jacobi = il.Jacobi()
    for options in ({}, {"rtol": 1e-3}, {"rtol": None, "atol": None, "max_steps": 7}, {"preconditioner": jacobi}):
        for minimizing in (False, True):
            given = il.Operator(product(A), symmetric=True, minimizing=minimizing)
            for ours, theirs in zip(il.Auto(**options).solve(given, b), il.CG(**options).solve(given, b), strict=True):
                # With a preconditioner the estimate of the smallest singular value is NaN in both.
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert il.Auto(**options).looks == il.CG(**options).looks


def test_solves_what_it_chooses_for():
    saddle = with_condition("indefinite", 20, 1e2)
    b = normal(20)
    solution = il.Auto(rtol=1e-11).solve(operator(saddle, indefinite=True), b)
    assert solution.status.item() == Status.CONVERGED
    assert_near(solution.x, torch.linalg.solve(saddle, b), 1e-7)
    for n in (20, 150):
        A, b = torch.eye(n, dtype=F64) + normal(n, n) / (3 * n**0.5), normal(n)
        for given, matrix in ((operator(A), A), (operator(A).T, A.T)):
            solution = il.Auto(rtol=1e-11).solve(given, b)
            assert solution.status.item() == Status.CONVERGED
            assert_near(solution.x, torch.linalg.solve(matrix, b), 1e-9)


# --- the direct solver --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_on_lanes(n, transposed):
    A, b = normal(3, n, n) + 2 * torch.eye(n, dtype=F64), normal(3, n, seed=1)
    given, matrix = (operator(A).T, A.mT) if transposed else (operator(A), A)
    solution = il.Dense().solve(given, b)
    assert (solution.status == Status.CONVERGED).all()
    assert_near(solution.x, torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1), 1e-11)


def test_cholesky_where_definiteness_is_known(monkeypatch):
    def refused(*_):
        raise AssertionError("LU was called")

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", refused)
    A, b = torch.stack([spd(5), spd(5, seed=1)]), normal(2, 5)
    solution = il.Dense().solve(operator(A, positive_definite=True), b)
    assert (solution.status == Status.CONVERGED).all()
    assert_near(solution.x, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), 1e-13)
    with pytest.raises(AssertionError, match="LU was called"):
        il.Dense().solve(operator(A), b)


def test_a_wrong_claim_of_definiteness_is_found_lane_by_lane():
    good = spd(3)
    A = torch.stack([good, -good, torch.diag(torch.tensor([1.0, 1e-17, 2.0], dtype=F64)), torch.nan * good, good])
    solution = il.Dense().solve(operator(A, symmetric=True, positive_definite=True), normal(5, 3))
    expected = [Status.CONVERGED, Status.INDEFINITE, Status.SINGULAR, Status.NON_FINITE, Status.CONVERGED]
    assert [Status(code) for code in solution.status.tolist()] == expected
    assert_near(solution.x[[0, 4]], torch.linalg.solve(good, normal(5, 3)[[0, 4]].T).T, 1e-12)
    assert torch.equal(solution.x[1:4], torch.zeros(3, 3, dtype=F64))


def test_a_failing_lane_has_the_derivative_zero():
    A = torch.stack([spd(3), -spd(3), torch.zeros(3, 3, dtype=F64)]).requires_grad_()
    x = il.Dense().solve(operator(A, symmetric=True, positive_definite=True), normal(3, 3)).x
    (derivative,) = torch.autograd.grad(x.sum(), A)
    w = torch.linalg.solve(A[0].detach(), torch.ones(3, dtype=F64))
    # d(1ᵀA⁻¹b) = -(A⁻¹1)ᵀ dA (A⁻¹b).
    symmetric = (derivative[0] + derivative[0].T) / 2
    outer = torch.outer(w, x[0].detach())
    assert_near(symmetric, -(outer + outer.T) / 2, 1e-12)
    assert torch.equal(derivative[1:], torch.zeros(2, 3, 3, dtype=F64))


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e8])
def test_cholesky_at_any_condition_number(condition):
    A = with_condition("definite", 20, condition)
    x = normal(20)
    solution = il.Dense().solve(operator(A, positive_definite=True), A @ x)
    assert solution.status.item() == Status.CONVERGED
    # Machine epsilon times the condition number, with room for ten.
    assert (solution.x - x).norm() / x.norm() < 3e-15 * condition + 1e-14
    ill = symmetrized()
    assert il.Dense().solve(operator(ill, positive_definite=True), normal(2)).residual < 1e-8


def test_rotations_are_solved_by_the_transpose():
    Q, b = orthogonal(6), normal(6)
    assert_near(il.Dense().solve(operator(Q), b).x, Q.T @ b, 1e-14)
    assert_near(il.Dense().solve(operator(Q).T, b).x, Q @ b, 1e-14)
