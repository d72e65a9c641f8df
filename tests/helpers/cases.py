"""The transform table: layouts of the unknown × how the parameters enter × solvers, and the transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.utils import _pytree as pytree

import implicitlayers as il
from tests.helpers.problems import F64, coupled, each, newton, normal

# Second-order-accurate solves: the residual falls to rounding, and the linear solve of the derivative with it. Every
# quantity of these problems is of order one, so that an absolute tolerance is a relative one.
TOL = 1e-9
TIGHT = {"rtol": 1e-13, "atol": 1e-13}
ADJOINT = il.Implicit(il.CG(rtol=1e-13), on_failure="raise")

THETA = normal(3, seed=1)
BATCH = normal(4, 3, seed=2)

SOLVERS = {
    "gradient": il.GradientDescent(lr=0.2, **TIGHT),
    "momentum": il.GradientDescent(lr=0.1, momentum=0.5, **TIGHT),
    "nesterov": il.GradientDescent(lr=0.1, momentum=0.5, nesterov=True, **TIGHT),
    # Near the minimum the search sees rounding only and accepts every first trial: that must contract by itself.
    "gradient-armijo": il.GradientDescent(lr=0.2, line_search=il.Armijo(), **TIGHT),
    "lbfgs": il.LBFGS(**TIGHT),
    "newton-cg": il.Newton(il.CG(rtol=1e-10), **TIGHT),
    "newton-dense": il.Newton(il.Dense(), **TIGHT),
}

LAYOUTS = {
    "tensor": torch.zeros(3, dtype=F64),
    "0-d": torch.zeros((), dtype=F64),
    "size-1": torch.zeros(1, dtype=F64),
    "mixed": {"w": torch.zeros(1, 2, dtype=F64), "b": torch.zeros((), dtype=F64), "rest": (torch.zeros(1, dtype=F64),)},
}


def flat(tree: Any) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


class Coupled(nn.Module):
    """The objective as a module whose parameter is θ."""

    def __init__(self, theta: torch.Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x: Any) -> torch.Tensor:
        return coupled(flat(x), self.theta)


MODULE = Coupled(torch.zeros(3, dtype=F64))


def _explicit(theta):
    return (lambda x, t: coupled(flat(x), t)), (theta,)


def _tree_of_params(theta):
    return (lambda x, t: coupled(flat(x), torch.cat([t["head"], t["tail"][0]]))), (
        {"head": theta[:1], "tail": (theta[1:], "not a tensor")},
    )


def _captured(theta):
    return (lambda x: coupled(flat(x), theta)), ()


def _non_leaf(theta):
    doubled = theta * 2
    return (lambda x: coupled(flat(x), doubled / 2)), ()


def _functional_module(theta):
    return (lambda x: functional_call(MODULE, {"theta": theta}, (x,))), ()


def _half_captured(theta):
    head = theta[:1]
    return (lambda x, tail: coupled(flat(x), torch.cat([head, tail]))), (theta[1:],)


def _both_passed_and_captured(theta):
    return (lambda x, t: coupled(flat(x), (t + theta) / 2)), (theta,)


ENTRIES: dict[str, Callable[[torch.Tensor], tuple[Callable[..., torch.Tensor], tuple[Any, ...]]]] = {
    "explicit": _explicit,
    "tree": _tree_of_params,
    "captured": _captured,
    "non-leaf": _non_leaf,
    "module": _functional_module,
    "half-captured": _half_captured,
    "passed-and-captured": _both_passed_and_captured,
}


@dataclass(frozen=True)
class Case:
    """One way to pose the problem."""

    layout: str
    entry: str
    solver: str

    def __str__(self) -> str:
        return f"{self.layout}-{self.entry}-{self.solver}"

    def layer(self, theta: torch.Tensor) -> torch.Tensor:
        """The minimizer as one flat vector."""
        objective, params = ENTRIES[self.entry](theta)
        solution = il.argmin(objective, LAYOUTS[self.layout], *params, solver=SOLVERS[self.solver], adjoint=ADJOINT)
        return flat(solution.value)

    def oracle(self, theta: torch.Tensor) -> torch.Tensor:
        return newton(coupled, flat(LAYOUTS[self.layout]), theta)


# Every layout with every solver or every entry at least once; the full product says nothing more.
CASES = [
    *(Case(layout, entry, "newton-cg") for layout in LAYOUTS for entry in ("explicit", "captured")),
    *(Case("tensor", entry, "newton-dense") for entry in ENTRIES if entry not in ("explicit", "captured")),
    *(Case("tensor", "explicit", solver) for solver in SOLVERS if solver != "newton-cg"),
    *(Case("mixed", "module", solver) for solver in ("gradient", "lbfgs", "newton-dense")),
    Case("0-d", "half-captured", "lbfgs"),
]


def loss(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A scalar with curvature of its own on top of the layer."""
    return lambda theta: f(theta).sin().sum()


def _line(f):
    """θ ↦ along a line, for derivatives of high order."""
    return lambda c: f(THETA * c).sum()


def _backward(f):
    leaf = THETA.clone().requires_grad_()
    loss(f)(leaf).backward()
    return leaf.grad


