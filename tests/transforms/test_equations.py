"""The transform table for equations, fixed points, least squares and linear systems, against Newton's method."""

import functools

import pytest
import torch
from torch.func import jacrev

import implicitlayers as il
from tests.helpers.cases import ADJOINT, BATCH, ONE, THETA, TOL, TRANSFORMS
from tests.helpers.problems import F64

ZERO = torch.zeros(3, dtype=F64)
M = torch.tensor([[2.0, 1.0, 0.3], [-0.5, 3.0, 0.2], [0.1, -0.7, 1.5]], dtype=F64)
X = torch.tensor([[1.0, 0.2, -0.3], [0.4, -1.0, 0.5], [0.3, 0.8, 1.0], [-0.6, 0.1, 0.7]], dtype=F64)
TIGHT = {"rtol": 1e-13, "atol": 1e-13}
GENERAL = il.Implicit(on_failure="raise")


def residual(x, theta):
    """Not the gradient of anything: M is not symmetric, and neither is the coupling to the neighbour."""
    return M @ x + 0.3 * torch.tanh(torch.roll(x, 1)) * theta - theta.square()


def mapping(x, theta):
    return 0.15 * M @ x + 0.3 * torch.tanh(M @ x / 3 + theta) + theta.sin() / 2


def residuals(w, theta):
    """Four residuals, nonlinear in three unknowns, that do not vanish at the minimum."""
    return torch.sinh(X @ w / 2) - torch.cat([theta, theta[:1] * theta[1:2]])


def gradient(w, theta):
    return jacrev(lambda w: residuals(w, theta).square().sum() / 2)(w) + 0.1 * w


def matrix(theta):
    return M + torch.diag(theta.square()) + torch.outer(theta, theta.sin()) / 4


def system(x, theta):
    return matrix(theta) @ x - theta.cos()


def newton(F, theta):
    x = ZERO
    for _ in range(20):
        x = x - torch.linalg.inv(jacrev(F)(x, theta)) @ F(x, theta)
    return x


def root_layer(solver, adjoint):
    return lambda theta: il.root(residual, ZERO, theta, solver=solver, adjoint=adjoint).value


def fixed_layer(solver, adjoint):
    return lambda theta: il.fixed_point(mapping, ZERO, theta, solver=solver, adjoint=adjoint).value


def fit_layer(solver, adjoint):
    ridge = il.Ridge(0.1)
    return lambda theta: (
        il.least_squares(residuals, ZERO, theta, regularizer=ridge, solver=solver, adjoint=adjoint).value
    )


def linear_layer(solver):
    return lambda theta: il.linear_solve(lambda x: matrix(theta) @ x, theta.cos(), solver=solver).value


# name: (layer, the equation that its value fulfils)
LAYERS = {
    "root-newton": (root_layer(il.Newton(il.Dense(), **TIGHT), GENERAL), residual),
    "root-gmres": (root_layer(il.Newton(**TIGHT), il.Implicit(il.GMRES(rtol=1e-13), on_failure="raise")), residual),
    "fixed-picard": (fixed_layer(il.FixedPointIteration(**TIGHT), GENERAL), lambda x, t: x - mapping(x, t)),
    "fixed-anderson": (
        fixed_layer(il.Anderson(**TIGHT), il.Implicit(il.BiCGStab(rtol=1e-13), on_failure="raise")),
        lambda x, t: x - mapping(x, t),
    ),
    "least-squares": (fit_layer(il.LevenbergMarquardt(**TIGHT), ADJOINT), gradient),
    "linear-dense": (linear_layer(il.Dense()), system),
    "linear-gmres": (linear_layer(il.GMRES(rtol=1e-13)), system),
}


@functools.cache
def truth(F, transform):
    return TRANSFORMS[transform][1](lambda theta: newton(F, theta)).detach()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_match_newton(name, transform):
    layer, F = LAYERS[name]
    expected = truth(F, transform)
    assert expected.abs().max() > 1e-3, "the oracle is trivial here and would pass a layer without derivative"
    torch.testing.assert_close(TRANSFORMS[transform][0](layer), expected, rtol=0, atol=TOL)


@pytest.mark.parametrize("theta", [THETA, *BATCH, THETA * ONE], ids=str)
def test_the_jacobians_are_not_symmetric(theta):
    for F in (residual, lambda x, t: x - mapping(x, t), system):
        A = jacrev(F)(newton(F, theta), theta)
        assert (A - A.T).abs().max() > 0.05 * A.abs().max()
