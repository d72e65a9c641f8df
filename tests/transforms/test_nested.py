"""An argmin inside the objective of another: bilevel problems."""

import functools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.cases import ADJOINT, TIGHT
from tests.helpers.problems import F64, coupled, each, newton, normal

SOLVER = il.Newton(il.CG(rtol=1e-11), **TIGHT)
THETA, BATCH = normal(2, seed=3), normal(3, 2, seed=4)


def inner(y):
    """The lower level: its parameter is the upper level's unknown."""
    theta = torch.cat([y, y[:1]])
    return il.argmin(coupled, torch.zeros(2, dtype=F64), theta, solver=SOLVER, adjoint=ADJOINT).value


def inner_captured(y):
    theta = torch.cat([y, y[:1]])
    start = torch.zeros(2, dtype=F64)
    return il.argmin(lambda x: coupled(x, theta), start, solver=SOLVER, adjoint=ADJOINT).value


def inner_oracle(y):
    return newton(coupled, torch.zeros(2, dtype=F64), torch.cat([y, y[:1]]), steps=6, recorded=2)


def upper(lower):
    return lambda y, theta: (lower(y) - theta).square().sum() + y.square().sum() / 2


def layer(theta, lower=inner):
    start = torch.ones(2, dtype=F64)
    return il.argmin(upper(lower), start, theta, solver=SOLVER, adjoint=ADJOINT).value


def oracle(theta):
    return newton(upper(inner_oracle), torch.ones(2, dtype=F64), theta, steps=5, recorded=1)


@functools.cache
def expected():
    """The solution and its Jacobian, in one sweep."""
    jacobian, value = jacfwd(lambda t: (oracle(t),) * 2, has_aux=True)(THETA)
    return value, jacobian


@pytest.mark.parametrize("lower", [inner, inner_captured], ids=["explicit", "captured"])
def test_value_and_jacobians_match_newton(lower):
    def f(theta):
        return layer(theta, lower)

    value, jacobian = expected()
    torch.testing.assert_close(f(THETA), value, rtol=0, atol=1e-9)
    torch.testing.assert_close(jacrev(f)(THETA), jacobian, rtol=0, atol=1e-9)
    torch.testing.assert_close(jacfwd(f)(THETA), jacobian, rtol=0, atol=1e-9)


def test_vmap_and_its_gradient_match_the_loop():
    torch.testing.assert_close(vmap(layer)(BATCH), each(layer, BATCH), rtol=0, atol=1e-9)
    ours = grad(lambda b: vmap(layer)(b).sin().sum())(BATCH)
    torch.testing.assert_close(ours, each(grad(lambda t: layer(t).sin().sum()), BATCH), rtol=0, atol=1e-9)


def test_finite_differences():
    assert_gradients_match(layer, THETA, modes=("reverse", "forward"))


def test_hessian_of_the_quadratic_bilevel_problem():
    # x(y) = argmin ½‖x - y²‖² = y², so the upper level minimizes ½‖y² - t‖²: y = √t, whose derivatives are known.
    def lower(y):
        start = torch.zeros(2, dtype=F64)
        return il.argmin(lambda x: (x - y * y).square().sum() / 2, start, solver=SOLVER, adjoint=ADJOINT).value

    def root(t):
        start = torch.ones(2, dtype=F64)
        objective = lambda y, t: (lower(y) - t).square().sum() / 2  # noqa: E731
        return il.argmin(objective, start, t, solver=SOLVER, adjoint=ADJOINT).value

    t = torch.tensor([1.7, 2.3], dtype=F64)
    torch.testing.assert_close(root(t), t.sqrt(), rtol=0, atol=1e-9)
    ours = hessian(lambda t: root(t).sum())(t)
    torch.testing.assert_close(ours, torch.diag(-(t**-1.5) / 4), rtol=0, atol=1e-9)
