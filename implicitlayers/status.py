"""How a solve went: statuses that carry their remedy, the solution and its reports, errors and warnings.

Failure is a value here. Solvers and linear solvers return a status per lane and never raise; the face turns statuses
into an error, a warning or NaN, by the caller's policy, once.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "RUNNING", "AdjointError", "AdjointReport", "AdjointWarning", "ImplicitLayersError", "MisuseError", "Policy",
    "Solution", "SolveError", "SolveWarning", "Stats", "Status", "check_policy", "describe_failures", "failed",
    "warn_caller",
]  # fmt: skip

Policy = Literal["raise", "warn", "ignore", "nan"]

RUNNING = -1
"""The status of a lane that has not finished; never seen outside the loop."""


class Status(IntEnum):
    """The outcome of a solve, one per lane. `meaning` and `remedy` say what it is and what to try."""

    meaning: str
    remedy: str

    def __new__(cls, code: int, meaning: str, remedy: str) -> Status:
        """Make the member from its code, its meaning and its remedy."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.remedy = remedy
        return member

    CONVERGED = 0, "the residual is below the tolerance", "nothing to do"
    MAX_STEPS = (
        1,
        "the step limit was reached before the tolerance",
        "raise max_steps, loosen rtol/atol, start closer, scale the unknowns alike, or take Newton",
    )
    STALLED = (
        2,
        "no further progress is possible in this floating-point precision",
        "loosen rtol/atol to what was reached, rescale the problem, or solve in float64",
    )
    NON_FINITE = (
        3,
        "a NaN or an infinity appeared",
        "look for a division, log or sqrt at the edge of its domain, start elsewhere, or take smaller steps",
    )
    LINE_SEARCH_FAILED = (
        4,
        "no step along the search direction lowered the objective",
        "check that the objective is deterministic and smooth at this point, or raise the line search's max_steps",
    )
    INDEFINITE = (
        5,
        "a direction of non-positive curvature (or below CG's curvature_floor) was met: no strict minimum, and "
        "conjugate gradients do not apply",
        'add damping or regularization, use curvature="gauss_newton" with a Composite, or linear_solver=Dense()',
    )
    SINGULAR = (
        6,
        "the linear system has no unique solution, so the minimizer is not isolated",
        "regularize (Ridge, Proximal), add damping, or remove the unknowns that the objective does not determine, or "
        "the constraints that repeat others or hold without a multiplier",
    )
    NOT_CHECKED = (
        7,
        "a fixed number of steps was run without looking at the residual, as asked by rtol=atol=None",
        "nothing to do, or set rtol and atol to have convergence checked",
    )
    INFEASIBLE = (
        8,
        "no point satisfies the constraints: their multipliers grow along a combination that contradicts itself",
        "relax the right-hand sides b and h, drop a constraint, or give those that may be violated a slack and a price",
    )
    UNBOUNDED = (
        9,
        "the objective falls without limit inside the constraints",
        "bound the unknowns, add curvature (a multiple of the identity to Q), or check the sign of q",
    )


class ImplicitLayersError(RuntimeError):
    """Base of all errors of this library."""


class MisuseError(ImplicitLayersError, ValueError):
    """The call cannot mean what it says: the message tells what was passed, why it cannot be, what to pass."""


class SolveError(ImplicitLayersError):
    """The forward solve failed in some lanes."""


class AdjointError(ImplicitLayersError):
    """The linear solve of a derivative failed in some lanes."""


class SolveWarning(UserWarning):
    """The forward solve failed in some lanes, under ``on_failure="warn"``."""


class AdjointWarning(UserWarning):
    """The linear solve of a derivative failed in some lanes, under ``on_failure="warn"``."""


@dataclass(frozen=True)
class Stats:
    """What the forward solve did, one entry per lane.

    Attributes:
        steps: int64 ``[*lanes]``, steps taken.
        residual: ``[*lanes]``, Euclidean norm of the optimality condition F where it was last evaluated. With a fixed
            number of steps that is one step before the returned value: no evaluation is spent on the report.
        objective: ``[*lanes]``, the (regularized) objective at the same point; NaN for problems that have none.
    """

    steps: Tensor
    residual: Tensor
    objective: Tensor


