"""Captured tensors: every way an objective can come by a tensor without being handed it."""

import functools

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import implicitlayers as il
from tests.helpers.cases import ADJOINT, MODULE, TIGHT, Coupled
from tests.helpers.problems import F64, coupled, each, newton, normal

NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)
ZERO = torch.zeros(3, dtype=F64)
THETA = normal(3, seed=1)


def expected_gradient(theta):
    return grad(lambda t: newton(coupled, ZERO, t).sin().sum())(theta)


def solve(objective, *params, x0=ZERO):
    return il.argmin(objective, x0, *params, solver=NEWTON, adjoint=ADJOINT).value


def assert_near(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_module_parameters_get_their_grad():
    module = Coupled(THETA)
    solve(module).sin().sum().backward()
    assert_near(module.theta.grad, expected_gradient(THETA))


def test_module_inside_a_closure_and_twice():
    module = Coupled(THETA)
    first = solve(lambda x: module(x))
    second = solve(lambda x: module(x) + 0.0)
    (first.sin().sum() + second.sin().sum()).backward()
    assert_near(module.theta.grad, 2 * expected_gradient(THETA))


def test_bound_methods_and_partials():
    class Problem:
        def __init__(self, theta):
            self.theta = theta

        def objective(self, x):
            return coupled(x, self.theta)

    theta = THETA.clone().requires_grad_()
    assert_near(torch.autograd.grad(solve(Problem(theta).objective).sin().sum(), theta)[0], expected_gradient(THETA))
    partial = functools.partial(coupled, theta=theta)
    assert_near(torch.autograd.grad(solve(partial).sin().sum(), theta)[0], expected_gradient(THETA))


def test_containers_and_non_leaves():
    theta = THETA.clone().requires_grad_()
    bag = {"scaled": [theta * 3]}
    x = solve(lambda x: coupled(x, torch.stack([bag["scaled"][0][i] / 3 for i in range(3)])))
    assert_near(torch.autograd.grad(x.sin().sum(), theta)[0], expected_gradient(THETA))


def test_tensor_that_is_passed_and_captured_gets_both_parts():
    theta = THETA.clone().requires_grad_()
    x = solve(lambda x, t: coupled(x, t) + (x * theta).sum(), theta)
    (g,) = torch.autograd.grad(x.sin().sum(), theta)
    both = lambda x, t: coupled(x, t) + (x * t).sum()  # noqa: E731
    assert_near(g, grad(lambda t: newton(both, ZERO, t).sin().sum())(THETA))


def test_same_tensor_passed_twice():
    theta = THETA.clone().requires_grad_()
    x = solve(lambda x, a, b: coupled(x, (a + b) / 2), theta, theta)
    assert_near(torch.autograd.grad(x.sin().sum(), theta)[0], expected_gradient(THETA))


def test_keyword_arguments_of_torch_functions():
    theta = THETA.clone().requires_grad_()
    x = solve(lambda x: torch.add(input=x, other=theta, alpha=-2).square().sum() / 2)
    assert_near(torch.autograd.grad(x.sum(), theta)[0], torch.full((3,), 2.0, dtype=F64))


def test_views_of_a_captured_tensor():
    theta = normal(2, 3, seed=4).requires_grad_()
    x = solve(lambda x: (x - theta[0] * theta.T[:, 1]).square().sum())
    expected = torch.stack([theta[1], theta[0]]).detach()
    assert_near(torch.autograd.grad(x.sum(), theta)[0], expected)


def test_network_with_several_parameters_and_a_buffer():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net.register_buffer("target", normal(2, seed=3))

    def objective(x, net):
        return (net(x) - net.target).square().sum() + x.square().sum()

    solve(lambda x: objective(x, net)).sin().sum().backward()
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        # One parameter at a time as the oracle's θ.
        def replaced(x, value, name=name):
            fixed = {k: v.detach() for k, v in parameters.items()} | {name: value}
            call = lambda *args: torch.func.functional_call(net, fixed, args)  # noqa: E731
            return (call(x) - net.target).square().sum() + x.square().sum()

        direction = normal(*parameter.shape, seed=5)
        oracle = lambda c, replaced=replaced: newton(lambda x, p: replaced(x, p), ZERO, c).sin().sum()  # noqa: E731
        slope = torch.func.jvp(oracle, (parameter.detach(),), (direction,))[1]
        assert_near((parameter.grad * direction).sum(), slope)


def test_captured_lanes():
    batch = normal(4, 3, seed=6)
    ours = vmap(lambda theta: solve(lambda x: coupled(x, theta)))(batch)
    assert_near(ours, each(lambda theta: newton(coupled, ZERO, theta), batch))


def test_captured_inside_two_vmaps_at_different_levels():
    rows, columns = normal(2, 3, seed=7), normal(4, 3, seed=8)

    def layer(row):
        return vmap(lambda column: solve(lambda x: coupled(x, row * column)))(columns)

    expected = torch.stack([torch.stack([newton(coupled, ZERO, r * c) for c in columns]) for r in rows])
    assert_near(vmap(layer)(rows), expected)
    gradient = grad(lambda rows: vmap(layer)(rows).sum())(rows)
    assert_near(
        gradient,
        grad(lambda rows: each(lambda r: each(lambda c: newton(coupled, ZERO, r * c), columns), rows).sum())(rows),
    )


def test_vmap_over_functional_parameters():
    batch = normal(4, 3, seed=9)

    def layer(theta):
        return solve(lambda x: torch.func.functional_call(MODULE, {"theta": theta}, (x,)))

    ours = grad(lambda b: vmap(layer)(b).sin().sum())(batch)
    assert_near(ours, each(expected_gradient, batch))
    assert MODULE.theta.grad is None


def test_captured_by_a_composite_in_both_halves():
    theta = THETA.clone().requires_grad_()
    objective = il.Composite(lambda x: x * theta, lambda z: (z - theta.square()).square().sum() / 2)
    for curvature in ("hessian", "gauss_newton"):
        adjoint = il.Implicit(il.CG(rtol=1e-13), curvature=curvature)
        x = il.argmin(objective, ZERO, solver=NEWTON, adjoint=adjoint).value
        # x = θ, whose derivative is the identity.
        assert_near(torch.autograd.grad(x.sum(), theta)[0], torch.ones(3, dtype=F64))


def test_tensors_without_derivative_stay_what_they_are():
    table, index = normal(5, 3, seed=2), torch.tensor([0, 2, 4])
    mask = torch.tensor([True, False, True])
    theta = THETA.clone().requires_grad_()

    def objective(x):
        rows = table[index]
        return (rows @ x - theta).square().sum() / 2 + torch.where(mask, x, 2 * x).square().sum()

    def oracle(x, t):
        return (table[index] @ x - t).square().sum() / 2 + torch.where(mask, x, 2 * x).square().sum()

    x = solve(objective)
    (g,) = torch.autograd.grad(x.sin().sum(), theta)
    assert_near(g, grad(lambda t: newton(oracle, ZERO, t).sin().sum())(THETA))


@pytest.mark.parametrize("form", ["constant", "number"])
def test_parameters_that_are_no_tensors(form):
    theta = THETA.clone().requires_grad_()
    params = ({"t": theta, "power": 2, "name": "square", "none": None},)

    def objective(x, p):
        assert p["name"] == "square"
        assert p["none"] is None
        return ((x - p["t"]) ** p["power"]).sum() / (2 if form == "number" else torch.tensor(2.0, dtype=F64))

    x = solve(objective, *params)
    assert_near(torch.autograd.grad(x.sum(), theta)[0], torch.ones(3, dtype=F64))


def test_attributes_changed_after_the_call_do_not_matter_to_the_backward():
    module = Coupled(THETA)
    x = solve(module)
    with torch.no_grad():
        before = module.theta.clone()
    x.sin().sum().backward()
    assert_near(module.theta.grad, expected_gradient(before))
