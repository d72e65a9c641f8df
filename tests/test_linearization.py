"""The curvature on all lanes, by products and as matrices formed lane by lane, against dense derivatives."""

import pytest
import torch
from torch.func import hessian, jacrev

from implicitlayers.linear.operator import Operator
from implicitlayers.problem import Posed
from implicitlayers.regularizers import QuadraticTerm
from implicitlayers.terms import ObjectiveTerm, ResidualTerm
from tests.helpers.problems import F64, normal

N = 3
# Two levels of lanes: the first tensor is shared in the inner one, the second in the outer one.
OUTER, INNER = 2, 4
LANES = ((None, 0, None), (0, None, None))
X, M, WEIGHTS = normal(OUTER, INNER, N, seed=1), normal(OUTER, 5, N, seed=2), normal(INNER, 5, seed=3)


def model(x, M, *_):
    return torch.tanh(M @ x) + x.square().sum()


def loss(z, _, weights, *__):
    return (z * weights).sin().sum() + z.square().sum()


def objective(x, *params):
    return loss(model(x, *params), *params)


def gauss_newton(x, *params):
    J = jacrev(model)(x, *params)
    return J.T @ hessian(loss)(model(x, *params), *params) @ J


def equation(x, M, weights, *_):
    return (M.T @ (weights * torch.tanh(M @ x))).roll(1) * x


# name: (the term, its matrix in one lane)
TERMS = {
    "objective": (ObjectiveTerm(objective, (0, 1)), hessian(objective)),
    "gauss-newton": (ObjectiveTerm(objective, (0, 1), model, loss, gauss_newton=True), gauss_newton),
    "equation": (ResidualTerm(equation, (0, 1)), jacrev(equation)),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("name", TERMS)
def test_the_matrix_of_every_lane(name, damping, transposed, recorded):
    term, matrix = TERMS[name]
    lam = torch.tensor([0.3, 0.2, 0.9], dtype=F64)
    posed = Posed((term, QuadraticTerm((2,))))
    A = torch.stack([torch.stack([matrix(X[i, j], M[i], WEIGHTS[j]) for j in range(INNER)]) for i in range(OUTER)])
    A = (A.mT if transposed else A) + torch.diag(lam + damping)
    with torch.set_grad_enabled(recorded):
        linearized = posed.bind((M, WEIGHTS, lam), LANES).linearize(X, damping, transposed=transposed)
        by_lane = linearized.dense_by_lane(X)
        by_products = torch.stack([linearized(e.expand_as(X)) for e in torch.eye(N, dtype=F64)], -1)
        torch.testing.assert_close(Operator(linearized, symmetric=False).dense(X), by_lane, rtol=0, atol=0)
    # Sums of a dozen numbers of order one, in another order.
    torch.testing.assert_close(by_lane, A, rtol=0, atol=1e-13)
    torch.testing.assert_close(by_products, A, rtol=0, atol=1e-13)


def test_a_curvature_that_is_a_diagonal():
    lam = normal(INNER, N, seed=4)
    linearized = Posed((QuadraticTerm((0,)),)).bind((lam,), ((0,), (None,))).linearize(X, 0.5)
    expected = torch.diag_embed(lam + 0.5).expand(OUTER, INNER, N, N)
    torch.testing.assert_close(linearized.dense_by_lane(X), expected, rtol=0, atol=0)
    torch.testing.assert_close(linearized(X), (lam + 0.5) * X, rtol=0, atol=0)


def test_without_lanes_or_with_more_of_them_the_products_are_taken():
    alone = Posed((ObjectiveTerm(objective, (0, 1)),)).bind((M[0], WEIGHTS[0])).linearize(X[0, 0])
    assert alone.dense_by_lane(X[0, 0]) is None
    expected = hessian(objective)(X[0, 0], M[0], WEIGHTS[0])
    torch.testing.assert_close(Operator(alone, symmetric=True).dense(X[0, 0]), expected, rtol=0, atol=1e-13)
    lanes = Posed((ObjectiveTerm(objective, (0, 1)),)).bind((M[0], WEIGHTS), ((None, 0),)).linearize(X[0])
    assert lanes.dense_by_lane(X) is None
