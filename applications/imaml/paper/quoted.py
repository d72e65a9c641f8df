"""MAML and Reptile as their own papers set them, for the rows that iMAML's paper quotes.

What is taken: inner steps and their size, tasks of a meta-step, meta-steps, images of a class in training, and steps in
evaluation. What is ours: Reptile's steps are made on all support images, not on parts of them, by Adam with its usual
momentum; its outer step is Adam with a rate that falls to 0 by a cosine, not a plain one that falls linearly; and the
tasks are judged by the protocol of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["QUOTED", "Quoted", "QuotedName"]

QuotedName = Literal["maml", "reptile"]


@dataclass(frozen=True)
class Quoted:
    """Settings of a cell.

    Args:
        lr: size of the inner steps, on the mean loss of the support images.
        steps: number of inner steps in training.
        tasks: of a meta-step.
        meta_steps: of the run.
        test_steps: number of inner steps in evaluation.
        shots: support images of a class in training, if not as many as in evaluation.
    """

    lr: float
    steps: int
    tasks: int
    meta_steps: int
    test_steps: int
    shots: int | None = None

    def training(self, row: QuotedName) -> dict[str, Any]:
        """The settings of a run.

        Args:
            row: whose.

        Returns:
            By the names of ``Config``.
        """
        maml = row == "maml"
        return {
            "lam": 0.0,
            "inner": "gradient" if maml else "adam",
            "inner_lr": self.lr,
            "inner_steps": self.steps,
            "tasks": self.tasks,
            "meta_steps": self.meta_steps,
            "meta_lr": 1e-3,
            "schedule": "constant" if maml else "cosine",
            **({} if self.shots is None else {"shots": self.shots}),
        }


# Finn et al. 2017, appendix A.1. Its code sums the loss over the classes of a task, so that its rates 0.4 and 0.01 for
# five of them and 0.1 for twenty are 2.0, 0.05 and 2.0 on the mean.
_FIVE, _TWENTY = Quoted(2.0, 1, 32, 60_000, 3), Quoted(2.0, 5, 16, 60_000, 5)
# Nichol et al. 2018, by the commands that its code gives for the paper's numbers; for one shot in 5-way those of the
# transductive ones, which iMAML's paper quotes.
_MANY = {"lr": 4.6e-4, "steps": 12, "tasks": 3, "meta_steps": 200_000, "test_steps": 97}

QUOTED: Mapping[tuple[str, QuotedName, int, int], Quoted] = MappingProxyType(
    {
        ("omniglot", "maml", 5, 1): _FIVE,
        ("omniglot", "maml", 5, 5): _FIVE,
        ("omniglot", "maml", 20, 1): _TWENTY,
        ("omniglot", "maml", 20, 5): _TWENTY,
        ("mini-imagenet", "maml", 5, 1): Quoted(0.05, 5, 4, 60_000, 10),
        ("omniglot", "reptile", 5, 1): Quoted(1e-3, 3, 10, 100_000, 5, shots=15),
        ("omniglot", "reptile", 5, 5): Quoted(1.5e-3, 5, 5, 100_000, 100, shots=10),
        ("omniglot", "reptile", 20, 1): Quoted(**_MANY, shots=9),
        ("omniglot", "reptile", 20, 5): Quoted(**_MANY, shots=12),
        ("mini-imagenet", "reptile", 5, 1): Quoted(1e-3, 15, 10, 100_000, 10, shots=15),
    }
)
"""By table, row, ways and shots."""
