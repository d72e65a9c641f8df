"""The contract of linear solvers, and the linear system of an optimality condition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from implicitlayers.linear.operator import Operator
from implicitlayers.status import MisuseError

__all__ = ["LinearSolution", "LinearSolver", "check_right_hand_side"]


class LinearSolution(NamedTuple):
    """What a linear solver returns, per lane.

    Attributes:
        x: ``[*lanes, n]``. Where A of a minimizing operator is INDEFINITE, a direction with bᵀx > 0, or zero.
        status: int64 ``[*lanes]`` of `Status` codes.
        steps: int64 ``[*lanes]``.
        residual: ``[*lanes]``, norm of A x - b relative to the norm of b.
        curvature_min: ``[*lanes]``, smallest Rayleigh quotient pᵀAp / pᵀp met; NaN where none was.
        curvature_max: ``[*lanes]``, the largest.
        smallest: ``[*lanes]``, estimate of the smallest singular value of A; NaN or None where the method has none.
    """

    x: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    curvature_min: Tensor
    curvature_max: Tensor
    smallest: Tensor | None = None


class LinearSolver(ABC):
    """Solves A x = b on every lane, in real arithmetic.

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

    def with_tolerance(self, rtol: float) -> LinearSolver:
        """The same method with another tolerance; itself where it has none, as a direct or a fixed-step method."""
        if getattr(self, "rtol", None) is None:
            return self
        return replace(self, rtol=rtol, atol=0.0)  # type: ignore[type-var]


def check_right_hand_side(b: Tensor) -> None:
    """Raise `MisuseError` unless b is a real floating-point ``[*lanes, n]``."""
    if not b.is_floating_point():
        hint = (
            "a complex system is a real one of twice the size: pass torch.view_as_real(b).flatten(-2) and the operator "
            "on such vectors"
            if b.is_complex()
            else "pass b.to(torch.get_default_dtype())"
        )
        raise MisuseError(f"the right-hand side is {b.dtype}, and linear systems are solved in real numbers; {hint}.")
    if b.ndim == 0:
        raise MisuseError("the right-hand side is 0-d, and the last dimension is the vector; pass b.reshape(1).")
