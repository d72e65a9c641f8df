"""The inner problem: learn one task from its support images, by any solver, with any derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml import networks
from applications.imaml.algorithms.strength import network_of, strengths
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters

__all__ = ["adapt", "implicit"]


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
        config: the inner problem and its solver.
        adjoint: how the solution is differentiated; by the implicit function theorem, as ``config`` says, if None.
        start: where the solver starts; at ``theta`` if None.

    Returns:
        The solution; its value is the task's parameters.
    """
    anchor, lam = network_of(theta), strengths(theta, config)
    start = anchor if start is None else start
    how: dict[str, Any] = {
        "solver": _SOLVERS[config.inner](config) if config.inner in _SOLVERS else _torch_optimizer(config),
        "adjoint": implicit(config) if adjoint is None else adjoint,
        # A solver that runs a fixed number of steps has no convergence to speak of, and a task on which it fails must
        # not end a run of hours: it shows in the metrics.
        "on_failure": "ignore",
    }
    if config.algorithm != "anil":
        pull = il.Proximal(anchor, lam)
        data = task.support_images, task.support_labels
        return il.argmin(_SUPPORT_LOSS, start, *data, regularizer=pull, **how)
    last, features = _head(anchor), networks.features(anchor, task.support_images)
    pull = il.Proximal(last, lam if isinstance(lam, Tensor | float) else _head(lam))
    solution = il.argmin(_HEAD_LOSS, _head(start), features, task.support_labels, regularizer=pull, **how)
    return replace(solution, value={**anchor, **solution.value})


def implicit(config: Config) -> il.Implicit:
    """The derivative by the implicit function theorem.

    Args:
        config: its linear system.

    Returns:
        The adjoint.
    """
    return il.Implicit(
        linear_solver=_conjugate_gradients(config),
        damping=config.damping,
        curvature="gauss_newton" if config.curvature == "gauss-newton" else "hessian",
        on_failure="ignore",
    )


def _head(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parameters[name] for name in networks.HEAD}


def _logits(phi: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return networks.forward(phi, images)


def _logits_of_features(phi: Parameters, features: Tensor, labels: Tensor) -> Tensor:
    return networks.head(phi, features)


def _mean_cross_entropy(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


# Declared in two parts, which is what Gauss-Newton curvature is made from.
_SUPPORT_LOSS = il.Composite(_logits, _mean_cross_entropy)
_HEAD_LOSS = il.Composite(_logits_of_features, _mean_cross_entropy)


def _conjugate_gradients(config: Config) -> il.CG:
    # A fixed number of steps, so that nothing waits for the device to say whether it has converged.
    return il.CG(rtol=None, atol=None, max_steps=config.cg_steps)


def _gradient(config: Config) -> il.Solver[Any]:
    return il.GradientDescent(lr=config.inner_lr, rtol=None, atol=None, max_steps=config.inner_steps)


def _adam(config: Config) -> il.Solver[Any]:
    return il.Adam(lr=config.inner_lr, rtol=None, atol=None, max_steps=config.inner_steps)


# A tolerance of 0 is never met, so all steps are taken; but unlike without a tolerance, the line search may look at its
# trials and stop at the first that will do.
def _hessian_free(config: Config) -> il.Solver[Any]:
    directions, search = _conjugate_gradients(config), il.Armijo()
    return il.Newton(linear_solver=directions, line_search=search, rtol=0.0, atol=0.0, max_steps=config.inner_steps)


def _lbfgs(config: Config) -> il.Solver[Any]:
    return il.LBFGS(rtol=0.0, atol=0.0, max_steps=config.inner_steps)


def _torch_optimizer(config: Config) -> il.Solver[Any]:
    optimizer = getattr(torch.optim, config.inner.removeprefix("torch."))
    return il.TorchOptimizer(
        lambda params: optimizer(params, lr=config.inner_lr), rtol=None, atol=None, max_steps=config.inner_steps
    )


_SOLVERS: Mapping[str, Callable[[Config], il.Solver[Any]]] = MappingProxyType(
    {"gradient": _gradient, "adam": _adam, "hessian-free": _hessian_free, "lbfgs": _lbfgs}
)
