"""The linear system behind iMAML's meta-gradient, (H + lam) u = v, and how it is solved.

H is the curvature of the support loss where the inner solver ended, v the gradient of the query loss there, and lam u
the meta-gradient. ``implicitlayers`` makes the system and pulls u back; what can be chosen is H and the solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml.config import Config

__all__ = ["PublishedCG", "UnguardedCG", "conjugate_gradients", "implicit"]


# Curvature of H + lam that conjugate gradients accept, as a fraction of lam, which is what the pull alone gives. No
# task's meta-gradient is then longer than its query gradient divided by this; with H positive semidefinite it is no
# longer than its query gradient. The fraction must be below 1, where a task with H = 0 would be stopped before its
# first step. At 1/10 a task may count for ten in the mean over the batch, and those that break down do; at 1/2 for
# two. What smaller fractions let through is not worth having, since phi does not minimize the inner loss and H is
# uncertain by more than lam: on a network after 400 meta-steps, with 5 steps, the mean over 32 tasks had a cosine of
# 0.59, 0.83, 0.85 and 0.90 with that of 30 Gauss-Newton steps for fractions of 0, 1/10, 1/4 and 1/2. With 3 steps, 0
# to 1/2 were all the same.
_LEAST_CURVATURE = 0.5


def implicit(config: Config) -> il.Implicit:
    """The derivative by the implicit function theorem.

    Args:
        config: its linear system.

    Returns:
        The adjoint.
    """
    solvers: Mapping[str, il.LinearSolver] = {
        # Of a learnt strength the initial one counts: the bound grows and falls with the strength.
        "hessian": replace(conjugate_gradients(config), curvature_floor=_LEAST_CURVATURE * config.lam),
        "hessian-unguarded": UnguardedCG(config.cg_steps),
        "published": PublishedCG(config.lam, config.cg_steps),
    }
    return il.Implicit(
        linear_solver=solvers.get(config.curvature, conjugate_gradients(config)),
        damping=config.damping,
        curvature="gauss_newton" if config.curvature == "gauss-newton" else "hessian",
        on_failure="ignore",
    )


def conjugate_gradients(config: Config) -> il.CG:
    """Conjugate gradients that stop in a task where they meet non-positive curvature.

    Args:
        config: how many steps.

    Returns:
        The solver; a fixed number of steps, so that nothing waits for the device to say whether it has converged.
    """
    return il.CG(rtol=None, atol=None, max_steps=config.cg_steps)


@dataclass(frozen=True)
class UnguardedCG(il.LinearSolver):
    """The textbook's conjugate gradients, which go on where curvature is negative and the recurrence means nothing.

    This is what the iMAML paper's algorithm says. Choose it to compare with the paper; `il.CG` is the same where the
    system is positive definite, and stops where it turns out not to be.

    Where the curvature along a direction is exactly zero it divides by that, and the task's solution is no longer
    finite. A meta-gradient is a mean over tasks, so one such task poisons that of its whole batch; training then ends
    with the last finite checkpoint. Only a residual of zero, 0/0, is caught: it is a solution.

    Args:
        max_steps: exact number of products with the matrix.
    """

    max_steps: int

    @property
    def looks(self) -> bool:
        return False

    def solve(self, operator: il.Operator, b: Tensor, x0: Tensor | None = None) -> il.LinearSolution:
        x = torch.zeros_like(b) if x0 is None else x0
        p = r = b if x0 is None else b - operator(x0)
        rr = _dot(r, r)
        low = high = torch.full_like(rr, torch.nan)
        for _ in range(self.max_steps):
            Ap = operator(p)
            pp, pAp = _dot(p, p), _dot(p, Ap)
            # A residual of zero is a solution, and stays one.
            alpha = torch.where(rr > 0, rr / pAp, 0)
            x, r = x + alpha * p, r - alpha * Ap
            rr, before = _dot(r, r), rr
            p = r + torch.where(before > 0, rr / before, 0) * p
            quotient = pAp / pp
            low, high = torch.fmin(low, quotient), torch.fmax(high, quotient)
        status = torch.full(b.shape[:-1], int(il.Status.NOT_CHECKED), device=b.device)
        residual = (rr / _dot(b, b)).sqrt()
        return il.LinearSolution(
            x, status, torch.full_like(status, self.max_steps), *(t.squeeze(-1) for t in (residual, low, high))
        )


@dataclass(frozen=True)
class PublishedCG(il.LinearSolver):
    """What the published code of the iMAML paper solves: (2 + H/(lam + 10)) lam u = v in place of (H + lam) u = v.

    For lam = 2 that is the meta-gradient of a strength of 24, halved. It is positive definite for far more negative
    curvature, and closer to the first-order meta-gradient. Residual and curvature in the report are those of its own
    matrix. Choose it to compare with numbers that were made by that code; its inner solver, which leaves the pull out
    but for one step at the end, is not imitated.

    Args:
        lam: the given strength.
        max_steps: exact number of products with the matrix.
    """

    lam: float
    max_steps: int

    @property
    def looks(self) -> bool:
        return False

    def solve(self, operator: il.Operator, b: Tensor, x0: Tensor | None = None) -> il.LinearSolution:
        def published(y: Tensor) -> Tensor:
            return 2 * y + (operator(y) - self.lam * y) / (self.lam + 10)

        start = None if x0 is None else self.lam * x0
        solution = UnguardedCG(self.max_steps).solve(replace(operator, apply=published), b, start)
        return solution._replace(x=solution.x / self.lam)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
