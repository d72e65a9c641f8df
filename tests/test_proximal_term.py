"""The proximal fixed point x - prox(x - ∇f(x)) = 0 as a term: its Jacobian I - P(I - H), its products, lanes."""

import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from implicitlayers.flat import Structure
from implicitlayers.terms import ObjectiveTerm, ProximalTerm
from implicitlayers.testing import assert_gradients_match
from tests.helpers.problems import F64, each, normal, quadratic, spd

N = 5
A, B, X = spd(N), 2 * normal(N, seed=1), normal(N, seed=2)
DIRECTIONS = normal(3, N, seed=3)
LAM = torch.linspace(0.2, 0.9, N, dtype=F64)


def curved(x, A, b):
    return quadratic(x, A, b) + (x**4).sum() / 12


def residuals(x, A, b):
    return A @ x.sinh() - b


def half_squares(z, *_):
    return z.square().sum() / 2


NONSMOOTH = {
    "lasso": il.Lasso(LAM),
    "elastic-net": il.ElasticNet(0.4, LAM),
    "group-lasso": il.GroupLasso(0.5),
    "box": il.Box(-0.5, LAM),
    "simplex": il.Simplex(9.0),
    "l1-ball": il.L1Ball(1.5),
    "l2-ball": il.L2Ball(0.8),
    "lasso-and-ridge": il.Ridge(0.3) + il.Lasso(LAM),
}
EVERY = pytest.mark.parametrize("regularizer", NONSMOOTH.values(), ids=NONSMOOTH.keys())


def term_of(regularizer, objective=None):
    """The term for ``(A, b, *tensors of the regularizer)``, and these tensors."""
    objective = ObjectiveTerm(curved, (0, 1)) if objective is None else objective
    pieces = regularizer.pose(Structure.of(X), X, 2)
    tensors = [A, B, *pieces.tensors]
    return ProximalTerm((objective, *pieces.terms), pieces.nonsmooth, len(tensors)), tensors, pieces


def assert_near(ours, expected, tol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def columns(product):
    """The matrix of a linear map."""
    return vmap(product, out_dims=1)(torch.eye(N, dtype=F64))


def smooth_curvature(x, pieces):
    return hessian(curved)(x, A, B) + (0.3 * torch.eye(N, dtype=F64) if pieces.terms else 0)


@EVERY
def test_jacobian_is_written_down_rightly(regularizer):
    term, tensors, pieces = term_of(regularizer)
    J = jacfwd(lambda x: term.residual(x, *tensors))(X)
    # By hand: I - P (I - H), P the Jacobian of the map at x - ∇f(x).
    forward = X - jacrev(curved)(X, A, B) - (0.3 * X if pieces.terms else 0)
    one = torch.ones((), dtype=F64)
    P = jacrev(lambda z: pieces.nonsmooth.prox(z, one, *[tensors[slot] for slot in pieces.nonsmooth.slots]))(forward)
    eye = torch.eye(N, dtype=F64)
    assert_near(J, eye - P @ (eye - smooth_curvature(X, pieces)))
    assert P.abs().max() > 0.1, "everything is held here, and the curvature plays no part"
    assert_near(columns(lambda y: term.product(y, X, *tensors)), J)
    assert_near(columns(lambda y: term.transposed(y, X, *tensors)), J.T)


def test_jacobian_is_not_symmetric():
    term, tensors, _ = term_of(NONSMOOTH["box"])
    J = jacfwd(lambda x: term.residual(x, *tensors))(X)
    assert (J - J.T).abs().max() > 0.1
    assert not term.symmetric


@EVERY
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_linearized_once_is_as_good(regularizer, transposed):
    term, tensors, _ = term_of(regularizer)
    J = jacfwd(lambda x: term.residual(x, *tensors))(X)
    recorded = term.linearize(X, tensors, (), transposed=transposed)
    with torch.no_grad():
        kept = term.linearize(X, tensors, (), transposed=transposed)
    for product in (recorded, kept):
        assert_near(columns(product), J.T if transposed else J)


@pytest.mark.parametrize("name", ["lasso-and-ridge", "l2-ball"])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_lanes(name, transposed):
    term, tensors, _ = term_of(NONSMOOTH[name])
    points, bs, ys = normal(3, N, seed=5), 2 * normal(3, N, seed=6), DIRECTIONS
    lanes = ((None, 0, *[None] * (len(tensors) - 2)),)
    many = [tensors[0], bs, *tensors[2:]]

    def alone(i):
        J = jacfwd(lambda x: term.residual(x, tensors[0], bs[i], *tensors[2:]))(points[i])
        return (J.T if transposed else J) @ ys[i]

    expected = each(alone, range(3))
    assert_near(term.linearize(points, many, lanes, transposed=transposed)(ys), expected)
    with torch.no_grad():
        assert_near(term.linearize(points, many, lanes, transposed=transposed)(ys), expected)


@pytest.mark.parametrize("name", ["lasso-and-ridge", "l2-ball"])
def test_products_are_differentiable_in_everything(name):
    term, tensors, _ = term_of(NONSMOOTH[name])
    for product in (term.product, term.transposed):
        assert_gradients_match(product, DIRECTIONS[0], X, *tensors, modes=("reverse", "forward"))


def test_gauss_newton_curvature():
    whole = ObjectiveTerm(lambda x, A, b: half_squares(residuals(x, A, b)), (0, 1), residuals, half_squares)
    lam = torch.linspace(0.2, 8.0, N, dtype=F64)
    term, tensors, _ = term_of(il.Ridge(0.3) + il.Lasso(lam), whole)
    J = jacfwd(residuals)(X, A, B)
    forward = X - J.T @ residuals(X, A, B) - 0.3 * X
    P = torch.diag((forward.abs() > lam).to(F64))
    eye = torch.eye(N, dtype=F64)
    assert 0 < P.trace() < N
    G = J.T @ J + 0.3 * eye
    for variant, curvature in ((term, hessian(whole.fn)(X, A, B) + 0.3 * eye), (term.with_gauss_newton(), G)):
        expected = eye - P @ (eye - curvature)
        assert_near(columns(lambda y, v=variant: v.product(y, X, *tensors)), expected)
        assert_near(columns(lambda y, v=variant: v.transposed(y, X, *tensors)), expected.T)
        with torch.no_grad():
            assert_near(columns(variant.linearize(X, tensors, ())), expected)
            assert_near(columns(variant.linearize(X, tensors, (), transposed=True)), expected.T)


def test_all_products_of_a_linear_solve_share_one_evaluation_of_the_objective():
    calls = []

    def counted(x, A, b):
        calls.append(1)
        return curved(x, A, b)

    term, tensors, _ = term_of(NONSMOOTH["lasso"], ObjectiveTerm(counted, (0, 1)))
    with torch.no_grad():
        product = term.linearize(X, tensors, ())
        built = len(calls)
        for y in DIRECTIONS:
            product(y)
    assert len(calls) == built == 2


@EVERY
def test_it_vanishes_at_minimizers_and_nowhere_else(regularizer):
    term, tensors, pieces = term_of(regularizer)
    x, step = X, torch.tensor(0.1, dtype=F64)
    params = [tensors[slot] for slot in pieces.nonsmooth.slots]
    for _ in range(600):
        slope = jacrev(curved)(x, A, B) + (0.3 * x if pieces.terms else 0)
        x = pieces.nonsmooth.prox(x - step * slope, step, *params)
    assert_near(term.residual(x, *tensors), torch.zeros(N, dtype=F64))
    assert term.residual(x + 0.05 * DIRECTIONS[0], *tensors).norm() > 1e-3
