"""Conjugate gradients on many lanes and at every scale, and the faults of other libraries."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, relative_residual, solve
from tests.helpers.problems import F64, normal, poisson, spd

F32 = torch.float32


# --- scale and lanes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e30])
def test_right_hand_sides_of_every_scale_in_single_precision(scale):
    A, b = spd(4, dtype=F32), (normal(4) * scale).float()
    solution = solve(A, b, rtol=1e-6)
    assert solution.status.item() == il.Status.CONVERGED
    expected = torch.linalg.solve(A.double(), b.double())
    assert_near(solution.x.double() / scale, expected / scale, 1e-5)


def test_lanes_are_independent_and_bitwise_those_of_a_loop():
    A = torch.stack([spd(5, seed=seed, shift=10.0 ** (2 - seed)) for seed in range(6)])
    b = normal(6, 5, seed=9) * torch.logspace(-3, 3, 6, dtype=F64)[:, None]
    elementwise = lambda A: lambda y: (A * y.unsqueeze(-2)).sum(-1)  # noqa: E731
    cg = il.CG(rtol=1e-3)
    together = cg.solve(il.Operator(elementwise(A), symmetric=True), b)
    assert len(set(together.steps.tolist())) > 1
    for lane in range(6):
        alone = cg.solve(il.Operator(elementwise(A[lane]), symmetric=True), b[lane])
        for ours, expected in zip((field[lane] for field in together), alone, strict=True):
            assert torch.equal(ours, expected)


def test_a_lane_that_breaks_breaks_alone():
    good, b = spd(3), torch.ones(5, 3, dtype=F64)
    b[3] = torch.nan
    b[4] = 0
    A = torch.stack([good, -good, torch.full_like(good, torch.nan), good, good])
    solution = solve(A, b, rtol=1e-12)
    Status = il.Status
    expected = [Status.CONVERGED, Status.INDEFINITE, Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED]
    assert [Status(code) for code in solution.status.tolist()] == expected
    assert_near(solution.x[0], torch.linalg.solve(good, b[0]), 1e-11)
    assert torch.equal(solution.x[4], torch.zeros(3, dtype=F64))


def test_two_levels_of_lanes():
    A, b = spd(3), normal(2, 4, 3)
    solution = solve(A, b, rtol=1e-12)
    assert solution.status.shape == solution.steps.shape == (2, 4)
    assert_near(solution.x, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), 1e-11)


# --- faults seen elsewhere ----------------------------------------------------------------------------------


def test_returns_the_iterate_that_converged_not_the_one_before():
    A, b = spd(6), normal(6)
    solution = solve(A, b, rtol=1e-6)
    # The reported residual is that of the returned x: the previous iterate's is larger by the last step's gain.
    assert_near(solution.residual, (A @ solution.x - b).norm() / b.norm(), 1e-12)
    assert relative_residual(A, solution.x, b) <= 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_residual_belongs_to_the_returned_vector_after_every_step(steps):
    A, b = poisson(12), 1e3 * normal(12)
    solution = solve(A, b, rtol=None, atol=None, max_steps=steps)
    torch.testing.assert_close(solution.residual, (A @ solution.x - b).norm() / b.norm(), rtol=1e-10, atol=0)


def test_a_limit_on_the_steps_is_never_derived_from_the_size():
    # A zero-dimensional unknown has no length: ten times its length steps would be none, and the gradient zero.
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, a: (x - a) ** 2, torch.tensor(0.0, dtype=F64), a).value
    assert x.shape == ()
    assert_near(torch.autograd.grad(x, a)[0], torch.tensor(1.0, dtype=F64), 1e-12)


def test_more_steps_than_needed_with_a_preconditioner_that_underflows():
    A, b = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3)
    solver = il.CG(rtol=None, atol=None, max_steps=100, preconditioner=lambda r: r * 1e6)
    x = solver.solve(il.Operator(lambda y: y @ A, symmetric=True), b).x
    torch.testing.assert_close(x, 1 / A.diagonal())
