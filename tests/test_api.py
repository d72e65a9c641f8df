"""What `argmin` promises: batches that mean what a loop means, auxiliary output, policies, freedom of the start."""

import warnings

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils import _pytree as pytree

import implicitlayers as il
from tests.helpers.cases import ADJOINT, BATCH, SOLVERS, THETA, TIGHT
from tests.helpers.problems import F64, coupled, newton, normal, quadratic, spd

ZERO = torch.zeros(3, dtype=F64)
NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)
# Lanes of very different length: a hundredfold range of the parameter.
SPREAD = BATCH * torch.tensor([0.03, 1.0, 3.0, 0.3], dtype=F64)[:, None]


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def parts(solution):
    return solution.value, solution.status, solution.stats


def elementwise(x, theta):
    """Like `coupled`, of elementwise operations only, so that no lane's rounding depends on the number of lanes."""
    return (x.exp() - theta * x + x.square() * theta.square()).sum() + (x.sum() - theta.sum()).square() / 4


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_a_batch_is_the_loop_in_values_steps_and_statuses(solver):
    layer = lambda theta: parts(il.argmin(elementwise, ZERO, theta, solver=solver, adjoint=ADJOINT))  # noqa: E731
    value, status, stats = vmap(layer)(SPREAD)
    loop = [layer(theta) for theta in SPREAD]
    assert stats.steps.tolist() == [stats.steps.item() for _, _, stats in loop]
    assert status.tolist() == [status.item() for _, status, _ in loop]
    assert len(set(stats.steps.tolist())) > 1
    # Rounding may differ where a kernel sums many lanes in another order than one.
    assert_near(value, torch.stack([value for value, _, _ in loop]), 1e-14)
    assert_near(stats.objective, torch.stack([stats.objective for _, _, stats in loop]), 1e-14)


@pytest.mark.parametrize("policy", ["ignore", "nan"])
def test_a_batch_is_the_loop_where_the_steps_run_out(policy):
    def layer(theta, limit):
        solver = il.GradientDescent(lr=0.1, max_steps=limit, rtol=1e-6)
        return parts(il.argmin(coupled, ZERO, theta, solver=solver, on_failure=policy))

    needed = [layer(theta, 10_000)[2].steps.item() for theta in SPREAD]
    limit = sorted(needed)[1]
    value, status, stats = vmap(lambda theta: layer(theta, limit))(SPREAD)
    done = torch.tensor(needed) <= limit
    assert 2 <= done.sum() < 4
    assert torch.equal(status == il.Status.CONVERGED, done)
    assert torch.equal(status == il.Status.MAX_STEPS, ~done)
    assert stats.steps.tolist() == [min(limit, steps) for steps in needed]
    expected = torch.stack([layer(theta, limit)[0] for theta in SPREAD])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_permuted_lanes_give_permuted_answers(solver):
    order = torch.tensor([2, 0, 3, 1])
    layer = vmap(lambda t: parts(il.argmin(elementwise, ZERO, t, solver=solver, adjoint=ADJOINT)))
    straight, permuted = pytree.tree_leaves(layer(SPREAD)), pytree.tree_leaves(layer(SPREAD[order]))
    for one, other in zip(straight, permuted, strict=True):
        assert torch.equal(one[order], other)
    gradient = grad(lambda b: layer(b)[0].sin().sum())
    assert_near(gradient(SPREAD)[order], gradient(SPREAD[order]), 1e-12)


def test_lanes_in_every_position():
    def layer(x0, theta):
        return il.argmin(coupled, x0, theta, solver=NEWTON, adjoint=ADJOINT).value

    expected = torch.stack([newton(coupled, ZERO, theta) for theta in BATCH])
    starts = normal(4, 3, seed=8)
    assert_near(vmap(layer)(starts, BATCH), expected)
    assert_near(vmap(layer, in_dims=(None, 0))(ZERO, BATCH), expected)
    assert_near(vmap(layer, in_dims=(0, None))(starts, BATCH[0]), expected[:1].expand(4, 3))
    assert_near(vmap(layer, in_dims=(1, 1))(starts.T, BATCH.T), expected)
    outer = vmap(vmap(layer, in_dims=(None, 0)), in_dims=(0, None))
    assert_near(outer(starts, BATCH), expected.expand(4, 4, 3))
    crossed = vmap(vmap(layer, in_dims=(0, None)), in_dims=(None, 0))
    assert_near(crossed(starts, BATCH), expected[:, None].expand(4, 4, 3))


def test_lanes_of_one_parameter_and_not_of_another():
    A, bs = torch.stack([spd(3, seed) for seed in range(2)]), normal(4, 3, seed=9)

    def layer(A, b):
        return il.argmin(quadratic, ZERO, A, b, solver=NEWTON, adjoint=ADJOINT).value

    table = vmap(vmap(layer, in_dims=(None, 0)), in_dims=(0, None))
    assert_near(table(A, bs), torch.linalg.solve(A[:, None], bs[None].unsqueeze(-1)).squeeze(-1))
    jacobians = vmap(vmap(jacrev(layer, argnums=1), in_dims=(None, 0)), in_dims=(0, None))(A, bs)
    assert_near(jacobians, torch.linalg.inv(A)[:, None].expand(2, 4, 3, 3))
    # A total over lanes: gradients of what the lanes share are summed.
    total = grad(lambda A, b: table(A, b).sum(), argnums=(0, 1))(A, bs)
    assert_near(total[1], torch.linalg.inv(A).sum(1).sum(0).expand(4, 3))


