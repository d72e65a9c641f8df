"""The end of a run that is no multiple of its rows or validations, and how a longer run goes on as if it were none.

At the last meta-step there is always a row and a validation. A run that had been longer from the start would not have
both there. So the checkpoint of the last meta-step keeps the state before them as well, and a run that is continued
beyond it goes on from that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from applications.imaml.checkpoint import Checkpoint
from applications.imaml.networks import Parameters

__all__ = ["Best", "Ending", "continued"]

_BEST, _METER, _PREFIX = "best.", "meter", "ending."


class Best(NamedTuple):
    """The network of the best validation score so far, and what that score is; the first one of equals."""

    meta_step: int
    name: str
    score: float
    theta: Parameters

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"{_BEST}{name}": value for name, value in self.theta.items()}

    def numbers(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"meta_step": self.meta_step, self.name: self.score}


class Ending(NamedTuple):
    """What there was before the last row and validation.

    Args:
        metrics_bytes: of metrics.csv.
        row_seconds: time of training at the row before.
        meter: sums since then.
        best: the best network until then.
    """

    metrics_bytes: int
    row_seconds: float
    meter: Tensor
    best: Best | None

    def tensors(self, best_now: Best | None) -> dict[str, Tensor]:
        """For a checkpoint, which has the best network of now anyway.

        Args:
            best_now: that network.

        Returns:
            The tensors by name.
        """
        best = {} if self.best is None or self.best is best_now else self.best.tensors()
        return {f"{_PREFIX}{name}": value for name, value in ({_METER: self.meter} | best).items()}

    def numbers(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "metrics_bytes": self.metrics_bytes,
            "row_seconds": self.row_seconds,
            "best": None if self.best is None else self.best.numbers(),
        }


def continued(saved: Checkpoint, meta_steps: int) -> Checkpoint:
    """What a run goes on from.

    Args:
        saved: its checkpoint.
        meta_steps: after which it is complete now.

    Returns:
        The checkpoint; as it was before the last row and validation, if the run had ended and is longer now.
    """
    ending = saved.numbers.get("ending")
    if ending is None or saved.numbers["meta_step"] >= meta_steps:
        return saved
    left = (_PREFIX,) if ending["best"] == saved.numbers["best"] else (_PREFIX, _BEST)
    kept = {name: value for name, value in saved.tensors.items() if not name.startswith(left)}
    before = {name.removeprefix(_PREFIX): value for name, value in saved.tensors.items() if name.startswith(_PREFIX)}
    return Checkpoint(kept | before, saved.numbers | ending | {"ending": None, "row_is_due": True})
