"""Metrics as TensorBoard events, for those who have it: ``pip install tensorboard``."""

from __future__ import annotations

import importlib
from pathlib import Path

from applications.imaml.run_folder import RunError


class Events:
    """Writes rows of metrics as scalars, one a column.

    Args:
        folder: for ``tensorboard --logdir``.
        after: meta-step that the run was resumed from; what was written of later ones is dropped by TensorBoard.

    Raises:
        RunError: if TensorBoard cannot be imported.
    """

    def __init__(self, folder: Path, after: int) -> None:
        check_importable()
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=after + 1)

    def append(self, row: dict[str, float]) -> None:
        """Write a row and see it on the disk.

        Args:
            row: as of metrics.csv; what is NaN is left out.
        """
        for name, value in row.items():
            if name != "meta_step" and value == value:
                self._writer.add_scalar(name, value, int(row["meta_step"]))
        self._writer.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()


def check_importable() -> None:
    """Refuse early what would fail later.

    Raises:
        RunError: if TensorBoard cannot be imported.
    """
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise RunError(
            f"events for TensorBoard are asked for, but it cannot be imported ({error}); pip install tensorboard, or "
            f"leave --tensorboard out: metrics.csv has the same numbers."
        ) from error
