"""Meta-learning algorithms: from meta-parameters and a batch of tasks to a loss whose gradient is the meta-gradient.

Each algorithm learns a task by the same inner problem (Rajeswaran et al., "Meta-Learning with Implicit Gradients",
2019, equation 3): for meta-parameters theta,

    phi*(theta) = argmin over phi of  L_support(phi) + lam/2 |phi - theta|^2,

by a number of steps from theta. lam = 0 leaves the plain loss, and then the steps are all that ties phi to theta. The
algorithms differ in how phi is differentiated. Nothing of that is done here: ``implicitlayers.argmin`` solves the inner
problem and carries the derivative. Everything is written for one task and mapped over the batch, so that the library
solves all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

import implicitlayers as il
from applications.imaml.algorithms.inner import adapt
from applications.imaml.algorithms.outcome import (
    Judged,
    MetaLoss,
    Outcome,
    judged,
    over_tasks,
    query_logits,
)
from applications.imaml.algorithms.strength import initial_strengths, learnt_strengths, network_of
from applications.imaml.config import AlgorithmName, Config
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters

__all__ = [
    "MetaLoss",
    "Outcome",
    "adapt",
    "initial_strengths",
    "learnt_strengths",
    "meta_loss",
    "query_logits",
]


def meta_loss(config: Config) -> MetaLoss:
    """The algorithm that a configuration names.

    Args:
        config: of the run.

    Returns:
        The algorithm.
    """
    judge = _ALGORITHMS[config.algorithm]
    return over_tasks(lambda theta, task: judge(theta, task, config))


def _implicit(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """By the implicit function theorem at phi, wherever the path came from (Rajeswaran et al. 2019)."""
    solution = adapt(theta, task, config)
    return judged(solution, solution.value, task, config)


def _path(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """Through the steps from theta to phi: MAML (Finn, Abbeel and Levine 2017), and ANIL (Raghu et al. 2020).

    Truncated, only the last steps are differentiated, and those before count as a constant that was added to theta, as
    all of them do in first-order MAML. A truncation that left out what comes before (Shaban et al. 2019) would see
    theta in the pull alone, and nowhere if lam is 0.
    """
    last = config.path_steps
    if last is None or last >= config.inner_steps:
        solution = adapt(theta, task, config, il.Unrolled())
    else:
        early = adapt(_detached(theta), task, replace(config, inner_steps=config.inner_steps - last))
        start = _moved(theta, early.value)
        solution = adapt(theta, task, replace(config, inner_steps=last), il.Unrolled(), start)
    return judged(solution, solution.value, task, config)


def _first_order(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """As if phi were theta plus a constant: the query gradient at phi is applied at theta (Finn et al. 2017)."""
    solution = adapt(_detached(theta), task, config)
    return judged(solution, _moved(theta, solution.value), task, config)


def _reptile(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """Draw theta towards phi (Nichol, Achiam and Schulman 2018). The query images are for the record alone.

    The loss is |theta - phi|²/2 with phi held, whose gradient is theta - phi.
    """
    solution = adapt(_detached(theta), task, config)
    away = torch.stack([(value - solution.value[name]).square().sum() for name, value in network_of(theta).items()])
    return judged(solution, solution.value, task, config, away.sum() / 2)


def _detached(theta: Parameters) -> Parameters:
    return {name: value.detach() for name, value in theta.items()}


def _moved(theta: Parameters, phi: Parameters) -> Parameters:
    """The value of phi, with the derivative of the identity in theta."""
    return {name: value + (phi[name] - value).detach() for name, value in network_of(theta).items()}


_ALGORITHMS: Mapping[AlgorithmName, Callable[[Parameters, Tasks, Config], Judged]] = MappingProxyType(
    {"imaml": _implicit, "maml": _path, "anil": _path, "fomaml": _first_order, "reptile": _reptile}
)
