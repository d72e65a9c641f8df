"""Checkpointed unrolling: what plain unrolling gives, under every transform, in the memory of √T steps."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers.cases import BATCH, THETA, TRANSFORMS
from tests.helpers.memory import LiveBytes
from tests.helpers.problems import F64, coupled, normal
from tests.transforms.test_equations import mapping, residual, residuals

ZERO = torch.zeros(3, dtype=F64)
PLAIN, KEPT = il.Unrolled(), il.Unrolled(checkpoint=True)


def fixed(steps, **options):
    return il.GradientDescent(lr=0.15, rtol=None, atol=None, max_steps=steps, **options)


def minimum(solver, **options):
    return lambda t, adjoint: il.argmin(coupled, ZERO, t, solver=solver, adjoint=adjoint, **options).value


LAYERS = {
    "fixed": minimum(fixed(7, momentum=0.5, nesterov=True)),
    "gradient": minimum(il.GradientDescent(lr=0.2, rtol=1e-3)),
    "armijo": minimum(il.GradientDescent(lr=0.2, rtol=1e-3, line_search=il.Armijo())),
    "adam": minimum(il.Adam(lr=0.1, rtol=None, atol=None, max_steps=6)),
    "lbfgs": minimum(il.LBFGS(rtol=1e-6)),
    "newton": minimum(il.Newton(il.Dense(), rtol=1e-6)),
    "lasso": minimum(il.ProximalGradient(rtol=1e-4), regularizer=il.Lasso(0.1)),
    "least squares": lambda t, adjoint: il.least_squares(residuals, ZERO, t, adjoint=adjoint).value,
    "root": lambda t, adjoint: il.root(residual, ZERO, t, solver=il.Broyden(scale=0.3), adjoint=adjoint).value,
    # Less regularized, its least-squares problem is so nearly singular that plain jacfwd and jacrev differ by more.
    "fixed point": lambda t, adjoint: (
        il.fixed_point(mapping, ZERO, t, solver=il.Anderson(regularization=1e-2), adjoint=adjoint).value
    ),
}
SOME = (
    "jacrev",
    "jacfwd",
    "double-backward",
    "jacfwd-jacrev",
    "vmap-jacrev",
    "grad-vmap",
    "double-backward-through-vmap",
)
CELLS = [
    *(("fixed", transform) for transform in TRANSFORMS),
    *(("gradient", transform) for transform in TRANSFORMS if not transform.startswith("third")),
    *((name, transform) for name in LAYERS if name not in ("fixed", "gradient") for transform in SOME),
]


@pytest.mark.parametrize(("name", "transform"), CELLS)
def test_checkpoints_change_nothing(name, transform):
    run = TRANSFORMS[transform][0]
    expected = run(lambda t: LAYERS[name](t, PLAIN))
    assert expected.abs().max() > 1e-3
    ours = run(lambda t: LAYERS[name](t, KEPT))
    # Adam divides by the root of a mean of squares, and a component of the slope may come near to zero.
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 10, 17])
def test_every_number_of_steps(steps):
    looking = il.GradientDescent(lr=0.15, rtol=1e-14, max_steps=steps)
    for solver in (fixed(steps, momentum=0.6), looking):

        def layer(t, adjoint, solver=solver):
            return il.argmin(coupled, ZERO, t, solver=solver, adjoint=adjoint, on_failure="ignore")

        plain, kept = layer(THETA, PLAIN), layer(THETA, KEPT)
        torch.testing.assert_close(kept.value, plain.value, rtol=0, atol=0)
        assert (kept.status, kept.stats.steps) == (plain.status, plain.stats.steps)
        assert kept.stats.steps == steps
        jacobians = [jacrev(lambda t, how=how, layer=layer: layer(t, how).value)(THETA) for how in (PLAIN, KEPT)]
        torch.testing.assert_close(*jacobians, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("last", [1, 4, 9])
def test_the_last_steps_alone(last):
    def layer(t, checkpoint):
        adjoint = il.Unrolled(last=last, checkpoint=checkpoint)
        return il.argmin(coupled, ZERO, t, solver=fixed(9, momentum=0.6), adjoint=adjoint).value

    for transform in (jacrev, jacfwd):
        plain, kept = (transform(lambda t, c=c: layer(t, c))(THETA) for c in (False, True))
        torch.testing.assert_close(kept, plain, rtol=1e-13, atol=1e-14)


def test_the_start_and_captured_tensors_and_labels():
    labels, weights = torch.tensor([0, 2, 1, 2]), normal(3, 3, seed=4)
    data = normal(4, 3, seed=5)

    def layer(x0, data, weights, adjoint):
        def objective(x, X, y):
            return torch.nn.functional.cross_entropy(X @ (weights * x), y) + x.square().sum()

        return il.argmin(objective, x0, data, labels, solver=fixed(6), adjoint=adjoint).value

    for argnum in range(3):
        plain, kept = (
            jacrev(lambda *a, how=how: layer(*a, how), argnums=argnum)(THETA, data, weights) for how in (PLAIN, KEPT)
        )
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(kept, plain, rtol=1e-13, atol=1e-14)
    assert layer(THETA.clone().requires_grad_(), data, weights, KEPT).requires_grad


def test_lanes_stop_each_at_its_own_step():
    solver, scales = il.GradientDescent(lr=0.15, rtol=1e-4), torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=F64)[:, None]

    def layer(t, adjoint):
        solution = il.argmin(coupled, ZERO, t, solver=solver, adjoint=adjoint)
        return solution.value, solution.stats.steps, solution.status

    plain, kept = (vmap(lambda t, how=how: layer(t, how))(BATCH * scales) for how in (PLAIN, KEPT))
    assert len(set(plain[1].tolist())) > 1
    torch.testing.assert_close(kept[1:], plain[1:], rtol=0, atol=0)
    torch.testing.assert_close(kept[0], plain[0], rtol=0, atol=1e-15)
    plain, kept = (
        grad(lambda b, how=how: vmap(lambda t: layer(t, how)[0])(b).sin().sum())(BATCH * scales)
        for how in (PLAIN, KEPT)
    )
    torch.testing.assert_close(kept, plain, rtol=1e-13, atol=1e-14)


N = 500
TARGET = normal(N, seed=6)


def vectors_alive(adjoint, solver):
    """The most memory of value and gradient, in vectors of the unknown's length."""
    theta = torch.ones(N, dtype=F64, requires_grad=True)
    with LiveBytes() as memory:
        objective = lambda x, t: (torch.tanh(x * t) - TARGET).square().sum() / 2  # noqa: E731
        start = torch.zeros(N, dtype=F64)
        x = il.argmin(objective, start, theta, solver=solver, adjoint=adjoint, on_failure="ignore").value
        x.sum().backward()
    return memory.peak / (8 * N)


def looking(steps):
    return il.GradientDescent(lr=1e-3, rtol=1e-14, max_steps=steps)


@pytest.mark.parametrize("solver", [fixed, looking], ids=["fixed", "looking"])
def test_memory_grows_with_the_root_of_the_steps(solver):
    plain, kept = ({steps: vectors_alive(how, solver(steps)) for steps in (16, 64, 256)} for how in (PLAIN, KEPT))
    # What does not depend on the steps makes both factors a little smaller than 4 and 2.
    assert plain[256] / plain[64] > 3.5
    assert kept[256] / kept[64] < 2.2
    assert kept[64] / kept[16] < 2.2
    assert kept[256] < plain[256] / 4
