"""Where the adjoints agree and by how much they must not: what truncation costs, for every solver of recordable steps.

At a solution x*(θ) a step x⁺ = S(x, θ) with contraction B = ∂S/∂x has dx* = (I - B)⁻¹ ∂S. K recorded steps sum the
first K terms of that series, and miss Bᴷ dx*.
"""

import pytest
import torch
from torch.func import hessian, jacrev

import implicitlayers as il
from tests.helpers.problems import F64, coupled, newton, normal
from tests.transforms.test_equations import mapping
from tests.transforms.test_equations import newton as equation_newton

THETA, ZERO, EYE = normal(3, seed=1), torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64)
TIGHT = {"rtol": 1e-13, "atol": 1e-13}
FIXED = {"rtol": None, "atol": None, "max_steps": 400}
LR, MOMENTUM = 0.15, 0.4


def jacobian(adjoint, solver, call=il.argmin, fn=coupled):
    return jacrev(lambda t: call(fn, ZERO, t, solver=solver, adjoint=adjoint, on_failure="ignore").value)(THETA)


EXACT = jacrev(lambda t: newton(coupled, ZERO, t))(THETA)
A = hessian(coupled)(newton(coupled, ZERO, THETA), THETA)
FIXED_EXACT = jacrev(lambda t: equation_newton(lambda x, t: x - mapping(x, t), t))(THETA)
G = jacrev(mapping)(equation_newton(lambda x, t: x - mapping(x, t), THETA), THETA)


def missed(B, exact, steps):
    return exact - torch.linalg.matrix_power(B, steps) @ exact


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_plain_contractions_miss_the_rest_of_the_series(steps):
    for adjoint, how in ((il.OneStep(steps), TIGHT), (il.Unrolled(last=steps), FIXED)):
        ours = jacobian(adjoint, il.GradientDescent(lr=LR, **how))
        torch.testing.assert_close(ours, missed(EYE - LR * A, EXACT, steps), rtol=0, atol=1e-11)
        ours = jacobian(adjoint, il.FixedPointIteration(damping=0.3, **how), il.fixed_point, mapping)
        torch.testing.assert_close(ours, missed(0.3 * EYE + 0.7 * G, FIXED_EXACT, steps), rtol=0, atol=1e-11)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_momentum_misses_the_rest_of_the_series_of_its_companion_matrix(steps, nesterov):
    # z = (x, v): v⁺ = μv + F(x), x⁺ = x - lr·v⁺, or x - lr·(F + μv⁺). The velocity is truncated with the rest.
    v_row = torch.cat([A, MOMENTUM * EYE], 1)
    ahead = torch.cat([A, torch.zeros_like(A)], 1) + MOMENTUM * v_row if nesterov else v_row
    B = torch.cat([torch.cat([EYE, torch.zeros_like(A)], 1) - LR * ahead, v_row])
    # At the solution the velocity is zero for every θ.
    exact = torch.cat([EXACT, torch.zeros_like(EXACT)])
    for adjoint, how in ((il.OneStep(steps), TIGHT), (il.Unrolled(last=steps), FIXED)):
        solver = il.GradientDescent(lr=LR, momentum=MOMENTUM, nesterov=nesterov, **how)
        torch.testing.assert_close(jacobian(adjoint, solver), missed(B, exact, steps)[:3], rtol=0, atol=1e-11)


def test_one_newton_step_misses_nothing():
    for adjoint, how in ((il.OneStep(), TIGHT), (il.Unrolled(last=1), {**FIXED, "max_steps": 12})):
        ours = jacobian(adjoint, il.Newton(il.Dense(), **how))
        torch.testing.assert_close(ours, EXACT, rtol=0, atol=1e-10)


RECORDABLE = {
    "gradient": il.GradientDescent(lr=0.2, **TIGHT),
    "armijo": il.GradientDescent(lr=0.2, line_search=il.Armijo(), **TIGHT),
    "nesterov": il.GradientDescent(lr=0.1, momentum=0.5, nesterov=True, **TIGHT),
    "lbfgs": il.LBFGS(**TIGHT),
    "newton": il.Newton(il.CG(rtol=1e-12), **TIGHT),
    "proximal": il.ProximalGradient(**TIGHT),
    "proximal, plain": il.ProximalGradient(accelerated=False, **TIGHT),
    "adam": il.Adam(lr=0.3, betas=(0.5, 0.9), eps=1.0, **TIGHT),
}


