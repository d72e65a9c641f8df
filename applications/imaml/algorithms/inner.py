"""The inner problem: learn one task from its support images, by any solver, with any derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml import networks
from applications.imaml.algorithms.curvature import conjugate_gradients, implicit
from applications.imaml.algorithms.strength import network_of, strengths
from applications.imaml.config import TORCH, Config
from applications.imaml.criterion import Criterion, criterion_of
from applications.imaml.episodes import Tasks
from applications.imaml.networks import HEAD, Parameters
from applications.imaml.products import Products

__all__ = ["adapt"]


def adapt(
    theta: Parameters,
    task: Tasks,
    config: Config,
    adjoint: il.Adjoint | None = None,
    start: Parameters | None = None,
) -> il.Solution:
    """Learn one task from its support images; differentiable in ``theta`` as ``adjoint`` says.

    Args:
        theta: meta-parameters.
        task: one task, without the leading dimension; its query images aren't looked at.
        config: the inner problem and its solver. ANIL's unknown is the last layer alone, on features that stay as they
            are; everyone else's is the network.
        adjoint: how the solution is differentiated; by the implicit function theorem, as ``config`` says, if None.
        start: where the solver starts; at ``theta`` if None.

    Returns:
        The solution; its value is the task's parameters, all of them.
    """
    anchor = network_of(theta)
    how, criterion = Products.of(config), criterion_of(config)
    objective, seen, unknown = _support_loss(how, criterion), task.support_images, tuple(anchor)
    if config.algorithm == "anil":
        objective, unknown = _head_loss(how, criterion), HEAD
        seen = networks.features(anchor, task.support_images, None, how)
    solution = il.argmin(
        objective,
        _chosen(anchor if start is None else start, unknown),
        seen,
        task.support_labels,
        regularizer=il.Proximal(_chosen(anchor, unknown), strengths(theta, unknown, config)),
        solver=_solver(config),
        adjoint=implicit(config) if adjoint is None else adjoint,
        # A solver that runs a fixed number of steps has no convergence to speak of, and a task on which it fails must
        # not end a run of hours: it shows in the metrics.
        on_failure="ignore",
    )
    return replace(solution, value={**anchor, **solution.value})


def _chosen(parameters: Parameters, names: Iterable[str]) -> Parameters:
    return {name: parameters[name] for name in names}


# Declared in two parts, which is what Gauss-Newton curvature is made from.
def _support_loss(how: Products, criterion: Criterion) -> il.Composite:
    return _composite(lambda phi, images: networks.forward(phi, images, None, how), criterion)


def _head_loss(how: Products, criterion: Criterion) -> il.Composite:
    return _composite(lambda phi, features: networks.head(phi, features, how), criterion)


def _composite(outputs: Callable[[Parameters, Tensor], Tensor], criterion: Criterion) -> il.Composite:
    return il.Composite(
        lambda phi, seen, targets: outputs(phi, seen), lambda found, seen, targets: criterion.loss(found, targets)
    )


def _solver(config: Config) -> il.Solver[Any]:
    if config.inner.startswith(TORCH):
        return _torch_optimizer(config)
    return _SOLVERS[config.inner](config)


def _gradient(config: Config) -> il.Solver[Any]:
    return il.GradientDescent(lr=config.inner_lr, rtol=None, atol=None, max_steps=config.inner_steps)


def _adam(config: Config) -> il.Solver[Any]:
    return il.Adam(lr=config.inner_lr, rtol=None, atol=None, max_steps=config.inner_steps)


# A tolerance of 0 is never met, so all steps are taken; but unlike without a tolerance, the line search may look at its
# trials and stop at the first that will do.
def _hessian_free(config: Config) -> il.Solver[Any]:
    directions, search = conjugate_gradients(config), il.Armijo()
    return il.Newton(linear_solver=directions, line_search=search, rtol=0.0, atol=0.0, max_steps=config.inner_steps)


def _lbfgs(config: Config) -> il.Solver[Any]:
    return il.LBFGS(rtol=0.0, atol=0.0, max_steps=config.inner_steps)


def _torch_optimizer(config: Config) -> il.Solver[Any]:
    optimizer = getattr(torch.optim, config.inner.removeprefix(TORCH))
    return il.TorchOptimizer(
        lambda params: optimizer(params, lr=config.inner_lr), rtol=None, atol=None, max_steps=config.inner_steps
    )


_SOLVERS: Mapping[str, Callable[[Config], il.Solver[Any]]] = MappingProxyType(
    {"gradient": _gradient, "adam": _adam, "hessian-free": _hessian_free, "lbfgs": _lbfgs}
)
