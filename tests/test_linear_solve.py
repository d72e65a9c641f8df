"""Linear systems as an entry point: trees, operators, matrices, lanes, what is refused. Derivatives: transforms/."""

import pytest
import torch

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.problems import F64, normal, spd

A, B = spd(4), normal(4, seed=3)


def test_a_matrix_a_function_and_an_operator_are_the_same():
    expected = torch.linalg.solve(A, B)
    for operator in (A, lambda x: A @ x, il.Operator(lambda y: y @ A, symmetric=True)):
        solution = il.linear_solve(operator, B, solver=il.CG(rtol=1e-14))
        torch.testing.assert_close(solution.value, expected)
        assert solution.status == il.Status.CONVERGED
        assert solution.stats.residual < 1e-12
        assert solution.stats.objective.isnan()


def test_trees_and_params():
    def operator(x, scale):
        return {"a": 2 * scale * x["a"] + x["b"].sum(), "b": scale * x["b"] + x["a"]}

    scale = torch.tensor(3.0, dtype=F64)
    b = {"a": torch.tensor(1.0, dtype=F64), "b": torch.ones(2, dtype=F64)}
    value = il.linear_solve(operator, b, scale, solver=il.Dense()).value
    back = operator(value, scale)
    torch.testing.assert_close(back["a"], b["a"])
    torch.testing.assert_close(back["b"], b["b"])
    assert_gradients_match(lambda b, scale: il.linear_solve(operator, b, scale, solver=il.Dense()).value, b, scale)


def test_lanes_share_the_matrix_or_have_their_own():
    rows = normal(5, 4, seed=4)
    torch.testing.assert_close(torch.vmap(lambda b: il.linear_solve(A, b).value)(rows), torch.linalg.solve(A, rows.T).T)
    matrices = torch.stack([spd(4, seed=s) for s in range(5)])
    ours = torch.vmap(lambda m, b: il.linear_solve(m, b, solver=il.CG(rtol=1e-13)).value)(matrices, rows)
    torch.testing.assert_close(ours, torch.linalg.solve(matrices, rows))


def test_a_start_at_the_solution_takes_no_steps():
    expected = torch.linalg.solve(A, B)
    assert il.linear_solve(A, B, x0=expected).stats.steps == 0
    assert il.linear_solve(A, B).stats.steps > 0


def test_failure_is_told_by_the_policy():
    indefinite = torch.diag(torch.tensor([1.0, -2.0], dtype=F64))
    b = torch.ones(2, dtype=F64)
    with pytest.raises(il.SolveError, match=r"linear solve by CG failed(.|\n)*INDEFINITE"):
        il.linear_solve(indefinite, b)
    assert il.linear_solve(indefinite, b, on_failure="nan").value.isnan().all()
    torch.testing.assert_close(il.linear_solve(indefinite, b, solver=il.MINRES()).value, b / indefinite.diagonal())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: il.linear_solve(lambda x: A @ x + 1, B), "maps 0 to a vector of norm 2"),
        (lambda: il.linear_solve(lambda x: x[:2], B), r"the operator returned shapes \[\(2,\)\]"),
        (lambda: il.linear_solve(A[:2], B), r"shape \(2, 4\); pass a square matrix"),
        (lambda: il.linear_solve("A", B), "operator is a str"),
        (lambda: il.linear_solve(A, B, solver=il.Newton()), "which is no LinearSolver"),
        (lambda: il.linear_solve(A, B, symmetric=False), "CG solves symmetric systems only"),
        (lambda: il.linear_solve(A, B.to(torch.complex128)), "only floating tensors"),
        (lambda: il.linear_solve(A, B, on_failure="shout"), "on_failure is 'shout'"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(il.MisuseError, match=message):
        call()


def test_warm_starts_save_steps_and_change_nothing():
    X, y = normal(50, 20, seed=5), normal(50, seed=6)
    adjoint = il.Implicit(il.CG(rtol=1e-10), warm_start=True)
    steps, slopes = [], []
    for shift in (0.0, 1e-3, 2e-3):
        log_lam = torch.full((20,), shift, dtype=F64, requires_grad=True)
        solution = il.argmin(
            lambda w: (X @ w - y).square().mean(),
            torch.zeros(20, dtype=F64),
            regularizer=il.Ridge(log_lam.exp()),
            solver=il.Newton(il.Dense()),
            adjoint=adjoint,
        )
        solution.value.sum().backward()
        steps.append(int(solution.adjoint.steps))
        slopes.append(log_lam.grad)
    assert max(steps[1:]) < steps[0]
    inverse = torch.linalg.inv(2 * X.T @ X / 50 + torch.eye(20, dtype=F64) * torch.tensor(2e-3, dtype=F64).exp())
    w = inverse @ (2 * X.T @ y / 50)
    torch.testing.assert_close(slopes[-1], -inverse.sum(0) * w * torch.tensor(2e-3, dtype=F64).exp(), rtol=1e-8, atol=0)


def test_the_pairs_of_the_forward_solve_precondition_the_adjoint():
    scales = torch.logspace(0, 3, 12, dtype=F64)
    theta = torch.ones(12, dtype=F64, requires_grad=True)

    def steps(linear_solver):
        solution = il.argmin(
            lambda x, t: (scales * (x - t).square()).sum() / 2,
            torch.zeros(12, dtype=F64),
            theta,
            solver=il.LBFGS(memory=30),
            adjoint=il.Implicit(linear_solver),
        )
        (slope,) = torch.autograd.grad(solution.value.sum(), theta)
        torch.testing.assert_close(slope, torch.ones_like(theta), rtol=1e-7, atol=0)
        return int(solution.adjoint.steps)

    assert steps(il.CG(preconditioner=il.LBFGSPreconditioner())) < steps(il.CG())


def test_a_matrix_that_is_not_symmetric_is_refused_by_methods_for_symmetric_ones():
    A = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=F64)
    for solver in (None, il.CG(), il.MINRES()):
        with pytest.raises(il.MisuseError, match=r"differs from its transpose by up to 1;.*GMRES"):
            il.linear_solve(A, torch.ones(2, dtype=F64), solver=solver)
    il.linear_solve(A @ A.T, torch.ones(2, dtype=F64))


@pytest.mark.parametrize("solver", [il.CG(), il.GMRES(), il.Dense()], ids=["cg", "gmres", "dense"])
def test_an_operator_that_is_not_linear_is_refused(solver):
    with pytest.raises(il.MisuseError, match=r"maps 2b to something else.*il\.root"):
        il.linear_solve(lambda x: x**3 + x, torch.ones(3, dtype=F64), solver=solver)