def _double_backward(f):
    leaf = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(leaf), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


def _backward_through_vmap(f):
    leaf = BATCH.clone().requires_grad_()
    return torch.autograd.grad(vmap(f)(leaf).sin().sum(), leaf)[0]


def _double_backward_through_vmap(f):
    leaf = BATCH.clone().requires_grad_()
    (first,) = torch.autograd.grad(vmap(f)(leaf).sin().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


ONE = torch.tensor(1.3, dtype=F64)

# name: (the transform of our layer, the same quantity of the oracle by another route where there is one)
TRANSFORMS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "value": (lambda f: f(THETA), lambda f: f(THETA)),
    "jacrev": (lambda f: jacrev(f)(THETA), lambda f: jacfwd(f)(THETA)),
    "jacfwd": (lambda f: jacfwd(f)(THETA), lambda f: jacrev(f)(THETA)),
    "backward": (_backward, lambda f: grad(loss(f))(THETA)),
    "hessian": (lambda f: hessian(loss(f))(THETA), lambda f: jacrev(jacrev(loss(f)))(THETA)),
    "jacrev-jacrev": (lambda f: jacrev(jacrev(f))(THETA), lambda f: jacfwd(jacrev(f))(THETA)),
    "jacrev-jacfwd": (lambda f: jacrev(jacfwd(f))(THETA), lambda f: jacrev(jacrev(f))(THETA)),
    "jacfwd-jacrev": (lambda f: jacfwd(jacrev(f))(THETA), lambda f: jacrev(jacrev(f))(THETA)),
    "jacfwd-jacfwd": (lambda f: jacfwd(jacfwd(f))(THETA), lambda f: jacrev(jacrev(f))(THETA)),
    "double-backward": (
        _double_backward,
        lambda f: grad(lambda t: grad(loss(f))(t).square().sum())(THETA),
    ),
    "batched-cotangents": (lambda f: functional.jacobian(f, THETA, vectorize=True), lambda f: jacfwd(f)(THETA)),
    "batched-cotangents-hessian": (
        lambda f: functional.hessian(loss(f), THETA, vectorize=True),
        lambda f: jacrev(jacrev(loss(f)))(THETA),
    ),
    "third": (lambda f: grad(grad(grad(_line(f))))(ONE), lambda f: jacfwd(grad(grad(_line(f))))(ONE)),
    "third-forward": (lambda f: jacfwd(jacfwd(jacfwd(_line(f))))(ONE), lambda f: grad(grad(grad(_line(f))))(ONE)),
    "third-mixed": (lambda f: jacfwd(jacrev(jacfwd(_line(f))))(ONE), lambda f: grad(grad(grad(_line(f))))(ONE)),
    "vmap": (lambda f: vmap(f)(BATCH), lambda f: each(f, BATCH)),
    "vmap-last": (lambda f: vmap(f, in_dims=1, out_dims=1)(BATCH.T), lambda f: each(f, BATCH).T),
    "vmap-vmap": (lambda f: vmap(vmap(f))(BATCH.reshape(2, 2, 3)), lambda f: each(f, BATCH).reshape(2, 2, -1)),
    "vmap-jacrev": (lambda f: vmap(jacrev(f))(BATCH), lambda f: each(jacfwd(f), BATCH)),
    "vmap-jacfwd": (lambda f: vmap(jacfwd(f))(BATCH), lambda f: each(jacrev(f), BATCH)),
    "vmap-hessian": (lambda f: vmap(hessian(loss(f)))(BATCH), lambda f: each(jacrev(jacrev(loss(f))), BATCH)),
    "grad-vmap": (
        lambda f: grad(lambda b: vmap(f)(b).sin().sum())(BATCH),
        lambda f: each(grad(loss(f)), BATCH),
    ),
    "hessian-vmap": (
        lambda f: hessian(lambda c: vmap(f)(BATCH * c).sin().sum())(ONE),
        lambda f: grad(grad(lambda c: each(f, BATCH * c).sin().sum()))(ONE),
    ),
    "backward-through-vmap": (_backward_through_vmap, lambda f: each(grad(loss(f)), BATCH)),
    "double-backward-through-vmap": (
        _double_backward_through_vmap,
        lambda f: each(grad(lambda t: grad(loss(f))(t).square().sum()), BATCH),
    ),
}


@functools.cache
def truth(layout: str, transform: str) -> torch.Tensor:
    """What the oracle says; it depends on the layout of the unknown alone, so each is computed once a process."""
    return TRANSFORMS[transform][1](Case(layout, "explicit", "newton-cg").oracle).detach()


def check(case: Case, transform: str) -> None:
    """Compare one cell of the table with the oracle."""
    ours = TRANSFORMS[transform][0](case.layer)
    expected = truth(case.layout, transform)
    assert expected.abs().max() > 1e-3, "the oracle is trivial here and would pass a layer without derivative"
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOL)


def cells(*transforms: str) -> Any:
    """Parametrize a test over all cases and these transforms."""
    found = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in transforms]
    return pytest.mark.parametrize(("case", "transform"), found)
