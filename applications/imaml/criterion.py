"""What answers are judged by: classes by cross-entropy and accuracy, numbers by the mean squared error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from applications.imaml.config import Config

__all__ = ["CLASSIFICATION", "REGRESSION", "Criterion", "criterion_of"]


@dataclass(frozen=True)
class Criterion:
    """The loss that is minimized, and the score that is told.

    Args:
        loss: of a network's outputs ``[batch, outputs]`` and their targets, the mean over the batch, 0-d.
        scores: of the same, for each of the batch, ``[batch]``; their mean is the score.
        loss_name: of the loss in names of columns.
        score_name: likewise of the score; where the loss is the score, the same.
        higher_is_better: whether the better of two scores is the higher one.
        scale: what a score is multiplied by to be told.
        unit: what follows the number.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    score_name: str
    higher_is_better: bool
    scale: float = 1.0
    unit: str = ""

    @property
    def validation(self) -> str:
        """Name of the column of the score on validation tasks."""
        return f"validation_{self.score_name}"

    def told(self, row: Mapping[str, float]) -> str:
        """What a row of metrics says of loss and score, in a line.

        Args:
            row: as of metrics.csv.

        Returns:
            The line; of a validation only where there was one.
        """
        scores = {} if self.loss_name == self.score_name else {self.score_name: row[f"query_{self.score_name}"]}
        if not math.isnan(row[self.validation]):
            scores["validation"] = row[self.validation]
        digits = 1 if self.unit else 3
        parts = [f"{name} {self.scale * value:.{digits}f}{self.unit}" for name, value in scores.items()]
        return "  ".join([f"query {self.loss_name} {row[f'query_{self.loss_name}']:.3f}", *parts])

    def better(self, score: float, other: float) -> bool:
        """Whether a score is better than another; not if they are equal or not numbers.

        Args:
            score: the one.
            other: the other.

        Returns:
            Whether it is.
        """
        return score > other if self.higher_is_better else score < other


# Called by their names, so that what is patched there is what is used here.
def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float()


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def _squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


CLASSIFICATION = Criterion(_cross_entropy, _right, "loss", "accuracy", higher_is_better=True, scale=100.0, unit=" %")
"""Logits ``[batch, ways]`` and labels ``[batch]``: cross-entropy in nats, and the fraction of right answers."""

REGRESSION = Criterion(_mean_squared_error, _squared_errors, "mse", "mse", higher_is_better=False)
"""Outputs and targets ``[batch, outputs]``: the mean squared error is both."""


def criterion_of(config: Config) -> Criterion:
    """What the tasks of a run are judged by.

    Args:
        config: of the run.

    Returns:
        The criterion.
    """
    return REGRESSION if config.is_regression else CLASSIFICATION
