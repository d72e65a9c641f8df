"""Meta-learning algorithms: from meta-parameters and a batch of tasks to a loss whose gradient is the meta-gradient.

Each algorithm learns a task by the same inner problem (Rajeswaran et al., "Meta-Learning with Implicit Gradients", 2019,
equation 3): for meta-parameters theta,

    phi*(theta) = argmin over phi of  L_support(phi) + lam/2 |phi - theta|^2,

by a number of steps from theta; lam = 0 leaves the plain loss, and then the steps are all that ties phi to theta. They
differ in how phi is differentiated. Nothing of that is done here: ``implicitlayers.argmin`` solves the inner problem
and carries the derivative. Everything is written for one task and mapped over the batch, so that the library solves all
tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import implicitlayers as il
from applications.imaml.algorithms.inner import adapt
from applications.imaml.algorithms.outcome import (
    Judged,
    MetaLoss,
    Outcome,
    accuracy,
    judged,
    over_tasks,
    query_logits,
)
from applications.imaml.algorithms.strength import (
    initial_strengths,
    network_of,
    strengths,
    strengths_by_layer,
)
from applications.imaml.config import AlgorithmName, Config
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters

__all__ = [
    "MetaLoss",
    "Outcome",
    "accuracy",
    "adapt",
    "initial_strengths",
    "meta_loss",
    "network_of",
    "query_logits",
    "strengths_by_layer",
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
    """By the implicit function theorem at phi."""
    solution = adapt(theta, task, config)
    return judged(solution, solution.value, task, config)


def _first_order(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """As if phi were theta plus a constant: the query gradient at phi is applied at theta."""
    solution = adapt(_detached(theta), task, config)
    return judged(solution, _moved(theta, solution.value), task, config)


def _path(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """Through the steps from theta to phi, all or the last few; those before are taken as first order takes them.

    A truncation that stopped at the first recorded step, as ``Unrolled(last=...)`` does, would leave theta the pull
    alone, and nothing where lam is 0.
    """
    start, last = None, config
    if config.path_steps is not None and config.path_steps < config.inner_steps:
        early = adapt(
            _detached(theta), task, replace(config, inner_steps=config.inner_steps - config.path_steps, path_steps=None)
        )
        start = _moved(theta, early.value)
        last = replace(config, inner_steps=config.path_steps)
    solution = adapt(theta, task, last, il.Unrolled(), start)
    return judged(solution, solution.value, task, config)


def _reptile(theta: Parameters, task: Tasks, config: Config) -> Judged:
    """Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms" (2018): theta is drawn towards phi.

    The loss is |phi - theta|²/2 with phi held, so that its gradient is theta - phi. Query images are for the record.
    """
    solution = adapt(_detached(theta), task, config)
    away = [(value - solution.value[name]).square().sum() / 2 for name, value in network_of(theta).items()]
    return judged(solution, solution.value, task, config, sum(away[1:], away[0]))


def _detached(theta: Parameters) -> Parameters:
    return {name: value.detach() for name, value in theta.items()}


def _moved(theta: Parameters, phi: Parameters) -> Parameters:
    """The value of phi, with the derivative of the identity in theta."""
    return {name: value + (phi[name] - value).detach() for name, value in network_of(theta).items()}


_ALGORITHMS: Mapping[AlgorithmName, Callable[[Parameters, Tasks, Config], Judged]] = MappingProxyType(
    {
        "imaml": _implicit,
        "imaml-first-order": _first_order,
        "maml": _path,
        "fomaml": _first_order,
        "anil": _path,
        "reptile": _reptile,
    }
)
