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


def test_a_loop_variable_that_has_moved_on_is_named():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    losses = []
    for data in (torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)):
        x = il.argmin(lambda x: (x - theta * data).square().sum(), torch.zeros(2, dtype=torch.float64)).value  # noqa: B023
        losses.append(x.sum())
    with pytest.raises(il.MisuseError, match=r"shape \(2,\) that it did not use before .*Pass it as a param"):
        torch.stack(losses).sum().backward()


def test_data_overwritten_between_solve_and_backward_is_named():
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    buffer = torch.ones(2, dtype=torch.float64)
    x = il.argmin(lambda x: (x - theta * buffer).square().sum(), torch.zeros(2, dtype=torch.float64)).value
    buffer.zero_()
    with pytest.raises(il.MisuseError, match="changed in place after the solve"):
        x.sum().backward()


def test_a_parameter_met_only_on_another_branch_is_named():
    theta, late = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)

    def objective(x):
        return (x - theta).square() if bool(x <= 0.5) else (x - theta).square() + 0.0 * late

    x = il.argmin(objective, torch.zeros(())).value
    with pytest.raises(il.MisuseError, match="another branch"):
        x.backward()


def test_what_a_module_keeps_from_its_first_call_is_no_stranger():
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    cache = {}

    def objective(x):
        if "weights" not in cache:
            cache["weights"] = torch.arange(1, 4, dtype=torch.float64)
        other = torch.full((3,), 2.0, dtype=torch.float64)
        return (cache["weights"] * (x - theta * other).square()).sum()

    x = il.argmin(objective, torch.zeros(3, dtype=torch.float64)).value
    x.sum().backward()
    torch.testing.assert_close(theta.grad, torch.full_like(theta, 2.0))


# --- what a later evaluation sees ---------------------------------------------------------------------------

FIXED = il.GradientDescent(0.1, rtol=None, atol=None, max_steps=50)
SOLVES = {
    "fixed steps": {"solver": FIXED},
    "fixed steps, checkpointed": {"solver": FIXED, "adjoint": il.Unrolled(checkpoint=True)},
    "gauss-newton": {"adjoint": il.Implicit(curvature="gauss_newton")},
    "newton": {"solver": NEWTON},
}


@pytest.mark.parametrize("how", SOLVES)
def test_a_name_that_means_something_else_in_the_backward_is_named(how):
    theta, scope = THETA.clone().requires_grad_(), {"y": torch.ones(3, dtype=F64)}
    # The model keeps what it uses; only the loss sees the change.
    objective = il.Composite(lambda x: x * theta, lambda z: (z - scope["y"]).square().sum())
    x = il.argmin(objective, ZERO, regularizer=il.Ridge(0.1), **SOLVES[how]).value
    scope["y"] = torch.zeros(3, dtype=F64)
    with pytest.raises(il.MisuseError, match="did not use before the solve"):
        x.sum().backward()


@pytest.mark.parametrize("change", ["in place", "another name"])
def test_the_second_backward_is_watched_as_the_first(change):
    theta, scope = THETA.clone().requires_grad_(), {"y": torch.ones(3, dtype=F64)}
    x = solve(lambda x: ((x - theta) * scope["y"]).square().sum() + (x * scope["y"]).pow(4).sum())
    (first,) = torch.autograd.grad(x.sum(), theta, retain_graph=True)
    assert_near(torch.autograd.grad(x.sum(), theta, retain_graph=True)[0], first)
    if change == "in place":
        scope["y"].mul_(3)
    else:
        scope["y"] = torch.full((3,), 3.0, dtype=F64)
    with pytest.raises(il.MisuseError, match=r"[pP]ass it as a param"):
        x.sum().backward()


class Halved(torch.autograd.Function):
    """A custom operation that no torch function shows."""

    @staticmethod
    def forward(x, weight):
        return x * weight / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        x, weight = ctx.saved_tensors
        return v * weight / 2, v * x / 2

    @staticmethod
    def vmap(info, in_dims, x, weight):
        return Halved.apply(x, weight), 0


def test_a_tensor_captured_by_a_custom_function_alone_is_refused():
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    with pytest.raises(il.MisuseError, match="argument of a custom autograd Function"):
        il.argmin(lambda x: (Halved.apply(x, weight) - 1).square().sum(), ZERO)
    # Passed, it is seen.
    x = il.argmin(lambda x, w: (Halved.apply(x, w) - 1).square().sum(), ZERO, weight, solver=NEWTON).value
    assert_near(torch.autograd.grad(x.sum(), weight)[0], torch.full((3,), -2.0, dtype=F64))


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.weight).square().sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("how", ["module", "closure", "with more"])
def test_the_parameters_of_a_scripted_module_are_not_lost(how):
    module = torch.jit.script(Scripted())
    objective = {"module": module, "closure": lambda x: module(x), "with more": lambda x: module(x) + x.square().sum()}
    with pytest.raises(il.MisuseError, match="scripted module"):
        il.argmin(objective[how], ZERO)
    module.weight.requires_grad_(False)
    frozen = il.argmin(objective[how], ZERO)
    torch.testing.assert_close(frozen.value, torch.full((3,), 0.5 if how == "with more" else 1.0, dtype=F64))


def test_a_tape_inside_the_objective_is_refused_and_a_transform_is_not():
    def taped(x):
        return torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0].square().sum()

    with pytest.raises(il.MisuseError, match=r"torch\.func\.grad"):
        il.argmin(taped, ZERO + 1)
    theta = THETA.clone().requires_grad_()
    x = solve(lambda x: (grad(lambda z: z.square().sum())(x) - theta).square().sum())
    assert_near(torch.autograd.grad(x.sum(), theta)[0], torch.full((3,), 0.5, dtype=F64))


def test_a_captured_tensor_handed_to_a_transform_is_refused():
    theta = THETA.clone().requires_grad_()
    with pytest.raises(il.MisuseError, match=r"a torch\.func transform"):
        il.argmin(lambda x: (x - grad(lambda t: t.pow(3).sum())(theta)).square().sum(), ZERO)
    x = solve(lambda x, t: (x - grad(lambda t: t.pow(3).sum())(t)).square().sum(), theta)
    assert_near(torch.autograd.grad(x.sum(), theta)[0], 6 * THETA)


def test_a_branch_not_taken_at_the_start_is_named_with_fixed_steps_too():
    theta, late = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)

    def objective(x):
        return (x - theta).square() + (late * x.square() if bool(x > 0.2) else 0 * x)

    x = il.argmin(objective, torch.zeros(()), solver=FIXED).value
    with pytest.raises(il.MisuseError, match="another branch"):
        x.backward()
