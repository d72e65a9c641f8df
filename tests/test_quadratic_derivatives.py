"""Quadratic programs: all six derivatives, of first and second order, in every mode."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.problems import F64, normal
from tests.helpers.programs import ALL, NAMES, ORACLE, PROGRAM, M, N, P, assert_near, layer

# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_all_six_first_derivatives_against_the_active_set(mode):
    for name, ours, expected in zip(
        NAMES, mode(layer, argnums=ALL)(*PROGRAM), jacrev(ORACLE, argnums=ALL)(*PROGRAM), strict=True
    ):
        assert expected.abs().max() > 1e-2, name
        assert_near(ours, expected)


def test_first_derivatives_against_finite_differences():
    assert_gradients_match(layer, *PROGRAM, modes=("reverse", "forward"))


def scalar(f):
    weights = normal(N + P + M, seed=91)
    return lambda *program: (f(*program) * weights).sin().sum()


@pytest.mark.parametrize(
    "second",
    [
        hessian,
        lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
        lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
    ],
    ids=["forward-reverse", "reverse-reverse", "forward-forward"],
)
def test_all_second_derivatives_against_the_active_set(second):
    ours = second(scalar(layer), ALL)(*PROGRAM)
    expected = jacrev(jacrev(scalar(ORACLE), ALL), ALL)(*PROGRAM)
    for mine, theirs in zip(ours, expected, strict=True):
        for block, reference in zip(mine, theirs, strict=True):
            assert_near(block, reference, 1e-8)


def test_second_derivatives_where_multipliers_and_slacks_are_large():
    Q, q, A, b, G, h = PROGRAM
    active = ORACLE(*PROGRAM)[N + P :] > 0
    program = (30 * Q, 30 * q, A, b, torch.where(active[:, None], G, 30 * G), torch.where(active, h, 30 * h))
    ours = jacrev(jacrev(scalar(layer), (1, 5)), (4, 5))(*program)
    expected = jacrev(jacrev(scalar(ORACLE), (1, 5)), (4, 5))(*program)
    for mine, theirs in zip(ours, expected, strict=True):
        for block, reference in zip(mine, theirs, strict=True):
            # Curvatures of a sine of arguments up to thirty.
            assert_near(block, reference, 1e-7)


def test_double_backward_against_finite_differences():
    assert_gradients_match(
        scalar(layer), PROGRAM[0].clone().requires_grad_(), *PROGRAM[1:], order=2, modes=("reverse",)
    )


def test_the_derivative_in_Q_is_symmetric_and_only_its_symmetric_part_counts():
    skew = normal(N, N, seed=93) * 1e-3
    skew = skew - skew.mT
    assert_near(layer(PROGRAM[0] + skew, *PROGRAM[1:]), layer(*PROGRAM))
    g = grad(lambda Q: layer(Q, *PROGRAM[1:]).sum())(PROGRAM[0])
    assert_near(g, g.mT, 1e-14)


def test_multipliers_are_the_prices_of_the_right_hand_sides():
    def value(b, h):
        x = il.quadratic_program(*PROGRAM[:3], b, PROGRAM[4], h).value.x
        return x @ PROGRAM[0] @ x / 2 + PROGRAM[1] @ x

    db, dh = grad(value, argnums=(0, 1))(PROGRAM[3], PROGRAM[5])
    _, nu, lam = layer(*PROGRAM).split([N, P, M])
    assert_near(db, -nu)
    assert_near(dh, -lam)


def test_inside_an_argmin_it_is_differentiated_through():
    # The inner solution, x₁ = t and x₂ = 0, is known; the outer minimum of (t - 1)² + θ t is at 1 - θ/2.
    eye, zero = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)

    def objective(t, theta):
        x = il.quadratic_program(eye, torch.stack([-t, 0 * t + 1]), G=-eye, h=zero).value.x
        return (x[0] - 1) ** 2 + theta * x[0]

    def outer(theta):
        solver = il.Newton(rtol=1e-12)
        return il.argmin(objective, torch.tensor(0.5, dtype=F64), theta, solver=solver).value

    theta = torch.tensor(0.4, dtype=F64)
    assert_near(outer(theta), torch.tensor(0.8, dtype=F64))
    assert_near(grad(outer)(theta), torch.tensor(-0.5, dtype=F64))