@dataclass
class AdjointReport:
    """What the linear solve of the last first-order derivative did; all fields are None until a derivative was taken.

    Attributes:
        steps: int64 ``[*lanes]``, steps of the linear solver.
        residual: ``[*lanes]``, norm of A u - v relative to the norm of v.
        curvature: pair of ``[*lanes]``, smallest and largest Rayleigh quotient of A met by the linear solver; NaN where
            the solver sees none.
        damping: the damping that was added to A.
        status: int64 ``[*lanes]``, see `Status`.
        error_estimate: ``[*lanes]``, estimate of ‖û - u‖/‖û‖. Here û is the computed solution of A u = v (Aᵀu = v where
            A is not symmetric, in reverse mode), with the damping that was asked for; u is the exact one. It is
            ‖A û - v‖/(σ‖û‖) with σ the smallest singular value of A as the linear solver could tell, plus rounding (see
            `certificate.adjoint_error`), plus `inner_error` where that is measured; infinite where the solver broke
            down. A gradient is -(∂F/∂θ)ᵀû, so this is its relative error where ∂F/∂θ is a multiple of an isometry, such
            as the anchor of `Proximal`, and is multiplied by at most the condition number of ∂F/∂θ elsewhere. What
            moving the solution does to v = ∂L/∂x and to ∂F/∂θ is not part of it.
        inner_error: ``[*lanes]``, the part of the error that is due to an inexact solution x̂; None unless a
            `gradient_tol` was given. It is ‖A⁻¹(A(x̂ + d) - A(x̂))û‖/‖û‖ with the Newton step d = -A⁻¹F(x̂), and u above
            is then the solution with A at the exact solution. Between the forward and the derivative it is the larger
            of the same for û = d, and of ‖d‖ relative to ‖x̂‖ (or to the way from ``x0``, if that is longer).
    """

    steps: Tensor | None = None
    residual: Tensor | None = None
    curvature: tuple[Tensor, Tensor] | None = None
    damping: float | None = None
    status: Tensor | None = None
    error_estimate: Tensor | None = None
    inner_error: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """The result of a solve: a pytree node, so that a function returning it can be vmapped.

    Attributes:
        value: the solution, a tree like ``x0``; differentiable.
        status: int64 tensor ``[*lanes]`` of `Status` codes.
        stats: steps, residual and objective, per lane.
        aux: what the objective returned beside its value, at the solution; differentiable. None without ``has_aux``.
        adjoint: report on the derivative; empty until one was taken.
    """

    value: Any
    status: Tensor
    stats: Stats
    aux: Any = None
    adjoint: AdjointReport = field(default_factory=AdjointReport)


pytree.register_pytree_node(
    Stats,
    lambda s: ([s.steps, s.residual, s.objective], None),
    lambda children, _: Stats(*children),
    serialized_type_name="implicitlayers.Stats",
)
pytree.register_pytree_node(
    Solution,
    # The report is no child: it is one object, filled by the backward for all lanes together. Nor is aux where there is
    # none: vmap lets only tensors out.
    lambda s: ([s.value, s.status, s.stats, *([] if s.aux is None else [s.aux])], s.adjoint),
    lambda children, report: Solution(*children, adjoint=report),  # type: ignore[arg-type]
    serialized_type_name="implicitlayers.Solution",
)


def check_policy(policy: str, where: str) -> None:
    """Raise `MisuseError` unless `policy` is one of the four."""
    if policy not in get_args(Policy):
        raise MisuseError(f'{where} is {policy!r}; pass one of "raise", "warn", "ignore", "nan".')


def warn_caller(warning: Warning) -> None:
    """Warn at the line outside this package and torch that led here, whatever wrappers lie between."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)


def failed(status: Tensor) -> Tensor:
    """Mask of the lanes that did not do what was asked."""
    return (status != Status.CONVERGED) & (status != Status.NOT_CHECKED)


def describe_failures(what: str, status: Tensor, steps: Tensor, residual: Tensor, most: int = 10) -> str:
    """Name the failed lanes with status, steps and residual, then what each status means and what to try.

    Args:
        what: the solve that failed, as the start of a sentence.
        status: ``[*lanes]``, with at least one failure.
        steps: ``[*lanes]``.
        residual: ``[*lanes]``.
        most: lanes named before the list is cut.
    """
    status, steps, residual = status.cpu(), steps.cpu(), residual.cpu()
    where = torch.nonzero(failed(status))
    lines = [f"{what} failed" + ("" if status.ndim == 0 else f" in {len(where)} of {status.numel()} lanes") + ":"]
    for index in where[:most]:
        at = tuple(index.tolist())
        lane = "" if not at else f"lane {at[0] if len(at) == 1 else at}: "
        lines.append(
            f"  {lane}{Status(int(status[at])).name} after {int(steps[at])} steps, residual {float(residual[at]):.3e}"
        )
    if len(where) > most:
        lines.append(f"  … and {len(where) - most} more lanes")
    for code in sorted({int(c) for c in status[failed(status)].reshape(-1)}):
        member = Status(code)
        lines.append(f"{member.name}: {member.meaning}. Try: {member.remedy}.")
    if bool(((status == Status.NON_FINITE) & (steps == 0)).any()):
        lines.append(
            "NON_FINITE after 0 steps: it is already so at the start, x0; pass an x0 where the objective is finite."
        )
    return "\n".join(lines)
