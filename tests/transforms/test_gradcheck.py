"""Finite differences, which know neither the library nor the oracle: values in, every derivative out."""

import pytest
import torch

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.cases import ADJOINT, THETA, TIGHT, Case
from tests.helpers.problems import F64, coupled, normal, quadratic, spd

CASES = [
    Case("tensor", "explicit", "newton-cg"),
    Case("mixed", "captured", "newton-dense"),
    Case("0-d", "tree", "lbfgs"),
    Case("size-1", "half-captured", "newton-cg"),
    Case("tensor", "passed-and-captured", "lbfgs"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivatives(case):
    assert_gradients_match(case.layer, THETA, order=2)


def test_all_inputs_of_a_regularized_problem():
    A, b, theta = spd(2), normal(2, seed=3), normal(2, seed=4)
    lam = torch.tensor(0.7, dtype=F64)

    def layer(A, b, theta, lam):
        def objective(x):
            return quadratic(x, (A + A.T) / 2, b) + x.exp().sum() / 4

        x0, proximal = torch.zeros(2, dtype=F64), il.Proximal(theta, lam)
        return il.argmin(objective, x0, regularizer=proximal, solver=il.Newton(**TIGHT), adjoint=ADJOINT).value

    assert_gradients_match(layer, A, b, theta, lam, order=2)


def test_dual_numbers_by_hand():
    theta, direction = THETA, normal(3, seed=5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta, direction)
        x0 = torch.zeros(3, dtype=F64)
        x = il.argmin(lambda x: coupled(x, dual), x0, solver=il.Newton(**TIGHT), adjoint=ADJOINT).value
        tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
    case = Case("tensor", "explicit", "newton-cg")
    expected = torch.func.jacrev(case.oracle)(theta) @ direction
    # As in the table: second-order-accurate solve of a problem of order one.
    torch.testing.assert_close(tangent, expected, rtol=0, atol=1e-9)
