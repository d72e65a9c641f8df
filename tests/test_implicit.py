"""The implicit derivative: its scale, its report, its memory, and what of it is spent."""

import gc
import weakref

import psutil
import pytest
import torch
from torch.func import jvp, vmap

import implicitlayers as il
from tests.helpers.cases import ADJOINT, TIGHT
from tests.helpers.problems import F64, coupled, normal, quadratic, spd

NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)
N = 4
A, B = spd(N), normal(N, seed=1)
SCALES = [1e-30, 1e-20, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e20, 1e30]


def quadratic_layer(b, dtype=F64, adjoint=ADJOINT, solver=NEWTON):
    matrix = A.to(dtype)
    return il.argmin(lambda x, b: quadratic(x, matrix, b), torch.zeros_like(b), b, solver=solver, adjoint=adjoint)


# --- scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("linear_solver", [il.CG(rtol=1e-6), il.Dense()], ids=["cg", "dense"])
def test_cotangents_of_every_scale_in_single_precision(scale, linear_solver):
    adjoint = il.Implicit(linear_solver, on_failure="raise")
    b = B.float().requires_grad_()
    solver = il.LBFGS(rtol=1e-6)
    v = (normal(N, seed=2) * scale).float()
    solution = quadratic_layer(b, torch.float32, adjoint, solver)
    (g,) = torch.autograd.grad(solution.value, b, v)
    expected = torch.linalg.solve(A, v.double())
    # Machine epsilon 1.2e-7 times a condition number below ten, and CG's tolerance.
    torch.testing.assert_close(g.double() / scale, expected / scale, rtol=0, atol=1e-5)
    assert solution.adjoint.residual.item() < 1e-5
    assert solution.adjoint.error_estimate.item() < 1e-4


@pytest.mark.parametrize("scale", SCALES)
def test_tangents_of_every_scale_in_single_precision(scale):
    adjoint = il.Implicit(il.CG(rtol=1e-6), on_failure="raise")
    t = (normal(N, seed=2) * scale).float()
    _, dx = jvp(lambda b: quadratic_layer(b, torch.float32, adjoint, il.LBFGS(rtol=1e-6)).value, (B.float(),), (t,))
    torch.testing.assert_close(dx.double() / scale, torch.linalg.solve(A, t.double()) / scale, rtol=0, atol=1e-5)


def test_lanes_with_cotangents_of_very_different_scale():
    scales = torch.tensor(SCALES)[:, None]
    b = B.float().expand(len(SCALES), N).clone().requires_grad_()
    adjoint = il.Implicit(il.CG(rtol=1e-6), on_failure="raise")
    x = vmap(lambda b: quadratic_layer(b, torch.float32, adjoint, il.LBFGS(rtol=1e-6)).value)(b)
    v = normal(N, seed=2).float() * scales
    (g,) = torch.autograd.grad(x, b, v)
    expected = torch.linalg.solve(A, normal(N, seed=2)).expand(len(SCALES), N)
    torch.testing.assert_close((g.double() / scales), expected, rtol=0, atol=1e-5)


def test_cotangents_below_the_smallest_normal_number():
    b = B.float().requires_grad_()
    v = torch.full((N,), 1e-41)
    adjoint = il.Implicit(il.CG(rtol=1e-6), on_failure="raise")
    (g,) = torch.autograd.grad(quadratic_layer(b, torch.float32, adjoint, il.LBFGS(rtol=1e-6)).value, b, v)
    expected = torch.linalg.solve(A, v.double())
    # Subnormal numbers of float32 are multiples of 1.4e-45: 1e-41 has four digits left.
    torch.testing.assert_close(g.double() * 1e41, expected * 1e41, rtol=0, atol=1e-3)


def test_a_zero_cotangent_gives_an_exact_zero_without_a_step():
    b = B.clone().requires_grad_()
    solution = quadratic_layer(b)
    (g,) = torch.autograd.grad(solution.value, b, torch.zeros(N, dtype=F64))
    assert torch.equal(g, torch.zeros(N, dtype=F64))
    assert solution.adjoint.steps.item() == 0
    assert solution.adjoint.status.item() == il.Status.CONVERGED


