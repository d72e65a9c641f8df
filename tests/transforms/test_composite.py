"""The transform table for a problem with kinks and a constrained one, against Newton's method on the free coordinates.

Both the objective and what has kinks depend on θ: data, curvature, and strength or bounds.
"""

import functools

import pytest
import torch

import implicitlayers as il
from implicitlayers.functorch import all_lanes
from tests.helpers.cases import BATCH, ONE, THETA, TOL, TRANSFORMS
from tests.helpers.problems import F64, coupled
from tests.helpers.proximal import held, iterated, solve

ADJOINTS = {
    "auto": il.Implicit(on_failure="raise"),
    "gmres": il.Implicit(il.GMRES(rtol=1e-13), on_failure="raise"),
}


CAP = torch.tensor([0.3, 0.1, 0.3], dtype=F64)


def strength(theta):
    return 0.3 + theta.square().sum() / 20


def bounds(theta):
    return -0.05 - theta[0].square() / 40, CAP + theta.square() / 20


def lasso_map(y, step, theta):
    lam = step * strength(theta)
    return torch.where(y.abs() < lam, torch.zeros_like(y), y - lam * y.sign())


def box_map(y, step, theta):
    lower, upper = bounds(theta)
    return torch.minimum(torch.maximum(y, lower), upper)


@functools.cache
def solution(map_of, theta):
    """To a few digits, which tell the active set."""
    # Made inside a transform at times, and kept beyond it.
    return all_lanes(iterated(coupled, torch.tensor(theta, dtype=F64), map_of))


def lasso_oracle(theta):
    x = solution(lasso_map, tuple(all_lanes(theta).tolist()))
    objective = lambda z, t: coupled(z, t) + strength(t) * (x.sign() * z).sum()  # noqa: E731
    return held(objective, x, torch.zeros_like(theta), theta, x != 0)


def box_oracle(theta):
    plain = all_lanes(theta)
    x = solution(box_map, tuple(plain.tolist()))
    low, high = (x == bound for bound in bounds(plain))
    lower, upper = bounds(theta)
    return held(coupled, x, torch.where(low, lower, torch.where(high, upper, x)), theta, ~(low | high))


def lasso_layer(adjoint, theta):
    x0 = torch.zeros(3, dtype=F64)
    return solve(coupled, x0, theta, regularizer=il.Lasso(strength(theta)), adjoint=adjoint)


def box_layer(adjoint, theta):
    return solve(coupled, torch.zeros(3, dtype=F64), theta, regularizer=il.Box(*bounds(theta)), adjoint=adjoint)


PROBLEMS = {"lasso": (lasso_layer, lasso_oracle), "box": (box_layer, box_oracle)}
ALWAYS = ("jacrev", "jacfwd", "hessian", "vmap", "vmap-jacrev", "double-backward")
ONCE = ("value", "backward", "jacfwd-jacfwd", "third", "vmap-vmap", "vmap-hessian", "grad-vmap", "vmap-last")
CELLS = [
    *((problem, adjoint, transform) for problem in PROBLEMS for adjoint in ADJOINTS for transform in ALWAYS),
    *((problem, "auto", transform) for problem in PROBLEMS for transform in ONCE),
]


@functools.cache
def truth(problem, transform):
    return TRANSFORMS[transform][1](PROBLEMS[problem][1]).detach()


@pytest.mark.parametrize(("problem", "adjoint", "transform"), CELLS)
def test_layers_match_newton_on_the_free_coordinates(problem, adjoint, transform):
    layer = functools.partial(PROBLEMS[problem][0], ADJOINTS[adjoint])
    expected = truth(problem, transform)
    assert expected.abs().max() > 1e-3, "the oracle is trivial here and would pass a layer without derivative"
    torch.testing.assert_close(TRANSFORMS[transform][0](layer), expected, rtol=0, atol=TOL)


@pytest.mark.parametrize("theta", [THETA, THETA * ONE, *BATCH], ids=str)
def test_no_coordinate_of_the_table_is_barely_held_or_free(theta):
    point, slope = tuple(theta.tolist()), torch.func.grad(coupled)
    x = solution(lasso_map, point)
    zero = x == 0
    assert (x[~zero].abs() > 0.01).all()
    assert (slope(x, theta)[zero].abs() < strength(theta) - 0.01).all()
    x, (lower, upper) = solution(box_map, point), bounds(theta)
    low, high = x == lower, x == upper
    assert (torch.minimum(x - lower, upper - x)[~(low | high)] > 0.01).all()
    assert (slope(x, theta)[low] > 0.01).all()
    assert (slope(x, theta)[high] < -0.01).all()


@pytest.mark.parametrize("c", [1.0, float(ONE)])
def test_some_coordinates_of_the_table_are_held_and_some_free(c):
    point = tuple((THETA * c).tolist())
    assert (solution(lasso_map, point) == 0).tolist() == [True, False, True]
    x, (lower, upper) = solution(box_map, point), bounds(THETA * c)
    assert (x == lower).tolist() == [True, False, False]
    assert (x == upper).tolist() == [False, True, False]
