"""Reverse mode, once and twice."""

from tests.helpers.cases import cells, check


@cells("value", "jacrev", "backward", "jacrev-jacrev", "double-backward")
def test_reverse_matches_newton(case, transform):
    check(case, transform)


@cells("batched-cotangents", "batched-cotangents-hessian")
def test_batched_cotangents_of_autograd_match_newton(case, transform):
    check(case, transform)
