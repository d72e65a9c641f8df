"""How far a meta-gradient is from a tight reference: that of the inner problem solved as far as float32 lets it."""

from __future__ import annotations

import math
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

# Far beyond what training can afford, and in float32 about as far as it goes.
_INNER_STEPS, _CG_STEPS = 150, 60


class Exactness(NamedTuple):
    """How a meta-gradient compares with a tight reference; NaN where an algorithm has no such thing.

    Args:
        residual: norm of the gradient of the inner problem where its solver last evaluated it, mean over tasks.
        estimate: the certificate of the linear system: estimated error relative to its solution, median over tasks.
            It knows nothing of how far the inner problem is from solved, nor of the choice of the curvature.
        cosine: of the angle to the reference, both means over the tasks.
        error: norm of the difference from it, relative to it.
        seconds: of processor time that the meta-gradient took.
        reference_residual: the residual of the reference itself, which is no more exact than that.
    """

    residual: float
    estimate: float
    cosine: float
    error: float
    seconds: float
    reference_residual: float = math.nan


def exactness(theta: Parameters, tasks: Tasks, config: Config) -> Exactness:
    """Compare a meta-gradient with that after 150 steps of L-BFGS and 60 of conjugate gradients.

    This reference is tight, not exact. Float32 and the kinks of the network stop L-BFGS at a gradient of about 0.1 with
    ``lam`` 2 and 0.01 with 0.1, which ``reference_residual`` tells. Its curvature is Gauss-Newton, from which the
    Hessian differs there: the support images are not fitted fully, and the Hessian is still indefinite where L-BFGS
    comes to rest. And the inner problem has many solutions, of which a looser solver may be on its way to another. So
    the cosine does not reach 1, and small differences between high cosines say nothing.

    Without a pull, ``lam`` 0, a solution does not depend on ``theta`` but by the path to it: there is no reference.

    Args:
        theta: meta-parameters.
        tasks: the batch, eight or so; the reference of one takes as long as sixty meta-steps.
        config: whose meta-gradient is judged.

    Returns:
        The figures.
    """
    begun = time.process_time()
    given, outcome = _meta_gradient(theta, tasks, config)
    seconds = time.process_time() - begun
    report = outcome.solution.adjoint
    estimate = None if report is None else report.error_estimate
    found = Exactness(
        residual=float(outcome.solution.stats.residual.mean()),
        estimate=math.nan if estimate is None else float(estimate.median()),
        cosine=math.nan,
        error=math.nan,
        seconds=seconds,
    )
    if not config.lam:
        return found
    tight = replace(
        config, algorithm="imaml", inner="lbfgs", inner_steps=_INNER_STEPS, curvature="gauss-newton",
        damping=0.0, cg_steps=_CG_STEPS, path_steps=None,
    )  # fmt: skip
    reference, solved = _meta_gradient(theta, tasks, tight)
    return found._replace(
        cosine=float(torch.cosine_similarity(given, reference, 0)),
        error=float((given - reference).norm() / reference.norm()),
        reference_residual=float(solved.solution.stats.residual.mean()),
    )


def _meta_gradient(theta: Parameters, tasks: Tasks, config: Config) -> tuple[Tensor, Outcome]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    outcome = meta_loss(config)(leaves, tasks)
    found = torch.autograd.grad(outcome.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.double().reshape(-1) for gradient in found]), outcome
