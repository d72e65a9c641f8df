"""What an algorithm is and what it returns; how an adapted network is judged by its queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml import networks
from applications.imaml.config import BatchNorm, Config
from applications.imaml.criterion import criterion_of
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters
from applications.imaml.products import USUAL, Products

__all__ = ["Judged", "MetaLoss", "Outcome", "judged", "over_tasks", "query_logits"]


@dataclass(frozen=True)
class Outcome:
    """What one evaluation of a meta-loss found; all but ``loss`` are for the record and carry no gradient.

    Args:
        loss: 0-d; its gradient is the meta-gradient. The mean query loss of the tasks, unless the algorithm says what
            else.
        query_loss: mean loss of each task's queries after adaptation, by the run's criterion, ``[tasks]``.
        query_score: their score by the same, such as the fraction of images classified rightly, ``[tasks]``.
        support_loss: the regularized loss of the support images where the inner solver last evaluated it, which with a
            fixed number of steps is before the last one.
        solution: how the inner solve went, one lane a task, without its value; its ``adjoint`` is filled once
            ``loss`` has been differentiated, if the algorithm solves a linear system.
    """

    loss: Tensor
    query_loss: Tensor
    query_score: Tensor
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


Judged = tuple[Tensor, Tensor, Tensor, Tensor, il.Solution]
"""Of one task what `Outcome` has of all, in its order."""


def over_tasks(judge: Callable[[Parameters, Tasks], Judged]) -> MetaLoss:
    """Map what is written for one task over a batch.

    Args:
        judge: of one task.

    Returns:
        The algorithm; its loss is the mean over tasks.
    """

    def loss(theta: Parameters, tasks: Tasks) -> Outcome:
        losses, query_loss, query_score, support_loss, solution = torch.vmap(judge, in_dims=(None, 0))(theta, tasks)
        return Outcome(losses.mean(), query_loss, query_score, support_loss, solution)

    return loss


def judged(solution: il.Solution, phi: Parameters, task: Tasks, config: Config, loss: Tensor | None = None) -> Judged:
    """Judge one task by its query images.

    Args:
        solution: of the inner problem.
        phi: the task's parameters, with the derivative that the algorithm gives them.
        task: one task, without the leading dimension.
        config: of the run.
        loss: the task's part of the loss, if that isn't its query loss.

    Returns:
        Its part of the outcome.
    """
    logits = query_logits(phi, task, config.batch_norm, config.query_sets, Products.of(config))
    criterion = criterion_of(config)
    query_loss = criterion.loss(logits, task.query_labels)
    # The record needs how the solve went, not what it found; and vmap lets only tensors out, so no None either.
    stats = replace(
        solution.stats, residual=solution.stats.residual.detach(), objective=solution.stats.objective.detach()
    )
    return (
        query_loss if loss is None else loss,
        query_loss.detach(),
        criterion.scores(logits, task.query_labels).mean().detach(),
        stats.objective,
        replace(solution, value=(), aux=(), stats=stats),
    )


def query_logits(
    phi: Parameters, task: Tasks, batch_norm: BatchNorm, query_sets: int = 1, how: Products = USUAL
) -> Tensor:
    """Classify the query images of one task with its adapted parameters.

    Args:
        phi: the task's parameters.
        task: one task, without the leading dimension.
        batch_norm: whose statistics normalise the query images: "transductive" for those of all query images
            of one set together, "support" for those of the support images, so that each query image is classified on
            its own.
        query_sets: how many sets the query images are made of.
        how: the network's products are computed.

    Returns:
        Logits ``[query_sets * ways * queries, ways]``; of regression, outputs ``[queries, outputs]``.
    """
    statistics = networks.batch_statistics(phi, task.support_images, how) if batch_norm == "support" else None
    sets = task.query_images.unflatten(0, (query_sets, -1))
    return torch.vmap(lambda images: networks.forward(phi, images, statistics, how))(sets).flatten(0, 1)
