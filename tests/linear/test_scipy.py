"""Step by step the iterates of SciPy, which runs the same methods one system at a time."""

import numpy as np
import pytest
import scipy.sparse.linalg as reference
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, operator
from tests.helpers.problems import F64, normal, poisson

N = 40
SYMMETRIC = poisson(N) - 0.5 * torch.eye(N, dtype=F64)
UNSYMMETRIC = poisson(N) + torch.diag(torch.ones(N - 1, dtype=F64), 1) + normal(N, N, seed=3) / 20
DIAGONAL = torch.linspace(1, 10, N, dtype=F64)
RIGHT = normal(N, seed=1)


def fixed(method, steps, A, **options):
    return method(rtol=None, atol=None, max_steps=steps, **options).solve(operator(A), RIGHT).x


def numbers(x):
    return torch.from_numpy(np.asarray(x))


def iterates_of(method, A, **options):
    seen = []
    method(A.numpy(), RIGHT.numpy(), rtol=1e-12, callback=lambda x: seen.append(x.copy()), **options)
    return seen


@pytest.mark.parametrize("weights", [None, DIAGONAL])
def test_minres(weights):
    theirs = iterates_of(reference.minres, SYMMETRIC, M=None if weights is None else np.diag(1 / weights.numpy()))
    ours = None if weights is None else (lambda r: r / weights)
    for steps in (1, 2, 5, 12):
        x = fixed(il.MINRES, steps, SYMMETRIC, preconditioner=ours)
        assert_near(x, numbers(theirs[steps - 1]), 1e-11)


@pytest.mark.parametrize("A", [UNSYMMETRIC, UNSYMMETRIC.T])
def test_bicgstab(A):
    theirs = iterates_of(reference.bicgstab, A)
    for steps in (1, 2, 5, 10):
        # Biconjugate recurrences amplify rounding.
        assert_near(fixed(il.BiCGStab, steps, A), numbers(theirs[steps - 1]), 1e-9)


def test_bicgstab_is_preconditioned_on_the_right():
    theirs = iterates_of(reference.bicgstab, UNSYMMETRIC, M=np.diag(1 / DIAGONAL.numpy()))
    for steps in (1, 2, 5):
        x = fixed(il.BiCGStab, steps, UNSYMMETRIC, preconditioner=lambda r: r / DIAGONAL)
        assert_near(x, numbers(theirs[steps - 1]), 1e-9)


@pytest.mark.parametrize("A", [UNSYMMETRIC, UNSYMMETRIC.T])
@pytest.mark.parametrize("cycles", [1, 3])
def test_gmres(A, cycles):
    for restart in (1, 2, 5, 12):
        theirs, _ = reference.gmres(A.numpy(), RIGHT.numpy(), rtol=1e-14, restart=restart, maxiter=cycles)
        ours = fixed(il.GMRES, restart * cycles, A, restart=restart)
        assert_near(ours, numbers(theirs), 1e-11)


def test_gmres_with_a_preconditioner_minimizes_the_residual_itself():
    # On the right: x = M⁻¹ u with u from A M⁻¹ u = b. SciPy's stands on the left, and minimizes another norm.
    scaled = UNSYMMETRIC / DIAGONAL
    for steps in (1, 2, 5, 12):
        theirs, _ = reference.gmres(scaled.numpy(), RIGHT.numpy(), rtol=1e-14, restart=steps, maxiter=1)
        ours = fixed(il.GMRES, steps, UNSYMMETRIC, preconditioner=lambda r: r / DIAGONAL)
        assert_near(ours, numbers(theirs) / DIAGONAL, 1e-11)


@pytest.mark.parametrize("A", [UNSYMMETRIC, UNSYMMETRIC.T])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (il.LSMR, lambda A, b, steps: reference.lsmr(A, b, atol=0, btol=0, conlim=0, maxiter=steps)[0]),
        # LSQR is CG on the normal equations in exact arithmetic (Paige & Saunders 1982).
        (il.NormalCG, lambda A, b, steps: reference.lsqr(A, b, atol=0, btol=0, conlim=0, iter_lim=steps)[0]),
    ],
    ids=["LSMR", "NormalCG"],
)
def test_methods_on_the_normal_equations(ours, theirs, A):
    for steps in (1, 2, 5, 12):
        assert_near(fixed(ours, steps, A), numbers(theirs(A.numpy(), RIGHT.numpy(), steps)), 1e-11)


@pytest.mark.parametrize(
    ("method", "theirs", "A"),
    [
        (il.MINRES, lambda A, b: reference.minres(A, b, rtol=1e-10)[0], SYMMETRIC),
        (il.GMRES, lambda A, b: reference.gmres(A, b, rtol=1e-10, restart=30)[0], UNSYMMETRIC),
        (il.BiCGStab, lambda A, b: reference.bicgstab(A, b, rtol=1e-10)[0], UNSYMMETRIC),
        (il.NormalCG, lambda A, b: reference.lsqr(A, b, atol=1e-12, btol=1e-12, iter_lim=900)[0], UNSYMMETRIC),
        (il.LSMR, lambda A, b: reference.lsmr(A, b, atol=1e-12, btol=1e-12, maxiter=900)[0], UNSYMMETRIC),
    ],
)
def test_answers(method, theirs, A):
    solution = method(rtol=1e-10).solve(operator(A), RIGHT)
    assert solution.status.item() == il.Status.CONVERGED
    # Both stop at residuals of 1e-10 ‖b‖; the smallest singular values are above 5e-3.
    assert_near(solution.x, numbers(theirs(A.numpy(), RIGHT.numpy())), 1e-7)


def test_neumann_is_the_truncated_series():
    A = 0.3 * UNSYMMETRIC
    eye = torch.eye(N, dtype=F64)
    for steps in (1, 2, 7):
        series = sum(torch.linalg.matrix_power(eye - 0.5 * A, i) @ RIGHT for i in range(steps)) * 0.5
        solution = il.Neumann(steps=steps, step_size=0.5).solve(operator(A), RIGHT)
        assert_near(solution.x, series, 1e-12)
        assert (solution.steps.item(), solution.status.item()) == (steps, il.Status.NOT_CHECKED)
        assert_near(solution.residual, (A @ series - RIGHT).norm() / RIGHT.norm(), 1e-12)
        # The bias that the docstring states.
        bias = -torch.linalg.matrix_power(eye - 0.5 * A, steps) @ torch.linalg.solve(A, RIGHT)
        assert_near(series - torch.linalg.solve(A, RIGHT), bias, 1e-10)


def test_neumann_with_tolerances():
    A = operator(0.3 * UNSYMMETRIC)
    solution = il.Neumann(steps=3000, step_size=0.5, rtol=1e-8, atol=0.0).solve(A, RIGHT)
    assert solution.status.item() == il.Status.CONVERGED
    assert_near(solution.x, torch.linalg.solve(0.3 * UNSYMMETRIC, RIGHT), 1e-5)
    short = il.Neumann(steps=3, step_size=0.5, rtol=1e-8, atol=0.0).solve(A, RIGHT)
    assert (short.steps.item(), short.status.item()) == (3, il.Status.MAX_STEPS)
    diverging = il.Neumann(steps=3000, step_size=5.0, rtol=1e-8, atol=0.0).solve(A, RIGHT)
    assert diverging.status.item() == il.Status.STALLED
    assert diverging.residual.item() > 1
