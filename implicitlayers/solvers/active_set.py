"""Primal-dual active sets: from a good approximation to a solution exact to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.kkt import KKTPoint, Program, Saddle, matvec
from implicitlayers.loop import Algorithm
from implicitlayers.status import RUNNING, Status

__all__ = ["ActiveSet", "ActiveState"]


class ActiveState(NamedTuple):
    """The last point and the best one, how far from optimal that is, and whether the last point kept its active set."""

    z: KKTPoint
    best: KKTPoint
    violation: Tensor
    settled: Tensor


@dataclass(frozen=True)
class ActiveSet(Algorithm[Program, ActiveState]):
    """Take the inequalities with λ > h - Gx as equations and drop the others, until these are the same again.

    This is the semismooth Newton method for min(λ, h - Gx) = 0 (Hintermüller, Ito & Kunisch 2002), and ends in one step
    where the set is right. An interior point leaves λ ∘ s at its tolerance; after this λ is zero where a constraint is
    not active, and its slack zero to rounding where it is, without which the linearized conditions would be those of
    another problem. A lane is left at the best point met.
    """

    def init(self, problem: Program, x: Tensor) -> ActiveState:
        z = KKTPoint.split(x, *problem.counts)
        violation = problem.violation(z)
        return ActiveState(z, z, violation, torch.zeros_like(violation, dtype=torch.bool))

    def step(self, problem: Program, state: ActiveState) -> ActiveState:
        z = state.z
        n, (p, m) = z.x.shape[-1], problem.counts
        active = _active(problem, z)
        G = torch.where(active.unsqueeze(-1), problem.G, torch.zeros_like(problem.G))
        B = torch.cat([problem.A.expand(*G.shape[:-2], p, n), G], dim=-2)
        idle = torch.cat([torch.zeros_like(z.nu), (~active).to(z.lam)], dim=-1)
        K = torch.cat(
            [
                torch.cat([problem.Q.expand(*B.shape[:-2], n, n), B.mT], dim=-1),
                torch.cat([B, -torch.diag_embed(idle)], dim=-1),
            ],
            dim=-2,
        )
        rhs = torch.cat([-problem.q.expand_as(z.x), problem.b.expand_as(z.nu), active * problem.h], dim=-1)
        # From where we are: of many multipliers of dependent constraints, those next to the ones we have.
        moved = Saddle.factor(K, n).solve(rhs - matvec(K, z.join()), 3)
        found = KKTPoint.split(z.join() + moved, p, m)
        found = found._replace(lam=torch.where(active, found.lam, torch.zeros_like(found.lam)))
        violation = problem.violation(found)
        better = (violation < state.violation).unsqueeze(-1)
        best = KKTPoint(*(torch.where(better, new, old) for new, old in zip(found, state.best, strict=True)))
        settled = (_active(problem, found) == active).all(-1)
        return ActiveState(found, best, torch.fmin(violation, state.violation), settled)

    def terminate(self, problem: Program, state: ActiveState) -> Tensor:
        rounding = 4 * torch.finfo(state.violation.dtype).eps
        done = state.settled | (state.violation <= rounding)
        return torch.where(done, int(Status.CONVERGED), RUNNING)


def _active(problem: Program, z: KKTPoint) -> Tensor:
    """Mask ``[*lanes, m]`` of the inequalities that z takes for equations."""
    return z.lam > problem.h - matvec(problem.G, z.x)
