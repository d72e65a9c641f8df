"""Every iterative method on every oracle: condition numbers, scales, lanes, and what cannot be solved."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, operator, orthogonal, relative_residual, with_condition
from tests.helpers.problems import F64, normal, poisson, product, spd, symmetrized

F32 = torch.float32
Status = il.Status

ANY = {
    "GMRES": il.GMRES,
    "BiCGStab": il.BiCGStab,
    "NormalCG": il.NormalCG,
    "LSMR": il.LSMR,
}
SYMMETRIC = {"CG": il.CG, "MINRES": il.MINRES, **ANY}
every = pytest.mark.parametrize("method", SYMMETRIC.values(), ids=SYMMETRIC.keys())
general = pytest.mark.parametrize("method", ANY.values(), ids=ANY.keys())

# Condition number 4647.
SKEWED = torch.tensor([[3.9, 1.65], [6.845, 2.9]], dtype=F64)


# --- systems with known answers -----------------------------------------------------------------------------


@every
def test_poisson(method):
    options = {"restart": 60} if method is il.GMRES else {}
    solution = method(rtol=1e-12, **options).solve(operator(poisson(100)), torch.ones(100, dtype=F64))
    assert solution.status.item() == Status.CONVERGED
    i = torch.arange(1, 101, dtype=F64)
    # The residual 1e-12 · 10 over the smallest eigenvalue 1e-3, with room for ten.
    assert_near(solution.x, i * (101 - i) / 2, 1e-7)
    # By symmetry fifty eigenvectors take part; rounding costs the other recurrences some steps more.
    assert solution.steps.item() <= {il.BiCGStab: 80, il.NormalCG: 200, il.LSMR: 200}.get(method, 50)


@general
@pytest.mark.parametrize("transposed", [False, True])
def test_ill_conditioned_pair(method, transposed):
    A = operator(SKEWED)
    A, matrix = (A.T, SKEWED.T) if transposed else (A, SKEWED)
    x = torch.tensor([1.0, -2.0], dtype=F64)
    solution = method(rtol=1e-13).solve(A, matrix @ x)
    assert solution.status.item() == Status.CONVERGED
    # Residuals of some machine epsilons of ‖A‖‖x‖ are an error of that times the condition number.
    assert_near(solution.x, x, 1e-8)


@every
def test_diagonal_system(method):
    A, b = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.ones(2, dtype=F64)
    solution = method(rtol=1e-13).solve(operator(A), b)
    assert_near(solution.x, torch.tensor([1.0, 1 / 3], dtype=F64), 1e-12)
    assert solution.steps.item() <= 3
    assert solution.status.item() == Status.CONVERGED


@every
@pytest.mark.parametrize("value", [4.0, -0.25])
def test_unknown_of_one_element(method, value):
    solution = method().solve(operator(torch.tensor([[value]], dtype=F64)), torch.tensor([2.0], dtype=F64))
    if method is il.CG and value < 0:
        assert solution.status.item() == Status.INDEFINITE
        return
    assert_near(solution.x, torch.tensor([2.0 / value], dtype=F64), 1e-14)
    assert (solution.steps.item(), solution.status.item()) == (1, Status.CONVERGED)


# Steps that GMRES with cycles of 30 and BiCGStab need beyond this are no fault, but no test either.
REACH = {il.GMRES: 1e6, il.BiCGStab: 1e4}


@pytest.mark.parametrize(
    ("dtype", "condition"), [*((F64, c) for c in (1e0, 1e2, 1e4, 1e6, 1e8)), *((F32, c) for c in (1e2, 1e5, 1e8))]
)
@pytest.mark.parametrize("kind", ["definite", "indefinite", "unsymmetric"])
@every
def test_what_converged_is_as_near_as_it_says(method, kind, condition, dtype):
    if method.requires_symmetric and (kind == "unsymmetric" or (kind == "indefinite" and method is il.CG)):
        pytest.skip("not for this kind of matrix")
    n = 20
    A = with_condition(kind, n, condition, dtype)
    x = normal(n, seed=7, dtype=dtype)
    b = A @ x
    solution = method(max_steps=400).solve(operator(A), b)
    true = relative_residual(A.double(), solution.x.double(), b.double())
    eps = torch.finfo(dtype).eps
    # Whatever happened, the residual reported is that of the vector returned.
    assert abs(solution.residual.item() - true) <= 0.01 * true + 20 * eps
    tolerance = max(1e-8, 8 * eps)
    # A residual of 8 epsilons of ‖A‖‖x‖ counts as zero, if it is below √eps; ‖A‖ is 1, and at most 2 unsymmetric.
    rounding = min(16 * eps * (x.norm() / b.norm()).item(), eps**0.5)
    if solution.status.item() == Status.CONVERGED:
        assert true <= max(2.1 * tolerance, 1.5 * rounding)
    else:
        assert solution.status.item() in (Status.STALLED, Status.MAX_STEPS, Status.SINGULAR)
        assert true > tolerance
    # In double precision every method gets there; what one cannot do stands in its docstring.
    reach = 1e6 if kind == "definite" else REACH.get(method, 1e6) / (100 if kind == "indefinite" else 1)
    if dtype == F64 and condition <= reach:
        assert solution.status.item() == Status.CONVERGED
        error = (solution.x - x).norm() / x.norm()
        # ‖x̂ - x‖ ≤ κ‖r‖ / ‖A‖ in the worst case.
        assert error <= 2 * true * condition * (b.norm() / x.norm()) + 1e-12


@every
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e30])
def test_right_hand_sides_of_every_scale_in_single_precision(method, scale):
    A, b = spd(4, dtype=F32), (normal(4) * scale).float()
    solution = method(rtol=1e-6).solve(operator(A), b)
    assert solution.status.item() == Status.CONVERGED
    expected = torch.linalg.solve(A.double(), b.double())
    assert_near(solution.x.double() / scale, expected / scale, 1e-5)


@general
def test_operators_of_any_scale_in_single_precision(method):
    A, b = spd(4, dtype=F32) + torch.triu(normal(4, 4).float(), 1) / 3, normal(4).float()
    expected = torch.linalg.solve(A.double(), b.double())
    for scale in (1e-15, 1e15):
        solution = method(rtol=1e-5).solve(operator(A * scale), b)
        assert solution.status.item() == Status.CONVERGED
        assert_near(solution.x.double() * scale, expected, 1e-4)


@every
def test_warm_start(method):
    A, b = poisson(40), 1e3 * normal(40)
    x = torch.linalg.solve(A, b)
    warm = method(rtol=1e-9).solve(operator(A), b, x)
    assert (warm.steps.item(), warm.status.item()) == (0, Status.CONVERGED)
    assert_near(warm.x, x, 1e-8)
    near = method(rtol=1e-9).solve(operator(A), b, x + 1e-4 * normal(40, seed=3))
    cold = method(rtol=1e-9).solve(operator(A), b)
    assert 0 < near.steps.item() < cold.steps.item()
    assert relative_residual(A, near.x, b) <= 2e-9


@every
def test_a_start_further_away_than_zero_is_dropped_lane_by_lane(method):
    A, x = spd(6), normal(6, seed=1)
    near = A @ x
    solution = method(rtol=1e-9).solve(operator(A), torch.stack([near, 1e-24 * near, 0 * near]), x.expand(3, 6))
    assert solution.status.tolist() == [Status.CONVERGED] * 3
    assert solution.steps[0] == 0
    assert_near(solution.x[1] * 1e24, x, 1e-7)
    assert_near(solution.x[2], 0 * x, 0.0)


@every
def test_atol_is_in_the_units_of_the_right_hand_side(method):
    A = poisson(50)
    for scale in (1e-6, 1e6):
        b = scale * normal(50)
        residual = (A @ method(rtol=0.0, atol=1e-3 * scale).solve(operator(A), b).x - b).norm().item()
        assert 1e-9 * scale < residual <= 1e-3 * scale
    assert method(rtol=0.0, atol=1e9).solve(operator(A), b).steps.item() == 0


@every
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_exactly_max_steps_without_looking(method, steps):
    A, calls = spd(4) + 0, {"A": 0, "At": 0}

    def counted(name, matrix):
        def apply(y):
            calls[name] += 1
            return product(matrix)(y)

        return apply

    unsymmetric = not method.requires_symmetric
    given = il.Operator(counted("A", A), symmetric=not unsymmetric, apply_transpose=counted("At", A.T))
    solver = method(rtol=None, atol=None, max_steps=steps)
    solution = solver.solve(given, normal(4))
    assert not solver.looks
    assert (solution.steps.item(), solution.status.item()) == (steps, Status.NOT_CHECKED)
    products = {il.BiCGStab: 2 * steps, il.GMRES: steps + (steps - 1) // 4}.get(method, steps)
    assert calls == {"A": products, "At": steps + 1 if method.requires_transpose else 0}
    assert_near(solution.residual, (A @ solution.x - normal(4)).norm() / normal(4).norm(), 1e-12)


@every
def test_steps_after_the_exact_solution_do_no_harm(method):
    A = torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
    for b, x in (
        (torch.ones(2, dtype=F64), torch.tensor([1.0, 1 / 3], dtype=F64)),
        (torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)),
    ):
        for steps in (3, 10, 50):
            solution = method(rtol=None, atol=None, max_steps=steps).solve(operator(A), b)
            assert_near(solution.x, x, 1e-13)
            assert solution.status.item() == Status.NOT_CHECKED


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


# --- lanes --------------------------------------------------------------------------------------------------


@every
def test_a_lane_that_breaks_breaks_alone(method):
    good, b = spd(3), normal(6, 3)
    b[3], b[4] = torch.nan, 0
    A = torch.stack([good, torch.zeros_like(good), torch.full_like(good, torch.nan), good, good, good])
    solution = method(rtol=1e-11).solve(operator(A, symmetric=True), b)
    expected = [
        Status.CONVERGED, Status.SINGULAR, Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED, Status.CONVERGED,
    ]  # fmt: skip
    assert [Status(code) for code in solution.status.tolist()] == expected
    for lane in (0, 5):
        assert_near(solution.x[lane], torch.linalg.solve(good, b[lane]), 1e-9)
    assert torch.equal(solution.x[4], torch.zeros(3, dtype=F64))


@every
def test_lanes_are_those_of_a_loop(method):
    A = torch.stack([spd(8, seed=seed, shift=10.0 ** (1 - seed)) for seed in range(4)])
    if not method.requires_symmetric:
        A = A + torch.triu(normal(8, 8), 1) / 10
    b = normal(4, 8, seed=9) * torch.logspace(-3, 3, 4, dtype=F64)[:, None]

    def elementwise(A):
        # Unlike a matrix product, the same to the last bit for one lane and for many.
        return il.Operator(
            lambda y: (A * y.unsqueeze(-2)).sum(-1),
            symmetric=method.requires_symmetric,
            apply_transpose=lambda y: (A.mT * y.unsqueeze(-2)).sum(-1),
        )

    together = method(rtol=1e-4).solve(elementwise(A), b)
    assert len(set(together.steps.tolist())) > 1
    for lane in range(4):
        alone = method(rtol=1e-4).solve(elementwise(A[lane]), b[lane])
        assert together.steps[lane] == alone.steps
        assert together.status[lane] == alone.status == Status.CONVERGED
        # GMRES multiplies by its basis.
        torch.testing.assert_close(together.x[lane], alone.x, rtol=1e-9 if method is il.GMRES else 0, atol=0)


@every
def test_two_levels_of_lanes(method):
    A, b = spd(3), normal(2, 4, 3)
    solution = method(rtol=1e-12).solve(operator(A), b)
    assert solution.status.shape == solution.steps.shape == solution.residual.shape == (2, 4)
    assert_near(solution.x, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), 1e-10)


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
