"""What the tests of penalties with kinks and of constraints share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.func import grad

import implicitlayers as il
from implicitlayers.flat import Structure
from tests.helpers.cases import TIGHT, flat
from tests.helpers.problems import F64, newton

PROXIMAL = il.ProximalGradient(**TIGHT)


def nonsmooth_of(regularizer: il.Regularizer, like: Any) -> tuple[Any, list[torch.Tensor]]:
    """The part with kinks or constraints for an unknown like this tree, and its tensors."""
    pieces = regularizer.pose(Structure.of(like), flat(like), 0)
    return pieces.nonsmooth, pieces.tensors


def prox(regularizer: il.Regularizer, y: Any, step: float = 1.0) -> torch.Tensor:
    """The proximal map of a tree, flat."""
    nonsmooth, tensors = nonsmooth_of(regularizer, y)
    vector = flat(y)
    return nonsmooth.prox(vector, torch.as_tensor(step, dtype=vector.dtype), *tensors)


def value(regularizer: il.Regularizer, x: Any) -> torch.Tensor:
    """The penalty."""
    nonsmooth, tensors = nonsmooth_of(regularizer, x)
    return nonsmooth.value(flat(x), *tensors)


def solve(objective: Any, x0: Any, *params: Any, regularizer: il.Regularizer, adjoint: Any = None) -> torch.Tensor:
    """The minimizer, flat."""
    adjoint = il.Implicit(on_failure="raise") if adjoint is None else adjoint
    return flat(il.argmin(objective, x0, *params, regularizer=regularizer, solver=PROXIMAL, adjoint=adjoint).value)


def projected_onto_simplex(y: torch.Tensor, total: Any = 1.0) -> torch.Tensor:
    """The nearest of the projections onto the affine hulls of all faces, by trying every support."""
    best = None
    for kept in itertools.product((False, True), repeat=len(y)):
        S = torch.tensor(kept)
        if not S.any():
            continue
        x = torch.where(S, y - (y[S].sum() - total) / S.sum(), torch.zeros_like(y))
        if bool((x >= 0).all()) and (best is None or (x - y).norm() < (best - y).norm()):
            best = x
    assert best is not None
    return best


def held(objective: Any, x: torch.Tensor, at: torch.Tensor, theta: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Minimize over the free coordinates alone, the others being held at `at`, which may depend on θ; by Newton.

    Args:
        objective: ``(x, theta) -> scalar``, smooth.
        x: the solution, where Newton's method starts.
        at: where the held coordinates are.
        theta: parameters.
        free: mask.
    """

    def restricted(z, packed):
        t, where = packed[: len(theta)], packed[len(theta) :]
        whole = torch.where(free, z, where)
        # The held coordinates of z have a minimum of their own, so that the Hessian is regular.
        return objective(whole, t) + torch.where(free, torch.zeros_like(z), z - where).square().sum() / 2

    return newton(restricted, x, torch.cat([theta, at]), steps=3)


def iterated(objective: Any, theta: torch.Tensor, map_of: Any, n: int = 3, steps: int = 300) -> torch.Tensor:
    """Proximal gradient steps of 0.1, written out; for supports, not for digits."""
    x, theta = torch.zeros(n, dtype=F64), theta.detach()
    slope = grad(objective)
    for _ in range(steps):
        x = map_of(x - 0.1 * slope(x, theta), 0.1, theta)
    return x.detach()
