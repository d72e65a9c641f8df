"""200 layers that are right: this library's, PyTorch's, closed forms, and the hand-written ones without their bug."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import torch

import implicitlayers as il
from implicitlayers.testing import check_adjoint, check_layer, check_linear_solver, check_solver, problems, strategies
from tests.testing.planted import PLANTED, positive, run, systems

F32, F64 = torch.float32, torch.float64
DTYPES = {"float64": F64, "float32": F32}

Check = Callable[[int], Any]


def tight(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == F64 else 1e-6


# A new solver, linear solver or adjoint needs a line here.
SOLVERS: dict[str, Callable[[float], Any]] = {
    "LBFGS": lambda t: il.LBFGS(rtol=t, atol=t),
    "Newton-CG": lambda t: il.Newton(il.CG(rtol=1e-10), rtol=t, atol=t),
    "Newton-Dense": lambda t: il.Newton(il.Dense(), rtol=t, atol=t),
    "gradient descent": lambda t: il.GradientDescent(lr=0.1, line_search=il.Armijo(), rtol=t, atol=t),
}
LINEAR_SOLVERS: dict[str, Callable[[float], Any]] = {
    "CG": lambda t: il.CG(rtol=t),
    "Dense": lambda t: il.Dense(),
}
ADJOINTS: dict[str, Callable[[float], Any]] = {
    "Implicit(CG)": lambda t: il.Implicit(il.CG(rtol=t)),
    "Implicit(Dense)": lambda t: il.Implicit(il.Dense()),
}


def quadratic(x, A, b):
    return x @ A @ x / 2 - b @ x


def ridge(x, A, b):
    return (A @ x - b).square().sum() / 2 + x.square().sum() / 2


def quartic(x, A, b):
    return quadratic(x, A, b) + x.pow(4).sum() / 4


def exponential(x, A, b):
    return (A @ x / 4).exp().sum() + x.square().sum() - b @ x


def saturating(x, A, b):
    return (1 + (A @ x - b).square()).sqrt().sum() + x.square().sum()


OBJECTIVES = {
    "quadratic": quadratic, "ridge": ridge, "quartic": quartic, "exponential": exponential, "saturating": saturating,
}  # fmt: skip


def argmin_layer(objective: Any, solver: Any, adjoint: Any) -> Callable[..., Any]:
    """The minimizer over x of a function of x, A and b."""
    return lambda A, b: il.argmin(objective, torch.zeros_like(b), A, b, solver=solver, adjoint=adjoint).value


def of_this_library() -> dict[str, Check]:
    table = {}
    for (s, solver), (a, adjoint), (o, objective), (d, dtype) in itertools.product(
        SOLVERS.items(), ADJOINTS.items(), OBJECTIVES.items(), DTYPES.items()
    ):
        layer = argmin_layer(objective, solver(tight(dtype)), adjoint(tight(dtype)))
        inputs = systems(strategies.spd_matrices(dtype=dtype, max_size=3))
        table[f"{o} by {s}, {a}, {d}"] = partial(_layer, layer, inputs)
    for (name, make), (d, dtype) in itertools.product(LINEAR_SOLVERS.items(), DTYPES.items()):
        for condition in (1.0, 10.0, 100.0):
            matrices = strategies.spd_matrices(condition=condition, dtype=dtype)
            table[f"{name}, condition {condition:.0f}, {d}"] = partial(
                _linear_solver, make(max(tight(dtype), 1e-12)), matrices, dtype
            )
    for (name, make), (d, dtype) in itertools.product(SOLVERS.items(), DTYPES.items()):
        table[f"{name} as a solver, {d}"] = partial(_solver, make(1e-8 if dtype == F64 else 1e-5), dtype)
    for (name, make), order in itertools.product(ADJOINTS.items(), (1, 2)):
        table[f"{name} as an adjoint, order {order}"] = partial(_adjoint, make(1e-13), order)
    return table


def of_pytorch() -> dict[str, Check]:
    table = {}
    for d, dtype in DTYPES.items():
        square = strategies.matrices(dtype=dtype, max_size=3)
        spd = strategies.spd_matrices(dtype=dtype, max_size=3)
        vectors = strategies.tensors(st.sampled_from([(1,), (3,)]), dtype=dtype)
        layers: dict[str, tuple[Any, Any]] = {
            "linalg.solve": (torch.linalg.solve, systems(square)),
            "linalg.inv": (torch.linalg.inv, square),
            "linalg.det": (torch.linalg.det, square),
            "linalg.slogdet": (lambda A: torch.linalg.slogdet(A)[1], square),
            "linalg.matrix_exp": (lambda A: torch.linalg.matrix_exp(A / 4), square),
            "linalg.cholesky": (lambda A: torch.linalg.cholesky((A + A.mT) / 2), spd),
            "linalg.pinv": (torch.linalg.pinv, square),
            "linalg.qr": (torch.linalg.qr, square),
            "logsumexp": (lambda x: x.logsumexp(0), vectors),
            "softmax": (lambda x: x.softmax(0), vectors),
            "sin": (torch.sin, vectors),
            "tanh": (torch.tanh, vectors),
            "matmul": (lambda A, b: A @ b, systems(square)),
            "log_softmax": (lambda x: x.log_softmax(0), vectors),
            "softplus": (torch.nn.functional.softplus, vectors),
            "gelu": (torch.nn.functional.gelu, vectors),
            "erf": (torch.erf, vectors),
            "sigmoid": (torch.sigmoid, vectors),
            "silu": (torch.nn.functional.silu, vectors),
            "cumsum": (lambda x: x.cumsum(0), vectors),
            "logcumsumexp": (lambda x: x.logcumsumexp(0), vectors),
            "einsum": (lambda A, b: torch.einsum("ij,j,i->i", A, b, b), systems(square)),
            "solve_triangular": (
                lambda A, b: torch.linalg.solve_triangular(A.tril() + 0 * A, b[:, None], upper=False),
                systems(spd),
            ),
            "outer": (lambda A, b: torch.outer(b, b) + A, systems(square)),
            "lu_solve": (
                lambda A, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), b[:, None]),
                systems(square),
            ),
            "norm": (lambda x: (x.square().sum() + 1).sqrt(), vectors),
        }
        for name, (layer, inputs) in layers.items():
            table[f"torch {name}, {d}"] = partial(_layer, layer, inputs)
    return table


def of_closed_forms() -> dict[str, Check]:
    table = {}
    for name, problem in problems.CLOSED_FORMS.items():
        near = problem.params[problem.argnum]
        # Small enough to stay on the same active set.
        nudges = strategies.tensors(tuple(near.shape), elements=st.integers(-4, 4).map(lambda k: k / 256))

        def layer(p: Any, problem: Any = problem) -> Any:
            before, after = problem.params[: problem.argnum], problem.params[problem.argnum + 1 :]
            return problem.solution(*before, p, *after)

        table[f"closed form: {name}"] = partial(_tape_only, layer, nudges.map(near.__add__))
    for d, dtype in DTYPES.items():
        inputs = st.tuples(positive(2), strategies.tensors((2,))).map(
            lambda pair, dtype=dtype: tuple(t.to(dtype) for t in pair)
        )
        table[f"division, {d}"] = partial(_layer, torch.div, inputs)
    return table


def written_by_hand() -> dict[str, Check]:
    return {
        f"by hand, without: {name}": partial(run, right, inputs, options)
        for name, (_, right, inputs, options) in PLANTED.items()
    }


def _layer(layer: Any, inputs: Any, max_examples: int) -> Any:
    return check_layer(layer, inputs, max_examples=max_examples)


def _tape_only(layer: Any, inputs: Any, max_examples: int) -> Any:
    """Solutions that look at values, and so have no vmap, nor a derivative through their Newton steps."""
    return check_layer(layer, inputs, modes=("reverse",), max_examples=max_examples)


def _linear_solver(solver: Any, matrices: Any, dtype: torch.dtype, max_examples: int) -> Any:
    return check_linear_solver(solver, matrices=matrices, dtype=dtype, max_examples=max_examples)


def _solver(solver: Any, dtype: torch.dtype, max_examples: int) -> Any:
    return check_solver(solver, dtype=dtype, max_examples=max_examples)


def _adjoint(adjoint: Any, order: Any, max_examples: int) -> Any:
    return check_adjoint(adjoint, order=order, max_examples=max_examples)


CORRECT: dict[str, Check] = {**written_by_hand(), **of_pytorch(), **of_closed_forms(), **of_this_library()}
"""Every right layer by its name, with the check that it must pass on any number of examples."""
