"""What becomes of lanes that a forward solve could not finish, by the caller's policy."""

from __future__ import annotations

import torch
from torch import Tensor

from implicitlayers.functorch import all_lanes
from implicitlayers.problem import Outcome
from implicitlayers.status import Policy, SolveError, SolveWarning, describe_failures, failed, warn_caller

__all__ = ["apply_policy"]


def apply_policy(outcome: Outcome, on_failure: Policy, what: str, *, looks: bool) -> Tensor:
    """Return the solution, or raise, warn, or fill with NaN.

    Args:
        outcome: of the solve.
        on_failure: the policy.
        what: the solve, as the start of a sentence.
        looks: whether the solver looked at values, so that its status may be looked at.

    Raises:
        SolveError: some lanes failed and the policy is "raise".
    """
    if on_failure == "nan":
        return torch.where(failed(outcome.status).unsqueeze(-1), torch.full_like(outcome.x, torch.nan), outcome.x)
    if on_failure in ("raise", "warn") and looks:
        status = all_lanes(outcome.status)
        if bool(failed(status).any()):
            message = describe_failures(what, status, all_lanes(outcome.steps), all_lanes(outcome.residual))
            if on_failure == "raise":
                raise SolveError(message)
            warn_caller(SolveWarning(message))
    return outcome.x
