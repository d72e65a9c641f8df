"""Primal-dual active sets: from a good approximation to a solution exact to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.kkt import Point, Program, Saddle, matvec
from implicitlayers.loop import Algorithm
from implicitlayers.status import RUNNING, Status

__all__ = ["ActiveSet", "ActiveState"]


class ActiveState(NamedTuple):
    """The best point so far, how far from optimal it is, and whether the last step improved it."""

    z: Point
    violation: Tensor
    improved: Tensor


@dataclass(frozen=True)
class ActiveSet(Algorithm[Program, ActiveState]):
    """Take the inequalities with λ > h - Gx as equations and drop the others, as long as that helps.

    This is the semismooth Newton method for min(λ, h - Gx) = 0 (Hintermüller, Ito & Kunisch 2002), and ends in one step
    where the set is right. An interior point leaves λ ∘ s at its tolerance; after this λ is zero where a constraint is
    not active, and its slack zero to rounding where it is, without which the linearized conditions would be those of
    another problem. A lane is left at the best point met.
    """

    def init(self, problem: Program, x: Tensor) -> ActiveState:
        z = Point.split(x, *problem.counts)
        violation = problem.violation(z)
        return ActiveState(z, violation, torch.ones_like(violation, dtype=torch.bool))

    def step(self, problem: Program, state: ActiveState) -> ActiveState:
        z = state.z
        n, (p, m) = z.x.shape[-1], problem.counts
        active = z.lam > problem.h - matvec(problem.G, z.x)
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
        found = Point.split(z.join() + moved, p, m)
        found = found._replace(lam=torch.where(active, found.lam, torch.zeros_like(found.lam)))
        violation = problem.violation(found)
        improved = violation < state.violation
        best = Point(*(torch.where(improved.unsqueeze(-1), new, old) for new, old in zip(found, z, strict=True)))
        return ActiveState(best, torch.where(improved, violation, state.violation), improved)

    def terminate(self, problem: Program, state: ActiveState) -> Tensor:
        status = torch.where(state.improved, RUNNING, int(Status.STALLED))
        rounding = 4 * torch.finfo(state.violation.dtype).eps
        return torch.where(state.violation <= rounding, torch.full_like(status, Status.CONVERGED), status)
