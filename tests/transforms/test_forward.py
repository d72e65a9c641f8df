"""Forward mode, and its mixtures with reverse mode."""

from tests.helpers.cases import cells, check


@cells("jacfwd", "jacfwd-jacfwd")
def test_forward_matches_newton(case, transform):
    check(case, transform)


@cells("hessian", "jacrev-jacfwd", "jacfwd-jacrev")
def test_mixtures_match_newton(case, transform):
    check(case, transform)


@cells("third", "third-forward", "third-mixed")
def test_third_derivatives_match_newton(case, transform):
    check(case, transform)
