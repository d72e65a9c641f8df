"""Layers of this library that are right: every solver, linear solver, adjoint and regularizer, in both types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch import Tensor

import implicitlayers as il
from implicitlayers.testing import check_adjoint, check_layer, check_linear_solver, check_solver, strategies
from tests.helpers.linear import suited
from tests.testing.planted import systems

F32, F64 = torch.float32, torch.float64
DTYPES = {"float64": F64, "float32": F32}

Check = Callable[[int], Any]
Rows = Iterator[tuple[str, Check]]


def tight(dtype: torch.dtype) -> float:
    """A tolerance that the type allows."""
    return 1e-13 if dtype == F64 else 1e-6


def kept(t: float) -> dict[str, float]:
    return {"rtol": t, "atol": t}


# --- how it is solved -----------------------------------------------------------------------------

# A new solver, linear solver or adjoint needs a line in one of these tables.
FAST: dict[str, Callable[[float], Any]] = {
    "L-BFGS": lambda t: il.LBFGS(**kept(t)),
    "Newton with CG": lambda t: il.Newton(il.CG(rtol=1e-10), **kept(t)),
    "Newton with Dense": lambda t: il.Newton(il.Dense(), **kept(t)),
}
# The curvature of what these are given is between 2 and 3, for which the steps are chosen: they take some 30.
OTHERS: dict[str, Callable[[float], Any]] = {
    "gradient descent": lambda t: il.GradientDescent(lr=0.4, **kept(t)),
    "heavy ball": lambda t: il.GradientDescent(lr=0.4, momentum=0.05, **kept(t)),
    "Nesterov": lambda t: il.GradientDescent(lr=0.3, momentum=0.1, nesterov=True, **kept(t)),
    "gradient descent with Armijo": lambda t: il.GradientDescent(lr=0.4, line_search=il.Armijo(), **kept(t)),
    "L-BFGS with Wolfe": lambda t: il.LBFGS(line_search=il.StrongWolfe(), **kept(t)),
    "proximal gradient": lambda t: il.ProximalGradient(accelerated=False, step_size=0.4, **kept(t)),
    "accelerated proximal gradient": lambda t: il.ProximalGradient(**kept(t)),
    "torch SGD": lambda t: il.TorchOptimizer(partial(torch.optim.SGD, lr=0.4), **kept(t)),
    "best so far": lambda t: il.BestSoFar(il.GradientDescent(lr=0.4, **kept(t))),
}
# Some 400 steps, whose size does not shrink with the gradient.
SLOW: dict[str, Callable[[float], Any]] = {
    "Adam": lambda t: il.Adam(lr=0.05, rtol=max(t, 1e-10), atol=max(t, 1e-10)),
}
# Its line search compares values, which are rounding where the gradient is still their square root.
BY_VALUES: dict[str, Callable[[float], Any]] = {
    "scipy L-BFGS-B": lambda t: il.Scipy("L-BFGS-B", rtol=t**0.4, atol=t**0.4),
}
FITS: dict[str, Callable[[float], Any]] = {
    "Gauss-Newton": lambda t: il.GaussNewton(**kept(t)),
    "Levenberg-Marquardt": lambda t: il.LevenbergMarquardt(**kept(t)),
    "Newton": lambda t: il.Newton(il.Dense(), **kept(t)),
}
ROOTS: dict[str, Callable[[float], Any]] = {
    "Newton with Dense": lambda t: il.Newton(il.Dense(), **kept(t)),
    "Newton with GMRES": lambda t: il.Newton(il.GMRES(rtol=max(t, 1e-12)), **kept(t)),
    "Broyden": lambda t: il.Broyden(**kept(t)),
    "scipy hybr": lambda t: il.Scipy("hybr", **kept(t)),
}
POINTS: dict[str, Callable[[float], Any]] = {
    "Picard": lambda t: il.FixedPointIteration(**kept(t)),
    "Anderson": lambda t: il.Anderson(**kept(t)),
    "Broyden": lambda t: il.Broyden(**kept(t)),
    "Newton": lambda t: il.Newton(il.Dense(), **kept(t)),
}
SYMMETRIC: dict[str, Callable[[float], Any]] = {
    "CG": lambda t: il.CG(rtol=t),
    "MINRES": lambda t: il.MINRES(rtol=t),
    "CG with Jacobi": lambda t: il.CG(rtol=t, preconditioner=il.Jacobi()),
    "MINRES with Nystrom": lambda t: il.MINRES(rtol=t, preconditioner=il.Nystrom(2)),
    "Neumann": lambda t: il.Neumann(steps=2000, step_size=0.15, rtol=t, atol=0.0),
}
GENERAL: dict[str, Callable[[float], Any]] = {
    "GMRES": lambda t: il.GMRES(rtol=t),
    "BiCGStab": lambda t: il.BiCGStab(rtol=t),
    "NormalCG": lambda t: il.NormalCG(rtol=t),
    "LSMR": lambda t: il.LSMR(rtol=t),
    "Dense": lambda t: il.Dense(),
    "Auto": lambda t: il.Auto(rtol=t),
}

# --- what is solved -------------------------------------------------------------------------------


def quadratic(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return x @ A @ x / 2 - b @ x


def ridge(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (A @ x - b).square().sum() / 2 + x.square().sum() / 2


def quartic(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return quadratic(x, A, b) + x.pow(4).sum() / 4


def exponential(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (A @ x / 4).exp().sum() + x.square().sum() - b @ x


def saturating(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (1 + (A @ x - b).square()).sqrt().sum() + x.square().sum()


def gentle(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Of curvature between 2 and 3, if A is between 1 and 2."""
    return (1 + (A @ x / 2 - b).square()).sqrt().sum() + x.square().sum()