def test_a_solution_can_be_returned_from_vmap():
    solution = vmap(lambda theta: il.argmin(coupled, ZERO, theta, solver=NEWTON))(BATCH)
    assert isinstance(solution, il.Solution)
    assert solution.status.shape == solution.stats.steps.shape == (4,)
    assert solution.aux is None


def test_a_solution_with_aux_can_be_returned_from_vmap():
    layer = lambda t: il.argmin(lambda x, t: (coupled(x, t), x * t), ZERO, t, solver=NEWTON, has_aux=True)  # noqa: E731
    solution = vmap(layer)(BATCH)
    assert isinstance(solution, il.Solution)
    assert_near(solution.aux, solution.value * BATCH, 1e-15)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_answer_and_derivative_do_not_depend_on_the_start(solver):
    def layer(theta, x0):
        return il.argmin(coupled, x0, theta, solver=solver, adjoint=ADJOINT).value

    for seed in range(3):
        start = normal(3, seed=seed)
        assert_near(layer(THETA, start), newton(coupled, ZERO, THETA))
        assert_near(jacrev(layer)(THETA, start), jacrev(lambda t: newton(coupled, ZERO, t))(THETA))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_starting_at_the_solution_is_converged_and_differentiable(solver):
    x = newton(coupled, ZERO, THETA)
    theta = THETA.clone().requires_grad_()
    solution = il.argmin(coupled, x, theta, solver=solver, adjoint=ADJOINT)
    assert solution.status.item() == il.Status.CONVERGED
    (g,) = torch.autograd.grad(solution.value.sum(), theta)
    assert_near(g, grad(lambda t: newton(coupled, ZERO, t).sum())(THETA))


def test_the_start_is_not_written_to():
    start, theta = normal(3, seed=1), THETA.clone()
    for solver in SOLVERS.values():
        il.argmin(coupled, start, theta, solver=solver)
    assert torch.equal(start, normal(3, seed=1))
    assert torch.equal(theta, THETA)


# --- aux -------------------------------------------------------------------------------------------------------------


def test_aux_is_evaluated_at_the_solution_and_differentiable():
    def objective(x, theta):
        return coupled(x, theta), {"prediction": x * theta, "note": "not a tensor", "theta": theta}

    def aux(theta):
        return il.argmin(objective, ZERO, theta, solver=NEWTON, adjoint=ADJOINT, has_aux=True).aux

    x = newton(coupled, ZERO, THETA)
    assert_near(aux(THETA)["prediction"], x * THETA)
    assert aux(THETA)["note"] == "not a tensor"
    # The total derivative: through the solution, and through the parameter that aux uses itself.
    expected = jacrev(lambda t: newton(coupled, ZERO, t) * t)(THETA)
    assert_near(jacrev(lambda t: aux(t)["prediction"])(THETA), expected)
    leaf = THETA.clone().requires_grad_()
    aux(leaf)["prediction"].sum().backward()
    assert_near(leaf.grad, expected.sum(0))


def test_aux_of_a_composite():
    objective = il.Composite(lambda x, t: x - t, lambda z, t: (z.square().sum() / 2, z * 2))
    adjoint = il.Implicit(curvature="gauss_newton")
    solution = il.argmin(objective, ZERO, THETA, solver=NEWTON, adjoint=adjoint, has_aux=True)
    assert_near(solution.value, THETA)
    assert_near(solution.aux, torch.zeros_like(THETA))


def test_no_aux_is_none():
    assert il.argmin(coupled, ZERO, THETA).aux is None


# --- policies and stats ---------------------------------------------------------------------------------------------

SHORT = il.GradientDescent(lr=0.1, max_steps=2)


def test_policies_of_the_forward_solve():
    with pytest.raises(il.SolveError, match="MAX_STEPS after 2 steps") as error:
        il.argmin(coupled, ZERO, THETA, solver=SHORT)
    assert il.Status.MAX_STEPS.remedy in str(error.value)
    with pytest.warns(il.SolveWarning, match="MAX_STEPS after 2 steps"):
        warned = il.argmin(coupled, ZERO, THETA, solver=SHORT, on_failure="warn")
    ignored = il.argmin(coupled, ZERO, THETA, solver=SHORT, on_failure="ignore")
    assert torch.equal(warned.value, ignored.value)
    assert ignored.status.item() == il.Status.MAX_STEPS
    marked = il.argmin(coupled, ZERO, THETA, solver=SHORT, on_failure="nan")
    assert marked.value.isnan().all()
    assert marked.status.item() == il.Status.MAX_STEPS