@pytest.mark.parametrize("solver", RECORDABLE.values(), ids=RECORDABLE.keys())
def test_enough_steps_agree_with_the_implicit_derivative(solver):
    implicit = jacobian(il.Implicit(il.CG(rtol=1e-13), on_failure="raise"), solver)
    torch.testing.assert_close(implicit, EXACT, rtol=0, atol=1e-9)
    errors = [(jacobian(il.OneStep(steps), solver) - EXACT).abs().max() for steps in (1, 8, 100)]
    # Every one of these steps is a contraction at the solution; the factor that is asked for is far from its rate.
    assert errors[2] < 1e-6
    assert errors[1] <= errors[0] + 1e-9
    whole = jacobian(il.Unrolled(), solver)
    torch.testing.assert_close(whole, EXACT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [il.FixedPointIteration(**TIGHT), il.Newton(il.Dense(), **TIGHT)])
def test_the_same_for_fixed_points(solver):
    for adjoint, tol in ((il.Implicit(), 1e-9), (il.OneStep(80), 1e-6), (il.Unrolled(), 1e-5)):
        ours = jacobian(adjoint, solver, il.fixed_point, mapping)
        torch.testing.assert_close(ours, FIXED_EXACT, rtol=0, atol=tol)


def test_broyden_steps_from_the_solution_keep_the_curvature_that_they_have():
    errors = [
        (jacobian(adjoint, il.Broyden(**TIGHT), il.fixed_point, mapping) - FIXED_EXACT).abs().max()
        for adjoint in (il.Implicit(), il.Unrolled(), il.OneStep(1), il.OneStep(80))
    ]
    assert errors[0] < 1e-9
    assert errors[1] < 1e-5
    # The known limit of the docstring: 0.8 after one step; after eighty 0.02 on one machine, and rounding on another.
    assert 0.1 < errors[2] < 1
    assert errors[3] < errors[2] / 10


@pytest.mark.parametrize("last", [1, 3])
def test_adam_resumes_with_its_means_and_its_count(last):
    b, steps, lr, (beta, gamma) = THETA, 5, 0.1, (0.9, 0.99)

    def by_hand(b):
        x, mean, square = ZERO, ZERO, ZERO
        for k in range(1, steps + 1):
            if k == steps - last + 1:
                x, mean, square = x.detach(), mean.detach(), square.detach()
            F = x - (b if k > steps - last else b.detach())
            mean, square = beta * mean + (1 - beta) * F, gamma * square + (1 - gamma) * F * F
            x = x - lr * (mean / (1 - beta**k)) / ((square / (1 - gamma**k)).sqrt() + 1e-8)
        return x

    solver = il.Adam(lr=lr, betas=(beta, gamma), rtol=None, atol=None, max_steps=steps)

    def ours(b):
        start, objective = ZERO, lambda x, b: (x - b).square().sum() / 2
        return il.argmin(objective, start, b, solver=solver, adjoint=il.Unrolled(last=last)).value

    torch.testing.assert_close(ours(b), by_hand(b), rtol=0, atol=1e-14)
    torch.testing.assert_close(jacrev(ours)(b), jacrev(by_hand)(b), rtol=1e-10, atol=1e-13)


def sums(x, M, b):
    return (M @ x - b).square().sum() / 2 + x.square().sum() / 2


def balance(x, M, b):
    return M @ x + x.tanh() - b


@pytest.mark.parametrize(("call", "fn"), [(il.argmin, sums), (il.root, balance)])
def test_newton_steps_at_a_solution_to_rounding_are_full_ones(call, fn):
    # There a search by values is a throw of dice: half a step halves the derivative, and none loses it.
    for seed in range(12):
        Q, b = normal(3, 3, seed=seed), normal(3, seed=seed + 100)
        M = 10.0 ** (seed % 4) * Q @ Q.mT + EYE
        steps = il.Newton(il.Dense(), rtol=None, atol=None, max_steps=20)
        ours, exact = (
            jacrev(lambda b, a=adjoint, M=M, s=steps: call(fn, ZERO, M, b, solver=s, adjoint=a).value)(b)
            for adjoint in (il.Unrolled(last=2), il.Implicit(il.Dense()))
        )
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9 * float(exact.abs().max()))
