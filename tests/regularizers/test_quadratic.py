"""Proximal and Ridge: every kind of strength, every order of derivative, and the meta-gradient of linear iMAML."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils import _pytree as pytree

import implicitlayers as il
from tests.helpers.cases import ADJOINT, SOLVERS, TIGHT, flat
from tests.helpers.problems import F64, normal, proximal_inverse, proximal_solution, quadratic, spd

TOL = 1e-9
N = 4
A, B, THETA = spd(N), normal(N, seed=1), normal(N, seed=2)
NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)


def assert_near(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOL)


def tree(vector):
    """The unknown as a tree of a matrix and a scalar in a list, in the order of its leaves."""
    return {"a": vector[:3].reshape(1, 3), "b": [vector[3]]}


def solve(regularizer, solver=NEWTON, A=A, b=B):
    start = tree(torch.zeros(N, dtype=F64))

    def objective(x, A, b):
        return quadratic(flat(x), A, b)

    return flat(il.argmin(objective, start, A, b, regularizer=regularizer, solver=solver, adjoint=ADJOINT).value)


# How a strength may be given, and the elementwise strength that it means. Each is a function of a vector of numbers.
STRENGTHS = {
    "scalar": (lambda s: s[0], lambda s: s[0].expand(N)),
    "per-leaf": (lambda s: {"a": s[0], "b": [s[1]]}, lambda s: torch.cat([s[0].expand(3), s[1:2]])),
    "elementwise": (lambda s: {"a": s[:3].reshape(1, 3), "b": [s[3]]}, lambda s: s),
    "broadcast": (lambda s: {"a": s[:3], "b": [s[3]]}, lambda s: s),
    "mixed": (lambda s: {"a": s[0], "b": [0.5]}, lambda s: torch.cat([s[0].expand(3), torch.full((1,), 0.5).to(s)])),
}
VALUES = torch.tensor([0.7, 1.3, 0.4, 0.9], dtype=F64)


def proximal(make):
    return lambda s, theta: solve(il.Proximal(tree(theta), make(s)))


def proximal_oracle(wide):
    return lambda s, theta: proximal_solution(A, B, wide(s), theta)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_proximal_first_derivatives(kind):
    make, wide = STRENGTHS[kind]
    layer, oracle = proximal(make), proximal_oracle(wide)
    assert_near(layer(VALUES, THETA), oracle(VALUES, THETA))
    for mode in (jacrev, jacfwd):
        for argnum in (0, 1):
            assert_near(mode(layer, argnums=argnum)(VALUES, THETA), jacrev(oracle, argnums=argnum)(VALUES, THETA))


@pytest.mark.parametrize("kind", STRENGTHS)
def test_proximal_second_derivatives(kind):
    make, wide = STRENGTHS[kind]

    def total(f):
        return lambda s, theta: f(s, theta).sin().sum()

    ours = hessian(total(proximal(make)), argnums=(0, 1))(VALUES, THETA)
    expected = jacrev(jacrev(total(proximal_oracle(wide)), argnums=(0, 1)), argnums=(0, 1))(VALUES, THETA)
    for mine, truth in zip(pytree.tree_leaves(ours), pytree.tree_leaves(expected), strict=True):
        assert_near(mine, truth)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_ridge_is_proximal_to_the_origin(kind):
    make, wide = STRENGTHS[kind]
    layer = lambda s: solve(il.Ridge(make(s)))  # noqa: E731
    oracle = lambda s: proximal_solution(A, B, wide(s), torch.zeros(N, dtype=F64))  # noqa: E731
    assert_near(layer(VALUES), oracle(VALUES))
    assert_near(jacrev(layer)(VALUES), jacrev(oracle)(VALUES))
    assert_near(jacfwd(layer)(VALUES), jacrev(oracle)(VALUES))
    assert_near(jacfwd(jacrev(layer))(VALUES), jacrev(jacrev(oracle))(VALUES))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_linear_imaml(solver):
    """dx/dθ = λM, dx/dλ = M(θ - x), d²x/dλ² = -2M²(θ - x)."""
    lam = torch.tensor(0.8, dtype=F64)
    M = proximal_inverse(A, lam)

    def layer(lam, theta):
        return solve(il.Proximal(tree(theta), lam), solver)

    x = layer(lam, THETA)
    assert_near(x, M @ (B + lam * THETA))
    assert_near(jacrev(layer, argnums=1)(lam, THETA), lam * M)
    assert_near(jacrev(layer)(lam, THETA), M @ (THETA - x))
    assert_near(jacfwd(layer)(lam, THETA), M @ (THETA - x))
    assert_near(jacrev(jacrev(layer))(lam, THETA), -2 * M @ M @ (THETA - x))
    assert_near(jacfwd(jacfwd(layer))(lam, THETA), -2 * M @ M @ (THETA - x))


def test_backward_reaches_strength_and_anchor_as_leaves():
    lam = torch.tensor(0.8, dtype=F64, requires_grad=True)
    theta = THETA.clone().requires_grad_()
    v = normal(N, seed=6)
    solve(il.Proximal(tree(theta), lam)).backward(v)
    M = proximal_inverse(A, lam.detach())
    x = proximal_solution(A, B, lam.detach(), THETA)
    assert_near(theta.grad, lam.detach() * M @ v)
    assert_near(lam.grad, v @ M @ (THETA - x))


def test_sums():
    one, two = VALUES[0], VALUES[1]

    def layer(one, two, theta):
        return solve(il.Proximal(tree(theta), one) + il.Ridge(two) + il.Ridge(0.25))

    def oracle(one, two, theta):
        return torch.linalg.solve(A + (one + two + 0.25) * torch.eye(N, dtype=F64), B + one * theta)

    assert_near(layer(one, two, THETA), oracle(one, two, THETA))
    for argnum in (0, 1, 2):
        expected = jacrev(oracle, argnums=argnum)(one, two, THETA)
        assert_near(jacrev(layer, argnums=argnum)(one, two, THETA), expected)
        assert_near(jacfwd(layer, argnums=argnum)(one, two, THETA), expected)


def test_a_tensor_shared_by_objective_and_regularizer_gets_both_parts():
    def layer(s):
        return solve(il.Proximal(tree(s * THETA), s), b=s * B)

    def oracle(s):
        return proximal_solution(A, s * B, s, s * THETA)

    s = VALUES[0]
    assert_near(jacrev(layer)(s), jacrev(oracle)(s))
    assert_near(jacfwd(jacrev(layer))(s), jacrev(jacrev(oracle))(s))


def test_lanes_with_their_own_anchor_or_strength_or_neither():
    batch, strengths = normal(5, N, seed=7), torch.linspace(0.3, 2, 5, dtype=F64)

    def layer(lam, theta):
        return solve(il.Proximal(tree(theta), lam))

    def oracle(lam, theta):
        return proximal_solution(A, B, lam, theta)

    for dims in ((0, 0), (0, None), (None, 0)):
        lam = strengths if dims[0] == 0 else VALUES[0]
        theta = batch if dims[1] == 0 else THETA
        assert_near(vmap(layer, in_dims=dims)(lam, theta), vmap(oracle, in_dims=dims)(lam, theta))
        for argnum in (0, 1):
            ours = vmap(jacrev(layer, argnums=argnum), in_dims=dims)(lam, theta)
            assert_near(ours, vmap(jacrev(oracle, argnums=argnum), in_dims=dims)(lam, theta))


def test_strength_of_a_wide_leaf_is_counted_once_per_element():
    # ½λ‖x‖² over nine elements: a strength per leaf must not be divided or multiplied by their number.
    x0, b = torch.zeros(3, 3, dtype=F64), normal(3, 3, seed=8)
    lam = torch.tensor(0.5, dtype=F64)

    def layer(lam):
        solution = il.argmin(lambda x: x.square().sum() / 2 - (b * x).sum(), x0, regularizer=il.Ridge(lam))
        return solution.value, solution.stats.objective

    value, objective = layer(lam)
    assert_near(value, b / 1.5)
    assert_near(objective, value.square().sum() * 0.75 - (b * value).sum())
    assert_near(grad(lambda lam: layer(lam)[0].sum())(lam), -b.sum() / 1.5**2)


def test_derivative_in_the_anchor_does_not_run_the_objective():
    calls = []

    def objective(x):
        calls.append(1)
        return quadratic(x, A, B)

    theta = THETA.clone().requires_grad_()
    adjoint = il.Implicit(il.CG(rtol=None, atol=None, max_steps=2))
    x = il.argmin(objective, torch.zeros(N, dtype=F64), regularizer=il.Proximal(theta, 0.5), adjoint=adjoint).value
    calls.clear()
    x.sum().backward()
    # Once to linearize for all products of the linear solve, and not again to pull the solution back to the anchor.
    assert len(calls) == 1
