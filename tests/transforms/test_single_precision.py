"""The table in float32, against the float64 oracle."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers.cases import BATCH, ONE, THETA, loss
from tests.helpers.problems import coupled, each, newton

F32 = torch.float32
SOLVERS = {
    "gradient": il.GradientDescent(lr=0.2, rtol=1e-6),
    "lbfgs": il.LBFGS(rtol=1e-6),
    "newton-cg": il.Newton(rtol=1e-6),
    "newton-dense": il.Newton(il.Dense(), rtol=1e-6),
}


def oracle(theta):
    return newton(coupled, torch.zeros(3, dtype=theta.dtype), theta)


# Machine epsilon 1.2e-7, times a condition number below 10, times a handful of roundings; each order of derivative
# multiplies by another solve and by numbers up to ten. `rtol` 1e-6 of the forward solve stays below all of these.
QUANTITIES = {
    "value": (lambda f, t, b: f(t), 5e-6),
    "jacrev": (lambda f, t, b: jacrev(f)(t), 1e-5),
    "jacfwd": (lambda f, t, b: jacfwd(f)(t), 1e-5),
    "hessian": (lambda f, t, b: hessian(loss(f))(t), 1e-4),
    "vmap": (lambda f, t, b: vmap(f)(b), 5e-6),
    "grad-vmap": (lambda f, t, b: grad(lambda b: vmap(f)(b).sin().sum())(b), 1e-5),
    "third": (lambda f, t, b: grad(grad(grad(lambda c: f(t * c).sum())))(ONE.to(t.dtype)), 1e-3),
}
EXPECTED = {
    "vmap": lambda f, t, b: each(f, b),
    "grad-vmap": lambda f, t, b: each(grad(loss(f)), b),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("name", QUANTITIES)
def test_single_precision_is_within_its_floor(solver, name):
    quantity, floor = QUANTITIES[name]
    adjoint = il.Implicit(il.CG(rtol=1e-6), on_failure="raise")

    def layer(theta):
        return il.argmin(coupled, torch.zeros(3), theta, solver=solver, adjoint=adjoint).value

    ours = quantity(layer, THETA.to(F32), BATCH.to(F32))
    expected = EXPECTED.get(name, quantity)(oracle, THETA.to(F32).double(), BATCH.to(F32).double())
    assert ours.dtype == F32
    torch.testing.assert_close(ours.double(), expected, rtol=floor, atol=floor)