def test_a_warning_points_at_the_line_that_called_argmin():
    with pytest.warns(il.SolveWarning) as caught:
        il.argmin(coupled, ZERO, THETA, solver=SHORT, on_failure="warn")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("policy", ["raise", "warn", "ignore", "nan"])
def test_success_is_silent_under_every_policy(policy):
    theta = THETA.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjoint = il.Implicit(on_failure=policy)
        solution = il.argmin(coupled, ZERO, theta, adjoint=adjoint, on_failure=policy)
        solution.value.sum().backward()
    assert theta.grad.isfinite().all()


@pytest.mark.parametrize("policy", ["raise", "warn", "ignore", "nan"])
def test_policies_of_the_adjoint(policy):
    theta = THETA.clone().requires_grad_()
    adjoint = il.Implicit(il.CG(max_steps=1, rtol=1e-12), on_failure=policy)
    solution = il.argmin(coupled, ZERO, theta, adjoint=adjoint)
    take = lambda: torch.autograd.grad(solution.value.sum(), theta, retain_graph=True)[0]  # noqa: E731
    if policy == "raise":
        with pytest.raises(il.AdjointError, match="MAX_STEPS after 1 steps"):
            take()
    elif policy == "warn":
        with pytest.warns(il.AdjointWarning, match="MAX_STEPS after 1 steps"):
            assert take().isfinite().all()
    elif policy == "ignore":
        assert take().abs().max() > 0
    else:
        assert take().isnan().all()
    assert solution.adjoint.status.item() == il.Status.MAX_STEPS


@pytest.mark.parametrize("policy", ["raise", "warn", "nan"])
def test_policies_reach_forward_mode(policy):
    adjoint = il.Implicit(il.CG(max_steps=1, rtol=1e-12), on_failure=policy)
    tangent = lambda: torch.func.jvp(  # noqa: E731
        lambda t: il.argmin(coupled, ZERO, t, adjoint=adjoint).value, (THETA,), (torch.ones_like(THETA),)
    )[1]
    if policy == "raise":
        with pytest.raises(il.AdjointError, match="MAX_STEPS"):
            tangent()
    elif policy == "warn":
        with pytest.warns(il.AdjointWarning, match="MAX_STEPS"):
            tangent()
    else:
        assert tangent().isnan().all()


def test_stats_are_those_of_the_solution():
    solution = il.argmin(coupled, ZERO, THETA, regularizer=il.Ridge(0.3), solver=il.LBFGS(rtol=1e-5))
    x = solution.value
    total = lambda x: coupled(x, THETA) + 0.15 * x.square().sum()  # noqa: E731
    assert_near(solution.stats.objective, total(x), 1e-14)
    assert_near(solution.stats.residual, grad(total)(x).norm(), 1e-14)
    assert 1e-12 < solution.stats.residual < 1e-4
    assert solution.stats.steps.dtype == torch.int64


def test_defaults_solve_and_differentiate():
    b = normal(3, seed=2).requires_grad_()
    A = spd(3)
    solution = il.argmin(quadratic, ZERO, A, b)
    # The default tolerance is 1e-8.
    assert_near(solution.value, torch.linalg.solve(A, b), 1e-7)
    assert_near(torch.autograd.grad(solution.value.sum(), b)[0], torch.linalg.inv(A).sum(0), 1e-7)


def test_nothing_is_recorded_where_no_derivative_is_asked_for():
    assert not il.argmin(coupled, ZERO, THETA).value.requires_grad
    theta = THETA.clone().requires_grad_()
    with torch.no_grad():
        assert not il.argmin(coupled, ZERO, theta).value.requires_grad
        assert_near(il.argmin(coupled, ZERO, theta).value, newton(coupled, ZERO, THETA), 1e-7)


def test_inference_mode_solves_too():
    with torch.inference_mode():
        value = il.argmin(coupled, ZERO, THETA).value
    assert_near(value, newton(coupled, ZERO, THETA), 1e-7)


def test_complex_params_in_both_modes():
    c = torch.tensor([1 + 2j, 0.5 - 1j, 2 + 0.3j], dtype=torch.complex128)
    direction = torch.tensor([0.3 - 0.2j, 1j, 1.0], dtype=torch.complex128)

    def layer(c):
        objective = lambda x, c: (x - c.real).square().sum() + (x * c).abs().square().sum()  # noqa: E731
        return il.argmin(objective, ZERO, c, solver=il.Newton(rtol=1e-12)).value

    # x = Re c / (1 + |c|²), elementwise.
    expected = torch.func.jvp(lambda r, i: r / (1 + r * r + i * i), (c.real, c.imag), (direction.real, direction.imag))
    value, tangent = torch.func.jvp(layer, (c,), (direction,))
    assert_near(value, expected[0], 1e-10)
    assert_near(tangent, expected[1], 1e-10)
    gradient = torch.func.grad(lambda c: layer(c).sum())(c)
    assert_near((gradient.conj() * direction).real.sum(), expected[1].sum(), 1e-10)
