"""Preconditioners: what they are as matrices, that they keep the solution, and where they pay."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.linear import assert_near, operator, orthogonal, with_condition
from tests.helpers.problems import F64, normal, poisson, product, spd

METHODS = {"CG": il.CG, "MINRES": il.MINRES, "GMRES": il.GMRES, "BiCGStab": il.BiCGStab}


def quadratic_pairs(A, count, seed=0):
    """Steps and changes of the gradient of a quadratic."""
    steps = [normal(*A.shape[:-1], seed=seed + i) for i in range(count)]
    return tuple((s, product(A)(s)) for s in steps)


def recipes(A):
    return {
        "Jacobi": il.Jacobi(),
        "Jacobi, estimated": il.Jacobi(exact=0, samples=16),
        "Nystrom": il.Nystrom(rank=6),
        "LBFGS": il.LBFGSPreconditioner(quadratic_pairs(A, 8)),
        "LBFGS without pairs": il.LBFGSPreconditioner(),
    }


def as_matrix(precondition, like):
    n = like.shape[-1]
    return torch.stack([precondition(e.expand_as(like)) for e in torch.eye(n, dtype=like.dtype)], -1)


@pytest.mark.parametrize("name", recipes(spd(3)).keys())
@pytest.mark.parametrize("lanes", [(), (3,), (2, 2)])
def test_every_one_is_linear_and_positive_definite_on_lanes(name, lanes):
    count = torch.Size(lanes).numel()
    A = torch.stack([with_condition("definite", 10, 10.0 ** (k + 1)) for k in range(count)]).reshape(*lanes, 10, 10)
    precondition = recipes(A)[name].prepare(operator(A), normal(*lanes, 10))
    M = as_matrix(precondition, normal(*lanes, 10))
    r = normal(*lanes, 10, seed=2)
    assert_near(precondition(r), product(M)(r), 1e-8 * M.abs().max().item())
    assert_near(M, M.mT, 1e-9 * M.abs().max().item())
    assert (torch.linalg.eigvalsh((M + M.mT) / 2) > 0).all()


@pytest.mark.parametrize("name", recipes(spd(3)).keys())
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_solution_stays(method, name):
    A = torch.stack([with_condition("definite", 10, 1e3), spd(10)])
    b = normal(2, 10)
    solution = method(rtol=1e-10, preconditioner=recipes(A)[name]).solve(operator(A), b)
    assert (solution.status == il.Status.CONVERGED).all()
    # The tolerance times the condition number.
    assert_near(solution.x, torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), 1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_an_exact_one_needs_one_step(method):
    A, b = spd(10), normal(10)
    inverse = torch.linalg.inv(A)
    solution = method(rtol=1e-10, preconditioner=product(inverse)).solve(operator(A), b)
    assert solution.steps.item() == 1
    assert_near(solution.x, inverse @ b, 1e-9)


def test_jacobi_is_the_diagonal():
    A = torch.stack([spd(5), spd(5, seed=1), torch.diag(torch.tensor([1.0, -2.0, 0.0, 4.0, 5.0], dtype=F64))])
    precondition = il.Jacobi().prepare(operator(A), normal(3, 5))
    r = normal(3, 5, seed=1)
    diagonal = A.diagonal(dim1=-2, dim2=-1).abs()
    assert_near(precondition(r), r / torch.where(diagonal > 0, diagonal, 1.0), 1e-14)


def test_jacobi_estimates_a_diagonal_that_dominates():
    n = 60
    d = torch.logspace(0, 4, n, dtype=F64)
    coupling = 1e-3 * torch.triu(normal(n, n), 1)
    A = torch.diag(d) + coupling + coupling.T
    ones = torch.ones(n, dtype=F64)
    estimate = 1 / il.Jacobi(exact=0, samples=64).prepare(operator(A), ones)(ones)
    # The standard deviation of an entry is √(Σ a_ij²/samples) ≈ 1e-3.
    assert_near(estimate, d, 5e-3)
    assert torch.equal(estimate, 1 / il.Jacobi(exact=0, samples=64).prepare(operator(A), ones)(ones))
    # A diagonal lost in the noise is never taken smaller than the noise.
    noisy = 1 / il.Jacobi(exact=0, samples=8).prepare(operator(A - torch.diag(d)), ones)(ones)
    assert noisy.min() > 1e-5


def test_jacobi_pays_for_badly_scaled_unknowns_only():
    n = 60
    d = torch.logspace(0, 3, n, dtype=F64)
    A, b = spd(n) * d[:, None] * d, normal(n)
    plain, scaled = (il.CG(preconditioner=p).solve(operator(A), b).steps.item() for p in (None, il.Jacobi()))
    assert scaled < plain / 3
    plain, scaled = (il.CG(preconditioner=p).solve(operator(poisson(n)), b).steps.item() for p in (None, il.Jacobi()))
    assert scaled == plain


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_nystrom_deflates_the_top_of_the_spectrum(shift):
    n, rank = 50, 10
    values = torch.cat([torch.logspace(4, 1, rank, dtype=F64), torch.zeros(n - rank, dtype=F64)]) + 1e-3
    A = orthogonal(n) @ values.diag() @ orthogonal(n).T
    A = (A + A.T) / 2
    M = as_matrix(il.Nystrom(rank=rank + 5, shift=shift).prepare(operator(A), normal(n)), normal(n))
    # With the shift known, the rest is a low rank, which the sketch gets exactly. Without, the sketch takes the flat
    # part for its trace: n - rank = 40 times as high.
    assert torch.linalg.cond(M @ A) < (1.01 if shift else 2 * 40)
    plain, deflated = (
        il.CG(rtol=1e-6, preconditioner=p).solve(operator(A), normal(n)).steps.item()
        for p in (None, il.Nystrom(rank=rank + 5, shift=shift))
    )
    assert deflated < plain / 2


def test_nystrom_of_full_rank_is_the_inverse():
    A = spd(6)
    M = as_matrix(il.Nystrom(rank=100).prepare(operator(A), normal(6)), normal(6))
    assert_near(M @ A, torch.linalg.eigvalsh(A)[0] * torch.eye(6, dtype=F64), 1e-10)


def test_nystrom_stays_definite_where_the_operator_is_not():
    A = torch.stack([with_condition("indefinite", 12, 1e2), torch.full((12, 12), torch.nan, dtype=F64)])
    precondition = il.Nystrom(rank=6).prepare(operator(A), normal(2, 12))
    M = as_matrix(precondition, normal(2, 12))
    assert (torch.linalg.eigvalsh((M[0] + M[0].mT) / 2) > 0).all()
    # A lane of which nothing can be learnt is left alone.
    assert_near(M[1], torch.eye(12, dtype=F64), 0)
    b = normal(2, 12)
    solution = il.MINRES(rtol=1e-10, preconditioner=il.Nystrom(rank=6)).solve(operator(A, symmetric=True), b)
    assert solution.status.tolist() == [il.Status.CONVERGED, il.Status.NON_FINITE]
    assert_near(solution.x[0], torch.linalg.solve(A[0], b[0]), 1e-7)


def test_lbfgs_inverse_satisfies_the_secant_equation():
    A = torch.stack([spd(6), spd(6, seed=1)])
    pairs = quadratic_pairs(A, 3)
    precondition = il.LBFGSPreconditioner().with_pairs(pairs).prepare(operator(A), normal(2, 6))
    assert_near(precondition(pairs[-1][1]), pairs[-1][0], 1e-12)
    # n conjugate steps on a quadratic give the inverse; random ones do not, and the secant holds for the last alone.
    vectors = torch.linalg.eigh(A[0])[1].T
    conjugate = il.LBFGSPreconditioner(tuple((s, A[0] @ s) for s in vectors)).prepare(operator(A[0]), normal(6))
    assert_near(as_matrix(conjugate, normal(6)), torch.linalg.inv(A[0]), 1e-10)


def test_lbfgs_leaves_out_pairs_of_negative_curvature_lane_by_lane():
    s = normal(2, 4)
    good, bad = s[0], s[1]
    pairs = ((s, torch.stack([2 * good, -bad])),)
    precondition = il.LBFGSPreconditioner(pairs).prepare(operator(torch.eye(4, dtype=F64)), s)
    r = normal(2, 4, seed=5)
    assert_near(precondition(r), torch.stack([r[0] / 2, r[1]]), 1e-12)


def test_pairs_shared_by_all_lanes():
    A = spd(4)
    pairs = quadratic_pairs(A, 2)
    many = il.LBFGSPreconditioner(pairs).prepare(operator(A), normal(3, 4))
    one = il.LBFGSPreconditioner(pairs).prepare(operator(A), normal(4))
    r = normal(3, 4, seed=1)
    assert_near(many(r), torch.stack([one(row) for row in r]), 1e-13)


def test_a_preconditioner_that_is_not_definite_is_found():
    A, b = spd(4), normal(4)
    for method in (il.CG, il.MINRES):
        solution = method(preconditioner=lambda r: -r).solve(operator(A), b)
        assert solution.status.item() not in (il.Status.CONVERGED, il.Status.NOT_CHECKED)
    assert il.MINRES(preconditioner=lambda r: -r).solve(operator(A), b).status.item() == il.Status.INDEFINITE


def test_preparation_is_no_part_of_a_derivative():
    scale = torch.ones((), dtype=F64, requires_grad=True)
    A, b = spd(5), normal(5)
    for recipe in (il.Jacobi(), il.Jacobi(exact=0), il.Nystrom(rank=3)):
        given = il.Operator(lambda y: scale * product(A)(y), symmetric=True)
        x = il.CG(rtol=None, atol=None, max_steps=5, preconditioner=recipe).solve(given, b).x
        # d(sA)⁻¹b/ds = -A⁻¹b at s = 1: five steps are exact, whatever the preconditioner.
        (derivative,) = torch.autograd.grad(x.sum(), scale)
        assert_near(derivative, -torch.linalg.solve(A, b).sum(), 1e-10)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [(il.Nystrom, {"rank": 0}), (il.Nystrom, {"rank": 2, "shift": -1.0}), (il.Jacobi, {"samples": 1})],
)
def test_options_that_mean_nothing(recipe, options):
    with pytest.raises(il.MisuseError, match="pass"):
        recipe(**options)
