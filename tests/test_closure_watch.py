"""What a later evaluation of a closure sees: names that have moved on, hidden captures, other branches."""

import pytest
import torch
from torch import nn
from torch.func import grad

import implicitlayers as il
from tests.helpers.cases import ADJOINT, TIGHT
from tests.helpers.problems import F64, normal

NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)
ZERO = torch.zeros(3, dtype=F64)
THETA = normal(3, seed=1)


def solve(objective, *params):
    return il.argmin(objective, ZERO, *params, solver=NEWTON, adjoint=ADJOINT).value


def assert_near(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


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
