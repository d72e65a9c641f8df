"""Reverse mode, once and twice."""

from tests.helpers.cases import cells, check


@cells("value", "jacrev", "backward", "jacrev-jacrev", "double-backward")
def test_reverse_matches_newton(case, transform):
    check(case, transform)
