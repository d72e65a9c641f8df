"""vmap alone, nested, around derivatives and inside them."""

from tests.helpers.cases import cells, check


@cells("vmap", "vmap-last", "vmap-vmap")
def test_lanes_match_newton(case, transform):
    check(case, transform)


@cells("vmap-jacrev", "vmap-jacfwd", "vmap-hessian")
def test_derivatives_of_lanes_match_newton(case, transform):
    check(case, transform)


@cells("grad-vmap", "hessian-vmap", "backward-through-vmap", "double-backward-through-vmap")
def test_derivatives_through_lanes_match_newton(case, transform):
    check(case, transform)
