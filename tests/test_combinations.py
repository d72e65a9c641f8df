"""Every problem with every solver made for it, differentiated in every way that makes sense, against one oracle.

`Implicit` and `Unrolled` must give the derivative of the solution. `OneStep` must where the recorded step converges
quadratically; for the others it is the derivative of a truncated Neumann series, whose error is measured.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.func import jacfwd, jacrev

import implicitlayers as il
from tests.helpers.cases import THETA
from tests.helpers.problems import F64, coupled, newton
from tests.transforms.test_equations import gradient, mapping, residual, residuals
from tests.transforms.test_equations import newton as equation_newton

ZERO = torch.zeros(3, dtype=F64)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
CAP = torch.tensor([0.3, 0.1, 0.3], dtype=F64)
RIDGE = il.Ridge(0.1)


class Posed(NamedTuple):
    """A problem: how it is called, and what its solution is."""

    call: Callable[..., il.Solution]
    oracle: Callable[[torch.Tensor], torch.Tensor]


def _boxed(theta):
    """The minimizer of ½‖x - θ‖² under x ≤ cap, in closed form."""
    return torch.minimum(theta, CAP)


PROBLEMS = {
    "argmin": Posed(lambda t, **how: il.argmin(coupled, ZERO, t, **how), lambda t: newton(coupled, ZERO, t)),
    "least squares": Posed(
        lambda t, **how: il.least_squares(residuals, ZERO, t, regularizer=RIDGE, **how),
        lambda t: equation_newton(gradient, t),
    ),
    "plain least squares": Posed(
        lambda t, **how: il.least_squares(residuals, ZERO, t, **how),
        lambda t: equation_newton(jacrev(lambda w, t: residuals(w, t).square().sum() / 2), t),
    ),
    "root": Posed(lambda t, **how: il.root(residual, ZERO, t, **how), lambda t: equation_newton(residual, t)),
    "fixed point": Posed(
        lambda t, **how: il.fixed_point(mapping, ZERO, t, **how),
        lambda t: equation_newton(lambda x, t: x - mapping(x, t), t),
    ),
    "projection": Posed(
        lambda t, **how: il.argmin(
            lambda x, t: (x - t).square().sum() / 2, ZERO, t, regularizer=il.Box(-9.0, CAP), **how
        ),
        _boxed,
    ),
}

MINIMIZERS = {
    "gradient": il.GradientDescent(lr=0.2, **TIGHT),
    "nesterov": il.GradientDescent(lr=0.1, momentum=0.5, nesterov=True, **TIGHT),
    "lbfgs": il.LBFGS(**TIGHT),
    "lbfgs-wolfe": il.LBFGS(line_search=il.StrongWolfe(), **TIGHT),
    "newton": il.Newton(il.Dense(), **TIGHT),
    "proximal": il.ProximalGradient(**TIGHT),
    "torch": il.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.2), **TIGHT),
    # The trust region stops growing and shrinking where the decrease of the objective is rounding.
    "scipy": il.Scipy("trust-exact", rtol=1e-10, atol=1e-10),
    "best": il.BestSoFar(il.GradientDescent(lr=0.2, **TIGHT)),
}
SOLVERS: dict[str, dict[str, Any]] = {
    "argmin": {**MINIMIZERS, "adam": il.Adam(lr=0.05, rtol=1e-10, atol=1e-10, max_steps=20_000)},
    "least squares": {
        **MINIMIZERS,
        "gauss-newton": il.GaussNewton(**TIGHT),
        "levenberg-marquardt": il.LevenbergMarquardt(**TIGHT),
    },
    # SciPy's own methods for least squares know no regularizer, and end where the sum of squares no longer falls, which
    # with residuals that do not vanish is at the square root of the rounding.
    "plain least squares": {
        "gauss-newton": il.GaussNewton(**TIGHT),
        "levenberg-marquardt": il.LevenbergMarquardt(**TIGHT),
        "scipy-lm": il.Scipy("lm", rtol=1e-9, atol=1e-9),
        "scipy-trf": il.Scipy("trf", rtol=1e-9, atol=1e-9),
    },
    "root": {
        "newton": il.Newton(il.Dense(), **TIGHT),
        "newton-gmres": il.Newton(il.GMRES(rtol=1e-12), **TIGHT),
        "broyden": il.Broyden(**TIGHT),
        "scipy": il.Scipy("hybr", **TIGHT),
    },
    "fixed point": {
        "picard": il.FixedPointIteration(**TIGHT),
        "anderson": il.Anderson(**TIGHT),
        "broyden": il.Broyden(**TIGHT),
        "newton": il.Newton(**TIGHT),
    },
    "projection": {"proximal": il.ProximalGradient(**TIGHT), "scipy": il.Scipy("L-BFGS-B", **TIGHT)},
}
ADJOINTS = {
    "implicit": il.Implicit(on_failure="raise"),
    "dense": il.Implicit(il.Dense(), on_failure="raise"),
    "unrolled": il.Unrolled(),
    "one step": il.OneStep(),
}
# Adam's effective step does not shrink with the gradient, and derivatives through its square roots settle slowly.
SETTLES_SLOWLY = {("argmin", "adam")}
QUADRATIC = {"newton", "newton-gmres"}
CELLS = [
    pytest.param(problem, solver, adjoint, id=f"{problem}-{solver}-{adjoint}")
    for problem, solvers in SOLVERS.items()
    for solver in solvers
    for adjoint in ADJOINTS
    if (SOLVERS[problem][solver].recordable or adjoint in ("implicit", "dense"))
    and not ((problem, solver) in SETTLES_SLOWLY and adjoint in ("unrolled", "one step"))
]


@functools.cache
def truth(problem):
    oracle = PROBLEMS[problem].oracle
    return oracle(THETA), jacfwd(oracle)(THETA)


def layer(problem, solver, adjoint):
    return lambda t: PROBLEMS[problem].call(t, solver=SOLVERS[problem][solver], adjoint=ADJOINTS[adjoint]).value


@pytest.mark.parametrize(("problem", "solver", "adjoint"), CELLS)
def test_value_and_jacobian(problem, solver, adjoint):
    value, jacobian = truth(problem)
    run = layer(problem, solver, adjoint)
    # The solves end at ‖F‖ about 1e-12, external ones and Adam a little earlier.
    torch.testing.assert_close(run(THETA), value, rtol=0, atol=1e-8)
    ours = jacrev(run)(THETA)
    error = (ours - jacobian).abs().max()
    if adjoint == "one step" and solver not in QUADRATIC:
        # One step of a contraction: a derivative of the right sign and size, not the whole of it.
        assert ours.isfinite().all()
        assert error < 2 * jacobian.abs().max()
    else:
        # Derivatives through a path converge as fast as the path does, but later.
        assert error < (1e-5 if adjoint == "unrolled" else 1e-7)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_bias_of_one_step_is_that_of_the_truncated_series(steps):
    """x ← x - lr F has the derivative -lr Σ_{k<K} (I - lr A)ᵏ ∂F/∂θ, short of -A⁻¹ ∂F/∂θ by (I - lr A)ᴷ."""
    lr = 0.2
    solver, adjoint = il.GradientDescent(lr=lr, **TIGHT), il.OneStep(steps)

    def run(t):
        return il.argmin(coupled, ZERO, t, solver=solver, adjoint=adjoint).value

    x, exact = truth("argmin")
    A = torch.func.hessian(coupled)(x, THETA)
    short = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - lr * A, steps)
    torch.testing.assert_close(jacrev(run)(THETA), exact - short @ exact, rtol=0, atol=1e-9)


def test_truncated_unrolling_has_the_same_bias():
    lr, last = 0.2, 4
    solver = il.GradientDescent(lr=lr, rtol=None, atol=None, max_steps=400)

    def run(t):
        return il.argmin(coupled, ZERO, t, solver=solver, adjoint=il.Unrolled(last=last)).value

    x, exact = truth("argmin")
    A = torch.func.hessian(coupled)(x, THETA)
    short = torch.linalg.matrix_power(torch.eye(3, dtype=F64) - lr * A, last)
    torch.testing.assert_close(jacrev(run)(THETA), exact - short @ exact, rtol=0, atol=1e-9)
