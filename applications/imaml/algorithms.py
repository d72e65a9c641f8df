"""Meta-learning algorithms: from meta-parameters and a batch of tasks to a loss whose gradient is the meta-gradient.

Each algorithm starts from the same inner problem (Rajeswaran et al., "Meta-Learning with Implicit Gradients", 2019,
equation 3): for meta-parameters theta, a task is learnt by

    phi*(theta) = argmin over phi of  L_support(phi) + lam/2 |phi - theta|^2,

and the meta-loss is the mean of L_query(phi*(theta)) over tasks. They differ in how phi* is differentiated. Nothing of
that is done here: ``implicitlayers.argmin`` solves the inner problem and carries the derivative. Everything below is
written for one task and mapped over the batch, so that the library solves all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.config import AlgorithmName, BatchNorm, Config
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters, batch_statistics, forward


@dataclass(frozen=True)
class Outcome:
    """What one evaluation of a meta-loss found; all but ``loss`` are for the record and carry no gradient.

    Args:
        loss: mean query loss of the tasks, 0-d; its gradient is the meta-gradient.
        query_loss: mean cross-entropy of each task's query images after adaptation, in nats, ``[tasks]``.
        query_accuracy: fraction of them classified rightly, ``[tasks]``.
        support_loss: the regularized loss of the support images where the inner solver last evaluated it, which with a
            fixed number of steps is before the last one.
        solution: how the inner solve went, one lane a task, without its value; its ``adjoint`` is filled once
            ``loss`` has been differentiated, if the algorithm solves a linear system.
    """

    loss: Tensor
    query_loss: Tensor
    query_accuracy: Tensor
    support_loss: Tensor
    solution: il.Solution


class MetaLoss(Protocol):
    """An algorithm."""

    def __call__(self, theta: Parameters, tasks: Tasks) -> Outcome:
        """Adapt to each task and judge the result.

        Args:
            theta: meta-parameters, leaves that require a gradient.
            tasks: the batch.

        Returns:
            The loss to differentiate with respect to ``theta``, and what it went through.
        """
        ...


def meta_loss(config: Config) -> MetaLoss:
    """The algorithm that a configuration names.

    Args:
        config: of the run.

    Returns:
        The algorithm.
    """
    return _ALGORITHMS[config.algorithm](config)


def adapt(theta: Parameters, task: Tasks, config: Config) -> il.Solution:
    """Learn one task from its support images; differentiable in ``theta``, as ``config`` says.

    Args:
        theta: meta-parameters.
        task: one task, without the leading dimension; its query images aren't looked at.
        config: inner solver and curvature.

    Returns:
        The solution; its value is the task's parameters.
    """
    return il.argmin(
        _SUPPORT_LOSS,
        theta,
        task.support_images,
        task.support_labels,
        regularizer=il.Proximal(theta, config.lam),
        solver=_solver(config),
        adjoint=_adjoint(config),
        # A solver that runs a fixed number of steps has no convergence to speak of, and a task on which it fails must
        # not end a run of hours: it shows in the metrics.
        on_failure="ignore",
    )


def query_logits(phi: Parameters, task: Tasks, batch_norm: BatchNorm, query_sets: int = 1) -> Tensor:
    """Classify the query images of one task with its adapted parameters.

    Args:
        phi: the task's parameters.
        task: one task, without the leading dimension.
        batch_norm: whose statistics normalise the query images: "transductive" for those of all query images
            of one set together, "support" for those of the support images, so that each query image is classified on
            its own.
        query_sets: how many sets the query images are made of.

    Returns:
        Logits ``[query_sets * ways * queries, ways]``.
    """
    statistics = batch_statistics(phi, task.support_images) if batch_norm == "support" else None
    sets = task.query_images.unflatten(0, (query_sets, -1))
    return torch.vmap(lambda images: forward(phi, images, statistics))(sets).flatten(0, 1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of right answers.

    Args:
        logits: ``[batch, ways]``.
        labels: ``[batch]``.

    Returns:
        A 0-d float32 tensor between 0 and 1.
    """
    return (logits.argmax(-1) == labels).float().mean()


def _implicit(config: Config) -> MetaLoss:
    def judge(theta: Parameters, task: Tasks) -> _Judged:
        solution = adapt(theta, task, config)
        return _judge(solution, solution.value, task, config)

    return _over_tasks(judge)


def _first_order(config: Config) -> MetaLoss:
    def judge(theta: Parameters, task: Tasks) -> _Judged:
        solution = adapt({name: value.detach() for name, value in theta.items()}, task, config)
        # The value of phi*, with the derivative of the identity: the query gradient at phi* is applied at theta.
        phi = {name: value + (solution.value[name] - value).detach() for name, value in theta.items()}
        return _judge(solution, phi, task, config)

    return _over_tasks(judge)


_ALGORITHMS: Mapping[AlgorithmName, Callable[[Config], MetaLoss]] = MappingProxyType(
    {"imaml": _implicit, "fomaml": _first_order}
)

_Judged = tuple[Tensor, Tensor, Tensor, il.Solution]


def _over_tasks(judge: Callable[[Parameters, Tasks], _Judged]) -> MetaLoss:
    def loss(theta: Parameters, tasks: Tasks) -> Outcome:
        query_loss, query_accuracy, support_loss, solution = torch.vmap(judge, in_dims=(None, 0))(theta, tasks)
        return Outcome(query_loss.mean(), query_loss.detach(), query_accuracy, support_loss, solution)

    return loss


def _judge(solution: il.Solution, phi: Parameters, task: Tasks, config: Config) -> _Judged:
    logits = query_logits(phi, task, config.batch_norm, config.query_sets)
    # The record needs how the solve went, not what it found; and vmap lets only tensors out, so no None either.
    report = replace(solution, value=(), aux=())
    return (
        F.cross_entropy(logits, task.query_labels),
        accuracy(logits, task.query_labels),
        solution.stats.objective,
        report,
    )


def _logits(phi: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return forward(phi, images)


def _mean_cross_entropy(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


# Declared in two parts, which is what Gauss-Newton curvature is made from.
_SUPPORT_LOSS = il.Composite(_logits, _mean_cross_entropy)


def _conjugate_gradients(config: Config) -> il.CG:
    # A fixed number of steps, so that nothing waits for the device to say whether it has converged.
    return il.CG(rtol=None, atol=None, max_steps=config.cg_steps)


def _solver(config: Config) -> il.GradientDescent | il.Newton | il.LBFGS:
    steps = config.inner_steps
    if config.inner == "gradient":
        return il.GradientDescent(lr=config.inner_lr, rtol=None, atol=None, max_steps=steps)
    # A tolerance of 0 is never met, so all steps are taken; but unlike without a tolerance, the line search may look
    # at its trials and stop at the first that will do.
    if config.inner == "hessian-free":
        return il.Newton(
            linear_solver=_conjugate_gradients(config), line_search=il.Armijo(), rtol=0.0, atol=0.0, max_steps=steps
        )
    return il.LBFGS(rtol=0.0, atol=0.0, max_steps=steps)


def _adjoint(config: Config) -> il.Implicit:
    return il.Implicit(
        linear_solver=_conjugate_gradients(config),
        damping=config.damping,
        curvature="gauss_newton" if config.curvature == "gauss-newton" else "hessian",
        on_failure="ignore",
    )
