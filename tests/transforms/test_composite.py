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


def strength(theta):
    return 0.3 + theta.square().sum() / 20


def bounds(theta):
    return -0.1 - theta[0].square() / 20, 0.15 + theta.abs() / 10


def lasso_map(y, step, theta):
    lam = step * strength(theta)
    return torch.where(y.abs() < lam, torch.zeros_like(y), y - lam * y.sign())


def box_map(y, step, theta):
    lower, upper = bounds(theta)
    return torch.minimum(torch.maximum(y, lower), upper)


@functools.cache
def solution(map_of, theta):
    """To a few digits, which tell the active set."""
    return iterated(coupled, torch.tensor(theta, dtype=F64), map_of)


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
def test_active_sets_are_mixed_and_apart_from_kinks(theta):
    """What the table rests on: some coordinates are held, some free, and none of them barely."""
    slope = torch.func.grad(coupled)
    x = solution(lasso_map, tuple(theta.tolist()))
    zero = x == 0
    assert zero.any()
    assert (x[~zero].abs() > 0.01).all()
    assert (slope(x, theta)[zero].abs() < strength(theta) - 0.01).all()
    x, (lower, upper) = solution(box_map, tuple(theta.tolist())), bounds(theta)
    low, high = x == lower, x == upper
    assert (low | high).any()
    assert (torch.minimum(x - lower, upper - x)[~(low | high)] > 0.005).all()
    assert (slope(x, theta)[low] > 0.01).all()
    assert (slope(x, theta)[high] < -0.01).all()
