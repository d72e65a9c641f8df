"""Recorded Newton and quasi-Newton steps, above all where F is zero to the last bit and only its derivative is left."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers.problems import F64, normal, quadratic

A = torch.diag(torch.tensor([2.0, 4.0], dtype=F64))
NEWTONS = {"dense": il.Newton(il.Dense()), "cg": il.Newton(il.CG(rtol=1e-12)), "damped": il.Newton(damping=0.5)}
# Newton solves these without rounding, and in the second only along one axis, so that CG has seen one eigenvector.
EXACT = [torch.tensor(theta, dtype=F64) for theta in ([2.0, 4.0], [2.0, 0.0], [0.0, 0.0])]
ZERO = torch.zeros(2, dtype=F64)


def assert_near(ours, expected, tol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def layer(theta, solver, adjoint):
    return il.argmin(quadratic, ZERO, A, theta, solver=solver, adjoint=adjoint, on_failure="ignore").value


@pytest.mark.parametrize("solver", [NEWTONS["dense"], NEWTONS["cg"]], ids=["dense", "cg"])
@pytest.mark.parametrize("theta", EXACT, ids=["both", "one", "none"])
@pytest.mark.parametrize("adjoint", [il.OneStep(), il.OneStep(2)], ids=["one", "two"])
def test_a_step_where_nothing_is_left_has_the_derivative_of_the_solution(solver, theta, adjoint):
    expected = torch.linalg.inv(A)
    assert_near(jacrev(lambda t: layer(t, solver, adjoint))(theta), expected)
    assert_near(jacfwd(lambda t: layer(t, solver, adjoint))(theta), expected)
    leaf = theta.clone().requires_grad_()
    layer(leaf, solver, adjoint).sum().backward()
    assert_near(leaf.grad, expected.sum(0))
    assert_near(vmap(jacrev(lambda t: layer(t, solver, adjoint)))(theta.expand(3, 2)), expected.expand(3, 2, 2))


@pytest.mark.parametrize("solver", [NEWTONS["dense"], NEWTONS["cg"]], ids=["dense", "cg"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no_grad"])
def test_dual_numbers_where_nothing_is_left(solver, recorded):
    direction = torch.tensor([1.0, -2.0], dtype=F64)
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        x = layer(forward_ad.make_dual(EXACT[2], direction), solver, il.OneStep())
        tangent = forward_ad.unpack_dual(x).tangent
    assert_near(tangent, torch.linalg.solve(A, direction))


@pytest.mark.parametrize("solver", [NEWTONS["dense"], NEWTONS["cg"]], ids=["dense", "cg"])
def test_an_unrolled_solve_that_lands_on_the_solution(solver):
    assert_near(jacrev(lambda t: layer(t, solver, il.Unrolled()))(EXACT[0]), torch.linalg.inv(A))

    # (x - a)²/2 lands on a in one step; another loop gave [4, 4], or NaN, in place of 1.
    def scalar(a):
        start = torch.tensor(0.0, dtype=F64)
        return il.argmin(lambda x, a: (x - a) ** 2 / 2, start, a, solver=solver, adjoint=il.OneStep()).value

    assert_near(jacrev(scalar)(torch.tensor(3.0, dtype=F64)), torch.ones((), dtype=F64))


def test_a_damped_step_has_its_own_derivative():
    # x - (A + δ)⁻¹(A x - θ) from the solution: dx/dθ = A⁻¹ is missed by (I - (A + δ)⁻¹A)A⁻¹ after one step.
    solver = il.Newton(il.Dense(), damping=0.5)
    damped = torch.linalg.inv(A + 0.5 * torch.eye(2, dtype=F64))
    assert_near(jacrev(lambda t: layer(t, solver, il.OneStep()))(EXACT[0]), damped, 1e-7)


def test_second_derivatives_where_f_is_zero():
    def curved(a, adjoint):
        objective = lambda x, a: (a.exp() * x * x / 2 - 2 * a.exp() * x).sum() + (x - 2).pow(4).sum()  # noqa: E731
        start = torch.full((2,), 2.0, dtype=F64)
        return il.argmin(objective, start, a, solver=il.Newton(il.Dense()), adjoint=adjoint).value

    a = normal(2, seed=1)
    # The solution is 2 whatever a is, and so are all its derivatives.
    assert_near(hessian(lambda a: curved(a, il.OneStep(2)).sum())(a), torch.zeros(2, 2, dtype=F64))
    assert_near(jacrev(lambda a: curved(a, il.OneStep()))(a), torch.zeros(2, 2, dtype=F64))


def test_a_recorded_step_from_a_saddle_goes_downhill_and_is_differentiated():
    # f = θ(x₀² - x₁²)/2 has no positive curvature along x₁: with F = θ(x₀, -x₁) the step is -F in the lane.
    objective = lambda x, theta: theta * (x[0] ** 2 - x[1] ** 2) / 2  # noqa: E731
    solver = il.Newton(il.Dense(), line_search=il.Fixed(), rtol=None, atol=None, max_steps=1)
    start, theta = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor(0.3, dtype=F64)

    def path(theta):
        return il.argmin(objective, start, theta, solver=solver, adjoint=il.Unrolled()).value

    assert_near(path(theta), torch.tensor([0.7, 2.6], dtype=F64))
    assert_near(jacrev(path)(theta), torch.tensor([-1.0, 2.0], dtype=F64))


@pytest.mark.parametrize("theta", EXACT, ids=["both", "one", "none"])
@pytest.mark.parametrize("steps", [1, 2])
def test_lbfgs_steps_from_the_solution_have_finite_derivatives(theta, steps):
    for transform in (jacrev, jacfwd):
        J = transform(lambda t: layer(t, il.LBFGS(rtol=1e-13), il.OneStep(steps)))(theta)
        assert J.isfinite().all()
        if theta.count_nonzero() == 2:
            # Both axes were walked along, so that the pairs know both curvatures, better after every step.
            assert_near(J, torch.linalg.inv(A), 5e-3 if steps == 1 else 5e-5)


def test_newton_on_an_equation_is_recorded_too():
    cubic = lambda x, t: t * x**3 - x - 2  # noqa: E731
    theta = torch.tensor(1.0, dtype=F64)
    for adjoint in (il.OneStep(), il.Unrolled()):

        def root(t, adjoint=adjoint):
            start = torch.tensor(1.4, dtype=F64)
            return il.root(cubic, start, t, solver=il.Newton(rtol=1e-12), adjoint=adjoint).value

        assert_near(jacrev(root)(theta), torch.tensor(-0.5924469933, dtype=F64), 1e-9)
