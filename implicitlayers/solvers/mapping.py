"""The proximal gradient step, which stands for the gradient step where an objective has kinks or constraints."""

from __future__ import annotations

from torch import Tensor

from implicitlayers.loop import norm
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress

__all__ = ["begin", "forward_backward", "total"]


def forward_backward(problem: Bound, x: Tensor, F: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """One step x⁺ = prox(x - t F, t), and the gradient mapping (x - x⁺)/t: zero at a minimizer, and F without a prox.

    Args:
        problem: has the proximal map.
        x: ``[*lanes, n]``.
        F: gradient of the smooth part there.
        step: t, ``[*lanes]``.
    """
    t = step.unsqueeze(-1)
    moved = x - t * F
    if problem.kind is not Kind.COMPOSITE:
        return moved, F
    new = problem.prox(moved, step)
    return new, (x - new) / t


def total(problem: Bound, x: Tensor, smooth: Tensor) -> Tensor:
    """The whole objective ``[*lanes]``, given that of its smooth part."""
    return smooth + problem.nonsmooth_value(x) if problem.kind is Kind.COMPOSITE else smooth


def begin(problem: Bound, x: Tensor, smooth: Tensor, F: Tensor, step: Tensor) -> Progress:
    """`Progress` at the start of a solve whose residual is the gradient mapping with this step."""
    # The terms that cancel in the mapping are those of the smooth part's gradient.
    progress = Progress.begin(problem, x, smooth, F)
    residual, objective = norm(forward_backward(problem, x, F, step)[1]), total(problem, x, smooth)
    return progress._replace(residual=residual, best=residual, objective=objective, lowest=objective)
