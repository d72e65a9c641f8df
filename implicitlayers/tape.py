"""First and second derivatives on PyTorch's own tape, for solves that are not recorded themselves.

Inside a Function's forward nothing is differentiated from outside, so no transform is needed: the plain tape is cheaper
in Python, and a graph built once serves any number of products, also through Functions nested in the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["gauss_newton", "gradient", "hessian", "jacobian", "transposed_jacobian"]


def gradient(value: Tensor, x: Tensor, *, keep: bool = False) -> Tensor:
    """Gradient of a 0-d value; zero where it does not depend on `x`. With `keep` it can be differentiated again."""
    return _pull([value], x, [torch.ones_like(value)], keep=keep, again=keep)


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return y ↦ ∇²f(x) y, the gradient's graph being built once: a product is one backward pass through it."""
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        g = gradient(f(z), z, keep=True)
    return lambda y: _pull([g], z, [y], again=True)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return y ↦ J y with J = ∂f/∂x, the graph of wᵀJ being built once.

    wᵀJ is linear in w, and its derivative along y is J y: the transpose of the transpose, by reverse mode alone.
    """
    at = x.detach().requires_grad_()
    with torch.enable_grad():
        z = f(at)
        w = torch.zeros_like(z).requires_grad_()
        pulled = _pull([z], at, [w], keep=True, again=True)
    return lambda y: _pull([pulled], w, [y], again=True)


def transposed_jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return y ↦ Jᵀ y with J = ∂f/∂x, the graph being built once."""
    at = x.detach().requires_grad_()
    with torch.enable_grad():
        z = f(at)
    return lambda y: _pull([z], at, [y], again=True)


def gauss_newton(
    model: Callable[[Tensor], Any], loss: Callable[[Any], Tensor], x: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return y ↦ Jᵀ B J y with J = ∂model/∂x and B = ∂²loss/∂z² at z = model(x); all three graphs are built once."""
    at = x.detach().requires_grad_()
    with torch.enable_grad():
        z = pytree.tree_leaves(tree := model(at))
        w = [torch.zeros_like(leaf).requires_grad_() for leaf in z]
        transposed = _pull(z, at, w, keep=True, again=True)
        outputs = [leaf.detach().requires_grad_() for leaf in z]
        value = loss(pytree.tree_unflatten(outputs, pytree.tree_structure(tree)))
        slopes = torch.autograd.grad(value, outputs, create_graph=True, materialize_grads=True)

    def product(y: Tensor) -> Tensor:
        Jy = _pull_each([transposed], w, [y])
        BJy = _pull_each(slopes, outputs, Jy)
        return _pull(z, at, BJy, again=True)

    return product


def _pull(
    outputs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], *, keep: bool = False, again: bool
) -> Tensor:
    return _pull_each(outputs, [x], weights, keep=keep, again=again)[0]


def _pull_each(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    keep: bool = False,
    again: bool = True,
) -> Sequence[Tensor]:
    """Vector-Jacobian products on the tape; outputs that are constant have no tape and contribute zero."""
    taped = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not taped:
        return [torch.zeros_like(i) for i in inputs]
    live, theirs = zip(*taped, strict=True)
    return torch.autograd.grad(live, inputs, theirs, create_graph=keep, retain_graph=again, materialize_grads=True)
