"""The choice of a linear solver by what is known of the operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from implicitlayers.linear.cg import CG
from implicitlayers.linear.dense import Dense
from implicitlayers.linear.gmres import GMRES
from implicitlayers.linear.minres import MINRES
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Precondition, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver, check_right_hand_side
from implicitlayers.loop import check_tolerances

__all__ = ["Auto"]

# The n products that form a matrix are one batched product, whose cost up to about here is that of a few single ones,
# and 128² numbers a lane are less than GMRES keeps for n = 500. The answer then depends on no tolerance.
_SMALL = 128


@dataclass(frozen=True)
class Auto(LinearSolver):
    """Choose by what is known of A.

    | A | method |
    |---|---|
    | symmetric | `CG`: the curvature at a minimum is positive semidefinite, and CG says so where it is not |
    | symmetric, known to be indefinite | `MINRES` |
    | not symmetric, n ≤ 128 | `Dense` |
    | not symmetric, n > 128 | `GMRES` |

    Args:
        rtol: as in the method chosen; `Dense` has no use for it.
        atol: likewise.
        max_steps: likewise.
        preconditioner: likewise; symmetric positive definite where A is symmetric.
    """

    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000
    preconditioner: Preconditioner | Precondition | None = None

    def __post_init__(self) -> None:
        check_tolerances(self)

    @property
    def looks(self) -> bool:
        return self.rtol is not None

    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        check_right_hand_side(b)
        return self.choose(operator, b.shape[-1]).solve(operator, b, x0)

    def choose(self, operator: Operator, n: int) -> LinearSolver:
        """The solver for this operator on n unknowns."""
        if operator.indefinite and not operator.minimizing:
            return MINRES(self.rtol, self.atol, self.max_steps, self.preconditioner)
        if operator.symmetric:
            return CG(self.rtol, self.atol, self.max_steps, self.preconditioner)
        if n <= _SMALL:
            return Dense()
        return GMRES(30, self.rtol, self.atol, self.max_steps, self.preconditioner)
