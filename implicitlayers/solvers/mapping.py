"""The proximal gradient step, which stands for the gradient step where an objective has kinks or constraints."""

from __future__ import annotations

from torch import Tensor

from implicitlayers.problem import Bound, Kind

__all__ = ["forward_backward"]


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
