"""Under `torch.no_grad` a mapped layer returns what it returns alone, however it would be differentiated."""

import pytest
import torch

import implicitlayers as il

FIXED = {"rtol": None, "atol": None, "max_steps": 5}
ADJOINTS = [il.Implicit(), il.Unrolled(), il.Unrolled(last=2), il.OneStep(), il.Unrolled(checkpoint=True)]
THETA = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]]).double()


def energy(x, t):
    return (x - t).square().sum() + x.pow(4).sum() / 4


def equation(x, t):
    return 2 * x + x.tanh() - t


CALLS = {
    "argmin": (il.argmin, energy, il.GradientDescent(lr=0.1, **FIXED)),
    "argmin by Newton": (il.argmin, energy, il.Newton(il.Dense(), **{**FIXED, "max_steps": 3})),
    "root": (il.root, equation, il.Newton(il.Dense(), **{**FIXED, "max_steps": 3})),
    "fixed point": (il.fixed_point, lambda x, t: (x.cos() + t) / 3, il.FixedPointIteration(**FIXED)),
}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_vmap_under_no_grad(name, adjoint):
    call, fn, solver = CALLS[name]

    def layer(t):
        return call(fn, torch.zeros(2).double(), t, solver=solver, adjoint=adjoint).value

    expected = torch.stack([layer(t) for t in THETA])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(THETA), expected)
        torch.testing.assert_close(torch.vmap(torch.vmap(layer))(THETA[None]), expected[None])
        slopes = torch.vmap(torch.func.jacrev(layer))(THETA)
    torch.testing.assert_close(slopes, torch.stack([torch.func.jacrev(layer)(t) for t in THETA]))
