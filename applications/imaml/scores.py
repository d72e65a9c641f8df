"""How well unseen tasks are learnt: a score of each, before adaptation and after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.config import Config
from applications.imaml.criterion import criterion_of
from applications.imaml.device import in_float32
from applications.imaml.episodes import Tasks
from applications.imaml.families import Sampler
from applications.imaml.networks import Parameters
from applications.imaml.processes import Processes
from applications.imaml.products import Products

__all__ = ["Scores", "scores"]


class Scores(NamedTuple):
    """Score of each task's queries, before and after adaptation, float64 ``[tasks]``.

    Of classes the fraction of query images classified rightly, of regression the mean squared error.
    """

    before: Tensor
    after: Tensor


def scores(
    theta: Parameters, sampler: Sampler, config: Config, tasks: int, processes: Processes = Processes()
) -> Scores:
    """Measure the score on each of a number of tasks, in float32, whatever the network is trained in.

    Args:
        theta: meta-parameters.
        sampler: draws the tasks.
        config: of the run; its inner solver, its batch normalisation, and how many tasks to solve at once.
        tasks: how many.
        processes: those that share the tasks.

    Returns:
        One score a task, on the CPU, of all tasks in every process.
    """
    with in_float32(config) as exact, torch.no_grad():
        found = _shared_scores(theta, sampler, exact, tasks, processes)
    processes.add_up(found)
    before, after = found
    return Scores(before, after)


def _shared_scores(theta: Parameters, sampler: Sampler, config: Config, tasks: int, processes: Processes) -> Tensor:
    """Before and after, ``[2, tasks]``, of this process's share of the tasks, and zero for the others."""
    how, criterion = Products.of(config), criterion_of(config)

    def judge(task: Tasks) -> tuple[Tensor, Tensor]:
        phi = adapt(theta, task, config).value
        before, after = (query_logits(values, task, config.batch_norm, how=how) for values in (theta, phi))
        return criterion.scores(before, task.query_labels), criterion.scores(after, task.query_labels)

    found = torch.zeros(2, tasks, dtype=torch.float64)
    for first in range(0, tasks, config.tasks):
        drawn = sampler.sample(min(config.tasks, tasks - first))
        share = processes.share(len(drawn.query_labels))
        if share.start < share.stop:
            judged = torch.vmap(judge)(Tasks(*(part[share] for part in drawn)))
            # A mean in single precision is off in the eighth digit.
            means = torch.stack(judged).cpu().double().mean(-1)
            found[:, first + share.start : first + share.stop] = means
    return found
