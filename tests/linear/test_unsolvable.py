"""What no linear solver can solve says so: singular and indefinite systems, breakdowns, misuse."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import SKEWED, SYMMETRIC, assert_near, every, general, operator, orthogonal
from tests.helpers.problems import F64, normal, poisson, product, spd, symmetrized

Status = il.Status


# --- what cannot be solved says so --------------------------------------------------------------------------


@every
def test_singular_and_consistent(method):
    A = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=F64))
    solution = method(rtol=1e-12).solve(operator(A), torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    assert solution.status.item() == Status.CONVERGED
    assert_near(solution.x, torch.tensor([1.0, 1 / 3, 0.0], dtype=F64), 1e-11)


@pytest.mark.parametrize("method", [il.MINRES, il.GMRES, il.NormalCG, il.LSMR])
def test_singular_and_inconsistent_gives_the_least_squares_solution(method):
    A = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=F64))
    solution = method().solve(operator(A), torch.ones(3, dtype=F64))
    assert solution.status.item() == Status.SINGULAR
    assert_near(solution.x[:2], torch.tensor([1.0, 1 / 3], dtype=F64), 1e-10)
    assert_near(solution.residual, torch.tensor(3.0, dtype=F64).rsqrt(), 1e-10)
    if method.requires_transpose:
        assert_near(solution.x[2], torch.tensor(0.0, dtype=F64), 1e-12)


@every
def test_singular_and_inconsistent_is_never_converged(method):
    A = orthogonal(8) @ torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 0], dtype=F64)) @ orthogonal(8).T
    solution = method(max_steps=200).solve(operator((A + A.T) / 2), normal(8))
    assert solution.status.item() not in (Status.CONVERGED, Status.NOT_CHECKED)
    assert solution.residual.item() > 0.05
    assert solution.x.isfinite().all()


@every
def test_a_matrix_of_zeros_is_singular(method):
    solution = method().solve(operator(torch.zeros(3, 3, dtype=F64)), torch.ones(3, dtype=F64))
    assert solution.status.item() == Status.SINGULAR
    assert torch.equal(solution.x, torch.zeros(3, dtype=F64))
    assert solution.residual.item() == pytest.approx(1.0)


def test_breakdown_of_krylov_spaces_says_so():
    # b = e₁ spans its own Krylov space under the shift, and the solution e₂ lies outside.
    shift = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    for method in (il.GMRES, il.BiCGStab):
        solution = method().solve(operator(shift), torch.tensor([1.0, 0.0], dtype=F64))
        assert solution.status.item() == Status.SINGULAR
        assert solution.residual.item() == pytest.approx(1.0)
    # The methods on the normal equations have no such trouble.
    solution = il.LSMR().solve(operator(shift), torch.tensor([1.0, 0.0], dtype=F64))
    assert_near(solution.x, torch.tensor([0.0, 1.0], dtype=F64), 1e-14)


def test_skew_symmetric_matrices_stop_bicgstab_only():
    A, b = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    assert il.BiCGStab().solve(operator(A), b).status.item() == Status.STALLED
    for method in (il.GMRES, il.NormalCG, il.LSMR):
        assert_near(method().solve(operator(A), b).x, torch.tensor([-2.0, 1.0], dtype=F64), 1e-13)


def test_bicgstab_that_stalls_keeps_its_best_iterate():
    A, b = orthogonal(40, seed=1) @ orthogonal(40, seed=2), normal(40)
    solution = il.BiCGStab().solve(operator(A), b)
    assert solution.status.item() == Status.STALLED
    assert solution.residual.item() <= 1.0
    assert_near(solution.residual, (A @ solution.x - b).norm() / b.norm(), 1e-12)


def test_restarted_gmres_stagnates_honestly():
    # Under the cyclic shift of six nothing is gained before the sixth step.
    A, b = torch.roll(torch.eye(6, dtype=F64), 1, 0), torch.eye(6, dtype=F64)[0]
    short = il.GMRES(restart=5).solve(operator(A), b)
    assert (short.status.item(), short.residual.item()) == (Status.STALLED, 1.0)
    whole = il.GMRES(restart=6).solve(operator(A), b)
    assert (whole.status.item(), whole.steps.item()) == (Status.CONVERGED, 6)


@general
def test_indefinite_is_no_obstacle(method):
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    for solver in (method(rtol=1e-11), il.MINRES(rtol=1e-11)):
        solution = solver.solve(operator(A), torch.ones(3, dtype=F64))
        assert solution.status.item() == Status.CONVERGED
        assert_near(solution.x, torch.tensor([1.0, -0.5, 1 / 3], dtype=F64), 1e-9)


@every
def test_a_minimizing_operator_that_is_indefinite_says_so_and_points_downhill(method):
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=F64))
    steep, flat = torch.tensor([0.1, 1.0, 0.1], dtype=F64), torch.ones(3, dtype=F64)
    # With equal parts the Krylov vectors of the other methods meet no negative curvature.
    for b in (steep, flat) if method.requires_symmetric else (steep,):
        solution = method().solve(operator(A, minimizing=True), b)
        assert solution.status.item() == Status.INDEFINITE
        assert solution.x.isfinite().all()
        assert b @ solution.x >= 0
    fine = method().solve(operator(spd(3), minimizing=True), normal(3))
    assert fine.status.item() == Status.CONVERGED


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_right_hand_side_that_is_not_finite(method, bad):
    solution = method().solve(operator(torch.eye(2, dtype=F64)), torch.tensor([1.0, bad], dtype=F64))
    assert (solution.steps.item(), solution.status.item()) == (0, Status.NON_FINITE)


@every
def test_operator_that_is_not_finite(method):
    A = torch.tensor([[1.0, 0.0], [0.0, torch.nan]], dtype=F64)
    solution = method().solve(operator(A, symmetric=method.requires_symmetric), torch.ones(2, dtype=F64))
    assert solution.status.item() == Status.NON_FINITE
    assert solution.x.isfinite().all()


@every
def test_zero_right_hand_side(method):
    solution = method().solve(operator(spd(3)), torch.zeros(3, dtype=F64))
    assert torch.equal(solution.x, torch.zeros(3, dtype=F64))
    assert (solution.steps.item(), solution.status.item(), solution.residual.item()) == (0, Status.CONVERGED, 0)


@every
def test_too_few_steps_say_so(method):
    A, b = poisson(50), normal(50)
    solution = method(max_steps=5).solve(operator(A), b)
    assert (solution.steps.item(), solution.status.item()) == (5, Status.MAX_STEPS)
    assert_near(solution.residual, (A @ solution.x - b).norm() / b.norm(), 1e-12)
    # Never the start in place of an answer.
    assert solution.x.norm() > 0


@every
def test_a_tolerance_beyond_precision_ends(method):
    solution = method(rtol=0.0, atol=0.0, max_steps=10_000).solve(operator(symmetrized()), normal(2))
    assert solution.status.item() in (Status.STALLED, Status.CONVERGED)
    assert solution.steps.item() < 200


# --- misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [*(method() for method in SYMMETRIC.values()), il.Dense(), il.Auto(), il.Neumann()])
def test_complex_systems_are_refused_with_the_way_out(solver):
    A, b = spd(2) + 1j * torch.diag(normal(2)), normal(2) + 1j * normal(2, seed=1)
    with pytest.raises(il.MisuseError, match=r"complex128.*view_as_real"):
        solver.solve(il.Operator(product(A), symmetric=True), b)
    with pytest.raises(il.MisuseError, match=r"int64.*get_default_dtype"):
        solver.solve(il.Operator(lambda y: y, symmetric=True), torch.ones(2, dtype=torch.int64))
    with pytest.raises(il.MisuseError, match=r"reshape\(1\)"):
        solver.solve(il.Operator(lambda y: y, symmetric=True), torch.tensor(1.0))
    # The way out is one.
    real = il.Operator(
        lambda y: torch.view_as_real(A @ torch.view_as_complex(y.reshape(2, 2))).flatten(-2),
        symmetric=False,
        apply_transpose=lambda y: torch.view_as_real(A.mH @ torch.view_as_complex(y.reshape(2, 2))).flatten(-2),
    )
    x = il.LSMR().solve(real, torch.view_as_real(b).flatten(-2)).x
    assert_near(torch.view_as_complex(x.reshape(2, 2)), torch.linalg.solve(A, b), 1e-7)


@pytest.mark.parametrize("method", [il.NormalCG, il.LSMR])
def test_a_missing_transpose_is_named(method):
    with pytest.raises(il.MisuseError, match="apply_transpose"):
        method().solve(il.Operator(product(SKEWED), symmetric=False), torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (il.GMRES, {"restart": 0}),
        (il.Neumann, {"steps": 0}),
        (il.Neumann, {"step_size": 0.0}),
        *((m, {"max_steps": 0}) for m in SYMMETRIC.values()),
        *((m, {"rtol": None}) for m in (*SYMMETRIC.values(), il.Auto)),
    ],
)
def test_options_that_mean_nothing(method, options):
    with pytest.raises(il.MisuseError, match="pass"):
        method(**options)
