"""How far a meta-gradient is from that of the inner problem solved to the end."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from applications.imaml.algorithms import Outcome, meta_loss
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters

__all__ = ["Exactness", "exactness"]

# Far beyond what training can afford, and in float32 as far as it goes.
_INNER_STEPS, _CG_STEPS = 150, 60


class Exactness(NamedTuple):
    """How exact a meta-gradient is; NaN where the algorithm has no such thing.

    Args:
        residual: norm of the gradient of the inner problem where its solver last evaluated it, mean over tasks.
        estimate: the certificate of the linear system: estimated error relative to its solution, median over tasks.
        cosine: of the angle to the exact meta-gradient, both means over the tasks.
        error: norm of the difference from it, relative to it.
        seconds: of processor time that the meta-gradient took.
    """

    residual: float
    estimate: float
    cosine: float
    error: float
    seconds: float


def exactness(theta: Parameters, tasks: Tasks, config: Config) -> Exactness:
    """Compare a meta-gradient with that after 150 steps of L-BFGS and 60 of conjugate gradients.

    The inner problem has many solutions, and the exact meta-gradient is that of the one which L-BFGS finds from
    ``theta``, where a looser solver may be on its way to another: so the cosine does not reach 1. Its curvature is
    Gauss-Newton, which the Hessian equals where the support images are fitted; the Hessian itself is still indefinite
    where L-BFGS comes to rest, at the kinks of the network.

    Args:
        theta: meta-parameters.
        tasks: the batch, eight or so; the exact solution of one takes as long as sixty meta-steps.
        config: whose meta-gradient is judged.

    Returns:
        The figures.
    """
    exact = replace(
        config, algorithm="imaml", inner="lbfgs", inner_steps=_INNER_STEPS, curvature="gauss-newton",
        damping=0.0,
        cg_steps=_CG_STEPS, path_steps=None,
    )  # fmt: skip
    begun = time.process_time()
    given, outcome = _meta_gradient(theta, tasks, config)
    seconds = time.process_time() - begun
    best, _ = _meta_gradient(theta, tasks, exact)
    report = outcome.solution.adjoint
    estimate = None if report is None else report.error_estimate
    return Exactness(
        residual=float(outcome.solution.stats.residual.mean()),
        estimate=float("nan") if estimate is None else float(estimate.median()),
        cosine=float(torch.cosine_similarity(given, best, 0)),
        error=float((given - best).norm() / best.norm()),
        seconds=seconds,
    )


def _meta_gradient(theta: Parameters, tasks: Tasks, config: Config) -> tuple[Tensor, Outcome]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    outcome = meta_loss(config)(leaves, tasks)
    found = torch.autograd.grad(outcome.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.double().reshape(-1) for gradient in found]), outcome