def misfit(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """As many residuals as unknowns, and once more as many for the regularizer."""
    return torch.cat([(A @ x).sinh() / 2 - b, x])


def residual(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """A Jacobian that is not symmetric where A is not, between A and A + I."""
    return A @ x + x.tanh() - b


def mapping(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (A @ x / 8).tanh() + b


class Posed(NamedTuple):
    """A problem: its entry point, its function of x, A and b, and which A it is for."""

    entry: Callable[..., il.Solution]
    function: Callable[..., Any]
    matrices: Callable[..., Any]
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's field, read only

    def check(
        self, solver: Callable[[float], Any], adjoint: Callable[[float], Any], dtype: torch.dtype, tol: Any = None
    ) -> Check:
        """The check of one way to solve and differentiate it, given the tolerance of both."""

        def layer(A: Tensor, b: Tensor) -> Any:
            # By the type that comes in: differences for float32 are taken in float64, and solved as tightly as that.
            t, start = tight(b.dtype), torch.zeros_like(b)
            return self.entry(self.function, start, A, b, solver=solver(t), adjoint=adjoint(t), **self.options).value

        inputs = systems(self.matrices(dtype=dtype, max_size=3))
        return _layer(layer, inputs, tol)


mild_spd = partial(strategies.spd_matrices, condition=4.0)
mild = partial(strategies.matrices, condition=4.0)

MINIMA = {
    objective.__name__: Posed(il.argmin, objective, strategies.spd_matrices)
    for objective in (quadratic, ridge, quartic, exponential, saturating)
}
GENTLE = Posed(il.argmin, gentle, partial(strategies.spd_matrices, condition=2.0))
FIT = Posed(il.least_squares, misfit, mild)
ROOT = Posed(il.root, residual, mild_spd)
SKEWED = Posed(il.root, residual, mild)
POINT = Posed(il.fixed_point, mapping, mild)


# --- the tables -----------------------------------------------------------------------------------


def solvers() -> Rows:
    """Every solver on problems that it is for, differentiated by the implicit function theorem."""
    for d, dtype in DTYPES.items():
        for s, make in FAST.items():
            for o, posed in MINIMA.items():
                yield f"{o} by {s}, {d}", posed.check(make, _automatic, dtype)
        for s, make in {**OTHERS, **SLOW}.items():
            yield f"gentle by {s}, {d}", GENTLE.check(make, _automatic, dtype)
        for s, make in BY_VALUES.items():
            # Values that scatter by 1e-5 have differences good to 1e-4, those in float32 by 4e-3 derivatives to 1e-2.
            yield f"gentle by {s}, {d}", GENTLE.check(make, _automatic, dtype, tol=1e-2 if dtype == F64 else 5e-2)
        for what, table, posed in (
            ("least squares", FITS, FIT), ("root", ROOTS, ROOT), ("fixed point", POINTS, POINT),
        ):  # fmt: skip
            for s, make in table.items():
                yield f"{what} by {s}, {d}", posed.check(make, _automatic, dtype)


def _automatic(t: float) -> Any:
    return il.Implicit(il.Auto(rtol=t))


def _newton(t: float) -> Any:
    return il.Newton(il.Dense(), **kept(t))


def _implicit(make: Callable[[float], Any]) -> Callable[[float], Any]:
    return lambda t: il.Implicit(make(t))


def _warm(t: float) -> Any:
    return il.Implicit(il.CG(rtol=t), warm_start=True)


def _steps(t: float) -> Any:
    """The derivative of the path converges after the path: a fixed number of steps is enough for both."""
    # Every trial is evaluated and recorded in a fixed number of steps.
    return il.Newton(il.Dense(), il.Armijo(max_steps=2), rtol=None, atol=None, max_steps=6)


def adjoints() -> Rows:
    """Every way to differentiate, after a solve by Newton's method."""
    for d, dtype in DTYPES.items():
        for a, make in {**SYMMETRIC, **GENERAL}.items():
            yield f"gentle, Implicit({a}), {d}", GENTLE.check(_newton, _implicit(make), dtype)
        for a, make in GENERAL.items():
            yield f"root, Implicit({a}), {d}", ROOT.check(_newton, _implicit(make), dtype)
        yield f"quartic, warm start, {d}", MINIMA["quartic"].check(_newton, _warm, dtype)
        yield f"quartic, OneStep, {d}", MINIMA["quartic"].check(_newton, lambda t: il.OneStep(), dtype)
        yield f"root, OneStep, {d}", ROOT.check(_newton, lambda t: il.OneStep(), dtype)
        yield f"ridge, Unrolled, {d}", MINIMA["ridge"].check(_steps, lambda t: il.Unrolled(), dtype)
        yield f"ridge, Unrolled(last=2), {d}", MINIMA["ridge"].check(_steps, lambda t: il.Unrolled(last=2), dtype)
    for order in (1, 2):
        for a, make in {"CG": SYMMETRIC["CG"], "Dense": GENERAL["Dense"]}.items():
            name = f"Implicit({a}) as an adjoint, order {order}"
            yield name, partial(_adjoint, il.Implicit(make(tight(F64))), order, F64)
            yield f"{name}, float32", partial(_adjoint, il.Implicit(make(tight(F32))), order, F32)


def linear_solvers() -> Rows:
    """Every linear solver by itself and as a layer."""
    for d, dtype in DTYPES.items():
        t = max(tight(dtype), 1e-12)
        for kind, table, drawn in (
            ("symmetric", {**SYMMETRIC, **GENERAL}, strategies.spd_matrices), ("general", GENERAL, strategies.matrices),
        ):  # fmt: skip
            for name, make in table.items():
                solver, matrices = make(t), suited(name, drawn(dtype=dtype))
                yield f"{name}, {kind}, {d}", partial(_linear_solver, solver, matrices, dtype)
        for name, make in GENERAL.items():

            def layer(A: Tensor, b: Tensor, solver: Any = make(t)) -> Any:
                return il.linear_solve(A, b, solver=solver, symmetric=False).value

            matrices = suited(name, strategies.matrices(dtype=dtype, max_size=3))
            yield f"linear_solve by {name}, {d}", _layer(layer, systems(matrices))


def solvers_alone() -> Rows:
    """`check_solver` on every solver."""
    for d, dtype in DTYPES.items():
        t = 1e-8 if dtype == F64 else 1e-5
        # Of every curvature: for the solvers that find their own steps.
        default = strategies.strongly_convex_problems(dtype=dtype)
        own = ("gradient descent with Armijo", "L-BFGS with Wolfe", "accelerated proximal gradient")
        for name, make in {**FAST, **{name: OTHERS[name] for name in own}}.items():
            yield f"{name} as a solver, {d}", partial(_solver, make(t), default, dtype)
        for name, make in POINTS.items():
            points = strategies.contractions(dtype=dtype)
            yield f"{name} as a solver of fixed points, {d}", partial(_solver, make(t), points, dtype)


def regularized() -> Rows:
    """Every regularizer, in what is regularized and in its own strength."""
    # Odd sixteenths keep away from where a bound, a radius or a threshold that is a multiple of 1/8 becomes active.
    numbers = st.integers(-16, 15).map(lambda k: (2 * k + 1) / 16)
    strengths = st.integers(1, 8).map(lambda k: k / 8)
    table: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "Ridge": lambda z, lam: il.Ridge(lam),
        "Proximal": lambda z, lam: il.Proximal(z.cos(), lam),
        "Penalty": lambda z, lam: il.Penalty(lambda x: lam * (1 + x.square()).sqrt().sum()),
        "Lasso": lambda z, lam: il.Lasso(lam),
        "ElasticNet": lambda z, lam: il.ElasticNet(lam, 0.5),
        "GroupLasso": lambda z, lam: il.GroupLasso(lam),
        "Box": lambda z, lam: il.Box(-lam, lam),
        "NonNegative": lambda z, lam: il.NonNegative(),
        "Simplex": lambda z, lam: il.Simplex(lam),
        "L1Ball": lambda z, lam: il.L1Ball(lam),
        "L2Ball": lambda z, lam: il.L2Ball(lam),
    }
    for d, dtype in DTYPES.items():
        vectors = strategies.tensors(st.sampled_from([(1,), (2,), (3,)]), dtype=dtype, elements=numbers)
        inputs = st.tuples(vectors, strategies.tensors((), dtype=dtype, elements=strengths))
        for name, make in table.items():

            def layer(z: Tensor, lam: Tensor, make: Any = make, t: float = tight(dtype)) -> Any:
                solver = il.ProximalGradient(accelerated=False, step_size=0.7, **kept(t))
                adjoint = il.Implicit(il.Auto(rtol=t))
                start = torch.zeros_like(z)
                return il.argmin(
                    _distance, start, z, regularizer=make(z, lam), solver=solver, adjoint=adjoint
                ).value + 0 * lam  # fmt: skip

            yield f"{name}, {d}", _layer(layer, inputs)


def programs() -> Rows:
    """Quadratic programs, with equality and with inequality constraints."""

    def equality(Q: Tensor, q: Tensor) -> Tensor:
        ones = torch.ones(1, len(q), dtype=q.dtype)
        return il.quadratic_program((Q + Q.mT) / 2, q, A=ones, b=ones[:, 0]).value.x

    def inequality(Q: Tensor, q: Tensor) -> Tensor:
        eye = torch.eye(len(q), dtype=q.dtype)
        return il.quadratic_program((Q + Q.mT) / 2, q, G=-eye, h=eye[0] / 16).value.x

    for name, layer in {"equality": equality, "inequality": inequality}.items():
        inputs = systems(strategies.spd_matrices(max_size=3))
        yield f"quadratic program, {name}, float64", _layer(layer, inputs)


def _distance(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum() / 2


def _layer(layer: Any, inputs: Any, tol: float | None = None) -> Check:
    return lambda examples: check_layer(layer, inputs, tol=tol, max_examples=examples)


def _linear_solver(solver: Any, matrices: Any, dtype: torch.dtype, examples: int) -> Any:
    return check_linear_solver(solver, matrices=matrices, dtype=dtype, max_examples=examples)


def _solver(solver: Any, drawn: Any, dtype: torch.dtype, examples: int) -> Any:
    return check_solver(solver, problems=drawn, dtype=dtype, max_examples=examples)


def _adjoint(adjoint: Any, order: Any, dtype: torch.dtype, examples: int) -> Any:
    return check_adjoint(adjoint, order=order, dtype=dtype, max_examples=examples)


TABLES: dict[str, Callable[[], Rows]] = {
    "solvers": solvers,
    "adjoints": adjoints,
    "linear solvers": linear_solvers,
    "solvers alone": solvers_alone,
    "regularizers": regularized,
    "quadratic programs": programs,
}
"""Groups of right layers by what varies in them."""
