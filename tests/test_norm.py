"""The norm that every residual, step and tolerance is measured by: from the smallest number to the largest."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp

from implicitlayers.loop import norm
from implicitlayers.testing import assert_gradients_match

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["one", "smallest", "smallest normal", "largest"])
def test_it_neither_overflows_nor_underflows(dtype, name):
    limits = torch.finfo(dtype)
    size = {"one": 1.0, "smallest": limits.tiny * limits.eps, "smallest normal": limits.tiny, "largest": limits.max / 8}
    x = torch.tensor([3.0, -4.0, 0.0], dtype=dtype) * size[name]
    assert float(norm(x)) == pytest.approx(5 * size[name], rel=4 * limits.eps)
    torch.testing.assert_close(grad(norm)(x), torch.tensor([0.6, -0.8, 0.0], dtype=dtype))
    torch.testing.assert_close(jvp(norm, (x,), (torch.ones_like(x),))[1], torch.tensor(-0.2, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_of_zero_it_is_zero_with_its_derivative_and_what_is_not_finite_shows(dtype):
    zero = torch.zeros(2, dtype=dtype)
    assert (float(norm(zero)), grad(norm)(zero).tolist()) == (0.0, [0.0, 0.0])
    lanes = torch.tensor([[math.inf, 1.0], [math.nan, 1.0], [3.0, 4.0]], dtype=dtype)
    assert norm(lanes)[0] == math.inf
    assert norm(lanes)[1].isnan()
    assert norm(lanes)[2] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("second", [hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))])
def test_second_derivatives_of_zero_are_zero(dtype, second):
    assert not second(norm)(torch.zeros(2, dtype=dtype)).any()
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    (first,) = torch.autograd.grad(norm(x), x, create_graph=True)
    assert not torch.autograd.grad(first.sum(), x)[0].any()


def test_derivatives():
    assert_gradients_match(norm, torch.tensor([[3.0, 4.0], [-1.0, 2.0]]).double(), order=2)
