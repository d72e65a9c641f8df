"""The record of a training run: means gathered on the device, rows of a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml.algorithms import Outcome
from applications.imaml.criterion import Criterion


def gathered(criterion: Criterion) -> tuple[str, ...]:
    """Names of the means over the tasks of a row.

    Loss of the queries after adaptation (of images, cross-entropy), and their score (fraction of right answers); inner
    objective (loss of the support and proximal term) and norm of its gradient, where the inner solver last evaluated
    them; residual of the adjoint's linear system relative to its right-hand side; fraction of tasks in which that
    system met a direction of non-positive curvature, or one of too little to go on.

    Args:
        criterion: of the run.

    Returns:
        The names; the first two are one where the loss is the score.
    """
    return (
        f"query_{criterion.loss_name}",
        f"query_{criterion.score_name}",
        "support_loss",
        "inner_residual",
        "adjoint_residual",
        "negative_curvature",
    )


def columns(criterion: Criterion) -> tuple[str, ...]:
    """Columns of metrics.csv.

    ``seconds`` is the time spent training, with the validations before that row, over all resumptions;
    ``tasks_per_second`` is the rate of the row's meta-steps alone, without any validation.

    Args:
        criterion: of the run.

    Returns:
        Their names, each once.
    """
    names = ("meta_step", *gathered(criterion), criterion.validation, "seconds", "tasks_per_second")
    return tuple(dict.fromkeys(names))


class Meter:
    """Sums of metrics on the device, so that a meta-step never waits for the host.

    Args:
        device: where the sums lie.
        criterion: of the run.
    """

    def __init__(self, device: torch.device, criterion: Criterion) -> None:
        self._names = gathered(criterion)
        self.sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)

    def add(self, outcome: Outcome) -> None:
        """Gather one meta-step, after its backward.

        Args:
            outcome: of the meta-step.
        """
        report = outcome.solution.adjoint
        missing = torch.full_like(outcome.query_loss, torch.nan)
        values = (
            outcome.query_loss,
            outcome.query_score,
            outcome.support_loss,
            outcome.solution.stats.residual,
            report.residual if report.residual is not None else missing,
            missing if report.curvature is None else _negative(report.curvature[0], report.status).float(),
        )
        self.sums += torch.stack([value.detach().double().mean() for value in values])

    def take(self, steps: int) -> dict[str, float]:
        """Read the means and start afresh; this waits for the device.

        Args:
            steps: meta-steps gathered since the last time.

        Returns:
            One value for each name that is gathered, NaN where the algorithm has none.
        """
        means = (self.sums / steps).tolist()
        self.sums.zero_()
        return dict(zip(self._names, means, strict=True))


def _negative(smallest: Tensor, status: Tensor | None) -> Tensor:
    # Conjugate gradients that stop say so, others go on and may be seen to have met it.
    met = smallest <= 0
    return met if status is None else met | (status == il.Status.INDEFINITE)


class MetricsFile:
    """metrics.csv: rows are appended, and cut off again behind the checkpoint from which a run is resumed.

    Args:
        path: the file.
        size: bytes that were there at the checkpoint; 0 starts the file.
        names: of the columns.

    Raises:
        OSError: if it cannot be written.
        ValueError: if it has fewer bytes than that.
    """

    def __init__(self, path: Path, size: int, names: Sequence[str]) -> None:
        self._path, self._names = path, names
        if size == 0:
            path.write_text(",".join(names) + "\n", encoding="utf-8", newline="")
        elif path.stat().st_size < size:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but the checkpoint was taken when it had {size}; restore it, "
                f"or start a run in a new folder."
            )
        else:
            os.truncate(path, size)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size

    def append(self, row: dict[str, float]) -> None:
        """Write a row and see it on the disk.

        Args:
            row: a value for each column; NaN is written as an empty cell.
        """
        text = io.StringIO()
        cells = ("" if row[name] != row[name] else f"{row[name]:.8g}" for name in self._names)
        csv.writer(text, lineterminator="\n").writerow(cells)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Read metrics.csv.

    Args:
        path: the file.

    Returns:
        The values of each column, NaN where a cell is empty.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    return {name: [float(row[name] or "nan") for row in rows] for name in table.fieldnames or ()}
