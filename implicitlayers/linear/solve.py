"""The contract of linear solvers, and the linear system of an optimality condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from implicitlayers.linear.operator import Operator

__all__ = ["LinearSolution", "LinearSolver"]


class LinearSolution(NamedTuple):
    """What a linear solver returns, per lane.

    Attributes:
        x: ``[*lanes, n]``. Where A of a minimizing operator is INDEFINITE, a direction with bᵀx > 0, or zero.
        status: int64 ``[*lanes]`` of `Status` codes.
        steps: int64 ``[*lanes]``.
        residual: ``[*lanes]``, norm of A x - b relative to the norm of b.
        curvature_min: ``[*lanes]``, smallest Rayleigh quotient pᵀAp / pᵀp met; NaN where none was.
        curvature_max: ``[*lanes]``, the largest.
    """

    x: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    curvature_min: Tensor
    curvature_max: Tensor


class LinearSolver(ABC):
    """Solves A x = b on every lane.

    Concrete solvers are frozen dataclasses. They never raise for a system they cannot solve: they say so in the status.

    Attributes:
        requires_symmetric: whether the method means something for symmetric operators only; on another one it would
            return a wrong vector without noticing, so that the operator must be known to be symmetric.
        requires_transpose: whether the method also multiplies with Aᵀ, so that an operator that is not symmetric must
            come with `apply_transpose`.
    """

    requires_symmetric: ClassVar[bool] = False
    requires_transpose: ClassVar[bool] = False

    @abstractmethod
    def solve(self, operator: Operator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        """Solve for all lanes; `b` and `x0` are ``[*lanes, n]``."""

    @property
    @abstractmethod
    def looks(self) -> bool:
        """Whether the solver looks at values, so that its status means something; False for a fixed number of steps."""