# --- report -------------------------------------------------------------------------------------------------


def test_the_report_is_empty_before_and_filled_by_the_backward():
    b = B.clone().requires_grad_()
    solution = quadratic_layer(b, adjoint=il.Implicit(il.CG(rtol=1e-13), damping=0.25))
    assert solution.adjoint == il.AdjointReport()
    v = normal(N, seed=3)
    (g,) = torch.autograd.grad(solution.value, b, v)
    report, damped = solution.adjoint, A + 0.25 * torch.eye(N, dtype=F64)
    # The objective's ∂F/∂b is -I, so that the gradient is u itself.
    torch.testing.assert_close(g, torch.linalg.solve(damped, v), rtol=0, atol=1e-10)
    assert report.steps.shape == report.status.shape == report.residual.shape == ()
    assert 1 <= report.steps.item() <= N + 1
    assert report.status.item() == il.Status.CONVERGED
    assert report.damping == 0.25
    assert report.residual.item() <= 1e-12
    eigenvalues = torch.linalg.eigvalsh(damped)
    low, high = report.curvature
    slack = 1e-9  # of rounding, relative to eigenvalues of order one
    assert eigenvalues[0] - slack <= low <= high <= eigenvalues[-1] + slack
    error = ((g - torch.linalg.solve(damped, v)).norm() / g.norm()).item()
    # Rounding alone leaves an error of some machine epsilons.
    assert error <= report.error_estimate.item() <= 1e-12
    assert report.inner_error is None


def test_the_report_of_an_unfinished_solve_is_honest():
    b = B.clone().requires_grad_()
    solution = quadratic_layer(b, adjoint=il.Implicit(il.CG(max_steps=2), on_failure="ignore"))
    v = normal(N, seed=3)
    (g,) = torch.autograd.grad(solution.value, b, v)
    residual = (A @ g - v).norm() / v.norm()
    assert solution.adjoint.status.item() == il.Status.MAX_STEPS
    assert residual > 1e-3
    # CG's residual is updated by recurrence, and differs from the true one by rounding.
    torch.testing.assert_close(solution.adjoint.residual, residual, rtol=1e-9, atol=0)
    error = (g - torch.linalg.solve(A, v)).norm() / v.norm()
    assert error <= residual / torch.linalg.eigvalsh(A)[0]


def test_the_report_has_a_lane_for_every_problem():
    batch = normal(5, N, seed=4).requires_grad_()
    reports = []

    def layer(b):
        solution = quadratic_layer(b)
        reports.append(solution.adjoint)
        return solution.value

    torch.autograd.grad(vmap(layer)(batch).sin().sum(), batch)
    (report,) = reports
    for entry in (report.steps, report.status, report.residual, *report.curvature, report.error_estimate):
        assert entry.shape == (5,)
    assert report.status.tolist() == [0] * 5


def test_a_fixed_number_of_steps_says_that_nothing_was_checked():
    solver = il.GradientDescent(lr=0.1, rtol=None, atol=None, max_steps=3)
    b = B.clone().requires_grad_()
    solution = quadratic_layer(b, adjoint=il.Implicit(il.CG(rtol=None, atol=None, max_steps=2)), solver=solver)
    torch.autograd.grad(solution.value.sum(), b)
    assert solution.status.item() == solution.adjoint.status.item() == il.Status.NOT_CHECKED
    assert solution.stats.steps.item() == 3
    assert solution.adjoint.steps.item() == 2


def test_damping_biases_the_derivative_as_documented():
    b = B.clone().requires_grad_()
    for damping in (0.0, 0.5, 100.0):
        adjoint = il.Implicit(il.Dense(), damping=damping)
        (g,) = torch.autograd.grad(quadratic_layer(b, adjoint=adjoint).value.sum(), b)
        expected = torch.linalg.solve(A + damping * torch.eye(N, dtype=F64), torch.ones(N, dtype=F64))
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-10)


# --- memory -------------------------------------------------------------------------------------------------


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes():
    # Not the peak: a leak could hide below that of an earlier test.
    return psutil.Process().memory_info().rss


