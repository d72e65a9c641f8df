"""What is known of an operator: its transpose, its definiteness, and claims that contradict each other."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.problems import normal, product, spd


def test_transpose_swaps_the_products():
    A = normal(3, 3)
    operator = il.Operator(product(A), symmetric=False, apply_transpose=product(A.T))
    y = normal(3, seed=1)
    assert torch.equal(operator.T(y), product(A.T)(y))
    assert torch.equal(operator.T.T(y), product(A)(y))
    torch.testing.assert_close(operator.T.dense(y), A.T)


def test_a_symmetric_operator_is_its_own_transpose():
    operator = il.Operator(product(spd(3)), symmetric=True, positive_definite=True)
    assert operator.T is operator


def test_a_missing_transpose_says_what_to_pass():
    with pytest.raises(il.MisuseError, match=r"Operator\(apply, symmetric=False, apply_transpose=\.\.\.\)"):
        _ = il.Operator(product(normal(3, 3)), symmetric=False).T


@pytest.mark.parametrize(
    "claims",
    [
        {"symmetric": False, "positive_definite": True},
        {"symmetric": False, "indefinite": True},
        {"symmetric": True, "positive_definite": True, "indefinite": True},
    ],
)
def test_contradictory_claims_are_refused(claims):
    with pytest.raises(il.MisuseError, match="pass"):
        il.Operator(product(spd(2)), **claims)


def test_solvers_say_what_they_require():
    assert il.CG.requires_symmetric
    assert not il.CG.requires_transpose
    assert not il.Dense.requires_symmetric
