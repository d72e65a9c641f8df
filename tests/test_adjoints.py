"""Unrolled, OneStep and Gauss-Newton curvature, each against a loop or a formula written by hand."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers.cases import ADJOINT, SOLVERS, TIGHT
from tests.helpers.problems import F64, coupled, each, newton, normal, quadratic, spd

N, LR = 3, 0.15
A, THETA, BATCH = spd(N), normal(N, seed=1), normal(4, N, seed=2)
ZERO = torch.zeros(N, dtype=F64)


def assert_near(ours, expected, tol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def fixed(steps, **options):
    return il.GradientDescent(lr=LR, rtol=None, atol=None, max_steps=steps, **options)


# --- Unrolled -----------------------------------------------------------------------------------------------


def hand(theta, steps, momentum=0.0, nesterov=False, x=ZERO, detach_before=None):
    """The loop as one writes it."""
    velocity = torch.zeros_like(x)
    for k in range(steps):
        seen = theta.detach() if detach_before is not None and k < detach_before else theta
        if k == detach_before:
            x, velocity = x.detach(), velocity.detach()
        F = grad(coupled)(x, seen)
        velocity = momentum * velocity + F
        x = x - LR * (F + momentum * velocity if nesterov else velocity)
    return x


VARIANTS = {"plain": {}, "momentum": {"momentum": 0.6}, "nesterov": {"momentum": 0.6, "nesterov": True}}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_unrolled_is_the_loop_written_by_hand(options, steps):
    def layer(theta):
        return il.argmin(coupled, ZERO, theta, solver=fixed(steps, **options), adjoint=il.Unrolled()).value

    def loop(theta):
        return hand(theta, steps, **options)

    # The same operations in the same order: nothing but the rounding of a fused multiplication may differ.
    tol = 1e-14
    assert_near(layer(THETA), loop(THETA), tol)
    assert_near(jacrev(layer)(THETA), jacrev(loop)(THETA), tol)
    assert_near(jacfwd(layer)(THETA), jacrev(loop)(THETA), tol)
    assert_near(jacrev(jacrev(layer))(THETA), jacrev(jacrev(loop))(THETA), 1e-13)
    leaf = THETA.clone().requires_grad_()
    layer(leaf).sin().sum().backward()
    assert_near(leaf.grad, grad(lambda t: loop(t).sin().sum())(THETA), tol)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_unrolled_is_torch_optim(options):
    x = torch.nn.Parameter(ZERO.clone())
    optimizer = torch.optim.SGD([x], lr=LR, **options)
    for _ in range(7):
        optimizer.zero_grad()
        coupled(x, THETA).backward()
        optimizer.step()
    ours = il.argmin(coupled, ZERO, THETA, solver=fixed(7, **options), adjoint=il.Unrolled()).value
    assert_near(ours, x.detach(), 1e-14)


def test_unrolled_differentiates_the_start():
    def layer(x0):
        return il.argmin(coupled, x0, THETA, solver=fixed(4), adjoint=il.Unrolled()).value

    start = normal(N, seed=3)
    assert_near(jacrev(layer)(start), jacrev(lambda x0: hand(THETA, 4, x=x0))(start), 1e-14)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_unrolled_converges_to_the_implicit_derivative(solver):
    # Recorded until the residual is 1e-13; the derivative converges with the iterates, later by a few digits.
    def layer(theta):
        return il.argmin(coupled, ZERO, theta, solver=solver, adjoint=il.Unrolled()).value

    implicit = jacrev(lambda theta: newton(coupled, ZERO, theta))(THETA)
    assert_near(jacrev(layer)(THETA), implicit, 1e-7)


MIXTURES = {"rr": (jacrev, jacrev), "rf": (jacrev, jacfwd), "fr": (jacfwd, jacrev), "ff": (jacfwd, jacfwd)}


@pytest.mark.parametrize(("outer", "inner"), MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("adjoint", [il.Unrolled(), il.OneStep(2)], ids=["unrolled", "one-step"])
@pytest.mark.parametrize("linear_solver", [il.CG(rtol=1e-12), il.Dense()], ids=["cg", "dense"])
def test_second_derivatives_through_recorded_newton_steps(linear_solver, adjoint, outer, inner):
    solver = il.Newton(linear_solver, **TIGHT)

    def layer(theta):
        return il.argmin(coupled, ZERO, theta, solver=solver, adjoint=adjoint).value

    expected = jacrev(jacrev(lambda t: newton(coupled, ZERO, t)))(THETA)
    assert_near(outer(inner(layer))(THETA), expected, 1e-7)


def test_unrolled_lanes_stop_each_at_its_own_step():
    solver = il.GradientDescent(lr=LR, rtol=1e-4)
    scales = torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=F64)[:, None]

    def layer(theta):
        solution = il.argmin(coupled, ZERO, theta, solver=solver, adjoint=il.Unrolled())
        return solution.value, solution.stats.steps, solution.status

    value, steps, status = vmap(layer)(BATCH * scales)
    assert len(set(steps.tolist())) > 1
    assert status.tolist() == [0] * 4
    loops = [hand(theta, int(k)) for theta, k in zip(BATCH * scales, steps, strict=True)]
    assert_near(value, torch.stack(loops), 1e-14)
    ours = vmap(jacrev(lambda theta: layer(theta)[0]))(BATCH * scales)
    jacobians = [jacrev(lambda t, k=k: hand(t, int(k)))(theta) for theta, k in zip(BATCH * scales, steps, strict=True)]
    assert_near(ours, torch.stack(jacobians), 1e-13)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("last", [1, 3, 8, 20])
def test_unrolled_last_steps_only(options, last):
    steps = 8

    def layer(theta):
        solver = fixed(steps, **options)
        return il.argmin(coupled, ZERO, theta, solver=solver, adjoint=il.Unrolled(last=last)).value

    def loop(theta):
        return hand(theta, steps, **options, detach_before=max(0, steps - last))

    assert_near(layer(THETA), hand(THETA, steps, **options), 1e-14)
    assert_near(jacrev(layer)(THETA), jacrev(loop)(THETA), 1e-14)
    start = THETA.clone().requires_grad_()
    x = il.argmin(coupled, start, BATCH[0], solver=fixed(steps), adjoint=il.Unrolled(last=last)).value
    assert not x.requires_grad


@pytest.mark.parametrize("adjoint", [il.Unrolled(), il.Unrolled(last=3), il.OneStep(3)], ids=repr)
def test_forward_mode_is_not_called_off_by_no_grad(adjoint):
    layer = lambda t: il.argmin(coupled, ZERO, t, solver=fixed(40), adjoint=adjoint).value  # noqa: E731
    tangent = normal(N, seed=3)
    with torch.no_grad():
        ours = torch.func.jvp(layer, (THETA,), (tangent,))[1]
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(THETA, tangent))).tangent
    expected = jacrev(layer)(THETA) @ tangent
    assert_near(ours, expected)
    assert_near(dual, expected)


def test_unrolled_reaches_captured_tensors_and_regularizers():
    lam = torch.tensor(0.4, dtype=F64)

    def layer(theta, lam):
        objective = lambda x: coupled(x, theta)  # noqa: E731
        proximal, solver = il.Proximal(theta, lam), fixed(5)
        return il.argmin(objective, ZERO, regularizer=proximal, solver=solver, adjoint=il.Unrolled()).value

    def loop(theta, lam):
        x = ZERO
        for _ in range(5):
            x = x - LR * (grad(coupled)(x, theta) + lam * (x - theta))
        return x

    for argnum in (0, 1):
        expected = jacrev(loop, argnums=argnum)(THETA, lam)
        assert_near(jacrev(layer, argnums=argnum)(THETA, lam), expected, 1e-14)


# --- OneStep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear_solver", [il.CG(rtol=1e-12), il.Dense()], ids=["cg", "dense"])
def test_one_newton_step_is_the_implicit_derivative(linear_solver):
    solver = il.Newton(linear_solver, **TIGHT)

    def layer(theta):
        return il.argmin(coupled, ZERO, theta, solver=solver, adjoint=il.OneStep()).value

    assert_near(layer(THETA), newton(coupled, ZERO, THETA), 1e-10)
    assert_near(jacrev(layer)(THETA), jacrev(lambda t: newton(coupled, ZERO, t))(THETA), 1e-9)
    assert_near(jacfwd(layer)(THETA), jacrev(lambda t: newton(coupled, ZERO, t))(THETA), 1e-9)
    assert_near(vmap(jacrev(layer))(BATCH), each(jacrev(lambda t: newton(coupled, ZERO, t)), BATCH), 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_gradient_steps_are_a_truncated_neumann_series(steps):
    """∂x/∂b after k steps from the solution is lr·Σⱼ (I - lr·A)ʲ, j < k, in place of A⁻¹: biased, by (I - lr·A)ᵏA⁻¹."""
    solver = il.GradientDescent(lr=LR, **TIGHT)

    def layer(b):
        return il.argmin(lambda x: quadratic(x, A, b), ZERO, solver=solver, adjoint=il.OneStep(steps)).value

    B = torch.eye(N, dtype=F64) - LR * A
    neumann = LR * sum(torch.linalg.matrix_power(B, j) for j in range(steps))
    assert_near(jacrev(layer)(THETA), neumann, 1e-12)
    bias = jacrev(layer)(THETA) - torch.linalg.inv(A)
    assert_near(bias, -torch.linalg.matrix_power(B, steps) @ torch.linalg.inv(A), 1e-12)
    if steps == 40:
        assert bias.abs().max() < 0.01


def test_one_step_reports_the_solve_not_the_step():
    solver = il.GradientDescent(lr=LR, rtol=1e-10)
    theta = THETA.clone().requires_grad_()
    one = il.argmin(coupled, ZERO, theta, solver=solver, adjoint=il.OneStep())
    implicit = il.argmin(coupled, ZERO, theta, solver=solver)
    assert one.status.item() == il.Status.CONVERGED
    assert one.stats.steps.item() == implicit.stats.steps.item()
    assert one.value.requires_grad


# --- Gauss-Newton -------------------------------------------------------------------------------------------


def model(x, theta):
    return torch.tanh(theta * x[0]) + x[1] * theta + x[2] ** 2


def misfit(z, theta):
    return (z - theta.square()).square().sum() / 2 + 0.05 * z.square().sum()


COMPOSITE = il.Composite(model, misfit)
TARGET = torch.tensor([0.5, -0.3, 1.2, 0.9], dtype=F64)
# Far from the solution, so that the Hessian and the Gauss-Newton matrix differ.
STOPPED = il.GradientDescent(lr=0.05, rtol=None, atol=None, max_steps=3)
START = torch.tensor([0.5, 0.2, 1.0], dtype=F64)


def stopped(theta, damping=0.1, curvature="gauss_newton"):
    adjoint = il.Implicit(il.CG(rtol=1e-13), damping=damping, curvature=curvature, on_failure="raise")
    return il.argmin(COMPOSITE, START, theta, solver=STOPPED, adjoint=adjoint).value


def by_hand(theta, x, damping=0.1):
    """-(JᵀBJ + damping)⁻¹ ∂F/∂θ with dense matrices."""
    J, z = jacrev(model)(x, theta), model(x, theta)
    G = J.T @ hessian(misfit)(z, theta) @ J + damping * torch.eye(N, dtype=F64)
    return -torch.linalg.solve(G, jacrev(grad(COMPOSITE), argnums=1)(x, theta))


def test_composite_is_its_objective():
    x = START
    assert_near(COMPOSITE(x, TARGET), misfit(model(x, TARGET), TARGET))


def test_gauss_newton_is_the_dense_formula():
    x = stopped(TARGET)
    expected = by_hand(TARGET, x)
    assert_near(jacrev(stopped)(TARGET), expected, 1e-10)
    assert_near(jacfwd(stopped)(TARGET), expected, 1e-10)
    by_hessian = jacrev(lambda t: stopped(t, 0.5, "hessian"))(TARGET)
    assert (by_hessian - by_hand(TARGET, x, 0.5)).abs().max() > 1e-2


def test_gauss_newton_lanes():
    batch = TARGET + 0.1 * normal(3, 4, seed=5)
    expected = torch.stack([by_hand(theta, stopped(theta)) for theta in batch])
    assert_near(vmap(jacrev(stopped))(batch), expected, 1e-10)


def test_gauss_newton_on_linear_least_squares_is_exact_and_of_any_order():
    X = normal(6, N, seed=6)
    objective = il.Composite(lambda w, y: X @ w, lambda z, y: (z - y.sin()).square().sum() / 2)
    adjoint = il.Implicit(il.CG(rtol=1e-13), curvature="gauss_newton", on_failure="raise")

    def layer(y):
        return il.argmin(objective, ZERO, y, solver=il.Newton(il.CG(rtol=1e-11), **TIGHT), adjoint=adjoint).value

    def oracle(y):
        return torch.linalg.solve(X.T @ X, X.T @ y.sin())

    y = normal(6, seed=7)
    assert_near(layer(y), oracle(y), 1e-9)
    assert_near(jacrev(layer)(y), jacrev(oracle)(y), 1e-9)
    assert_near(jacrev(jacrev(layer))(y), jacrev(jacrev(oracle))(y), 1e-9)
    assert_near(jacfwd(jacrev(layer))(y), jacrev(jacrev(oracle))(y), 1e-9)


def test_second_derivatives_through_gauss_newton_run():
    leaf = TARGET.clone().requires_grad_()
    (g,) = torch.autograd.grad(stopped(leaf).sin().sum(), leaf, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), leaf)
    assert h.isfinite().all()
    assert h.abs().max() > 0


def test_composite_with_a_tree_between_model_and_loss_and_captured_tensors():
    def layer(theta):
        two = il.Composite(
            lambda x: {"a": theta[:2] * x[:2], "b": [x[2:] * 2]},
            lambda z: (z["a"] - 1).square().sum() / 2 + (z["b"][0] - theta[2]).square().sum() / 2,
        )
        adjoint = il.Implicit(il.CG(rtol=1e-13), curvature="gauss_newton")
        return il.argmin(two, ZERO, solver=il.Newton(**TIGHT), adjoint=adjoint).value

    theta = torch.tensor([1.5, 0.7, 3.0], dtype=F64)
    assert_near(layer(theta), torch.stack([1 / theta[0], 1 / theta[1], theta[2] / 2]), 1e-9)
    expected = torch.diag(torch.stack([-1 / theta[0] ** 2, -1 / theta[1] ** 2, torch.tensor(0.5, dtype=F64)]))
    assert_near(jacrev(layer)(theta), expected, 1e-9)
    assert_near(jacfwd(layer)(theta), expected, 1e-9)


def test_gauss_newton_is_never_indefinite_where_the_hessian_is():
    # ½(x² - a)² at x = 0.1, a = 1: the Hessian is 6x² - 2a < 0, and the Gauss-Newton matrix is (2x)² > 0.
    objective = il.Composite(lambda x, a: x * x, lambda z, a: (z - a).square().sum() / 2)
    start, solver = torch.tensor([0.1], dtype=F64), il.GradientDescent(lr=1e-6, rtol=None, atol=None, max_steps=1)
    a = torch.ones(1, dtype=F64, requires_grad=True)
    bad = il.argmin(objective, start, a, solver=solver, adjoint=il.Implicit(on_failure="raise")).value
    with pytest.raises(il.AdjointError, match="INDEFINITE"):
        torch.autograd.grad(bad.sum(), a)
    adjoint = il.Implicit(curvature="gauss_newton", on_failure="raise")
    good = il.argmin(objective, start, a, solver=solver, adjoint=adjoint).value
    # (2x)⁻²·2x at x = 0.1.
    assert_near(torch.autograd.grad(good.sum(), a)[0], torch.tensor([5.0], dtype=F64), 1e-4)


@pytest.mark.parametrize("composite", [False, True])
def test_the_hessian_is_the_hessian_on_the_quartic_before_convergence(composite):
    """min (a - x)⁴: F = -4(a - x)³, ∂F/∂x = 12(a - x)² = -∂F/∂a, so dx/da = 1 at any x; another library says 1.5."""
    objective = lambda x, a: (a - x) ** 4  # noqa: E731
    if composite:
        objective = il.Composite(lambda x, a: (a - x) ** 2, lambda z, a: z**2)
    solver = il.GradientDescent(lr=0.01, rtol=None, atol=None, max_steps=5)

    def layer(a, adjoint=ADJOINT):
        return il.argmin(objective, torch.tensor(0.0, dtype=F64), a, solver=solver, adjoint=adjoint).value

    a = torch.tensor(1.0, dtype=F64)
    assert (layer(a) - a).abs() > 0.5
    assert_near(jacrev(layer)(a), torch.ones_like(a), 1e-12)
    assert_near(jacfwd(layer)(a), torch.ones_like(a), 1e-12)
    if composite:
        # Asked for, the other curvature is given: J = -2(a - x), B = 2, so 8(a - x)² in place of 12(a - x)².
        gauss_newton = il.Implicit(il.CG(rtol=1e-13), curvature="gauss_newton")
        assert_near(jacrev(lambda a: layer(a, gauss_newton))(a), torch.tensor(1.5, dtype=F64), 1e-12)