STEPS = il.GradientDescent(lr=0.1, rtol=None, atol=None, max_steps=2)


def forward(theta):
    return il.argmin(coupled, torch.zeros(3, dtype=F64), theta, solver=STEPS, adjoint=ADJOINT)


def backward(theta):
    forward(theta).value.sin().sum().backward()
    theta.grad = None


def double_backward(theta):
    (g,) = torch.autograd.grad(forward(theta).value.sin().sum(), theta, create_graph=True)
    torch.autograd.grad(g.square().sum(), theta)


def captured(theta):
    start, ridge = torch.zeros(3, dtype=F64), il.Ridge(theta[0].exp())
    solution = il.argmin(lambda x: coupled(x, theta), start, regularizer=ridge, solver=il.Newton())
    torch.autograd.grad(solution.value.sum(), theta)


def lanes(theta):
    batch = theta.expand(2, 3)
    torch.autograd.grad(vmap(lambda t: forward(t).value)(batch).sum(), theta)


def through_unrolled(theta):
    x = il.argmin(coupled, torch.zeros(3, dtype=F64), theta, solver=STEPS, adjoint=il.Unrolled()).value
    torch.autograd.grad(x.sum(), theta)


@pytest.mark.parametrize(
    ("call", "calls"),
    [(backward, 200), (forward, 50), (double_backward, 20), (captured, 20), (lanes, 20), (through_unrolled, 20)],
)
def test_no_tensor_survives_a_call(call, calls):
    theta = normal(3, seed=5).requires_grad_()
    for _ in range(3):
        call(theta)
    gc.collect()
    # Reference counting alone must do: a cycle would hold device memory until the collector happens to run.
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(calls):
            call(theta)
        assert live_tensors() == before
    finally:
        gc.enable()


def test_memory_stays_flat_over_two_hundred_calls_of_a_large_layer():
    n = 30_000  # 0.24 MB: one tensor kept in each call would be 48 MB.
    theta, anchor = torch.ones(n, dtype=F64, requires_grad=True), torch.zeros(n, dtype=F64)
    adjoint = il.Implicit(il.CG(rtol=None, atol=None, max_steps=2))

    def call():
        value = lambda x: (x - theta).square().sum() / 2  # noqa: E731
        x = il.argmin(value, anchor, regularizer=il.Proximal(theta, 0.5), solver=STEPS, adjoint=adjoint).value
        x.sum().backward()
        theta.grad = None

    for _ in range(20):
        call()
    before = resident_bytes()
    for _ in range(200):
        call()
    assert resident_bytes() - before < 16e6


def test_a_kept_solution_keeps_nothing_of_the_solve():
    theta = normal(3, seed=6).requires_grad_()

    def solve():
        big = torch.ones(1000, dtype=F64)
        objective = lambda x: coupled(x, theta) + 0 * big.sum()  # noqa: E731
        solution = il.argmin(objective, torch.zeros(3, dtype=F64), solver=NEWTON)
        solution.value.sum().backward()
        return solution.value.detach(), solution.adjoint, weakref.ref(big)

    value, report, big = solve()
    assert big() is None
    assert report.status.item() == il.Status.CONVERGED
    assert value.isfinite().all()


def graph_of(value):
    """The nodes that a backward from `value` would visit."""
    nodes, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes


@pytest.mark.parametrize("adjoint", [il.Implicit(), il.OneStep(), il.Unrolled()], ids=["implicit", "one", "unrolled"])
def test_what_is_recorded_depends_on_the_steps_only_when_unrolled(adjoint):
    theta = normal(3, seed=6).requires_grad_()

    def count(steps):
        solver = il.GradientDescent(lr=0.1, rtol=None, atol=None, max_steps=steps)
        x = il.argmin(coupled, torch.zeros(3, dtype=F64), theta, solver=solver, adjoint=adjoint).value
        return len(graph_of(x))

    few, many = count(2), count(20)
    assert few > 1
    assert (many > 5 * few) if isinstance(adjoint, il.Unrolled) else (many == few)
