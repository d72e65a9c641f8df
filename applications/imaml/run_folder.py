"""The folder of a run: what lies in it, and that it can be written, which is tried before an hour of training."""

from __future__ import annotations

import os
from pathlib import Path

from applications.imaml.config import Config

CONFIG, METRICS, CURVE, EVENTS = "config.json", "metrics.csv", "curve.png", "tensorboard"
# Settings, metrics, curve and events, which are small beside the checkpoints of any network here.
_REST = 2**20


class RunError(RuntimeError):
    """A run that cannot start or go on: says why and what to do."""


def claim(out: Path, config: Config, checkpoint_bytes: int, *, resume: bool) -> None:
    """Make the folder of a run, or take it up again, and write the settings.

    Two checkpoints are on the disk at once whenever one is replaced. A file of their size is written first, since what
    a disk says of itself is not what it takes: there are quotas, limits and reserves.

    Args:
        out: the folder.
        config: of the run.
        checkpoint_bytes: size of one checkpoint.
        resume: whether a run that is there is to be continued.

    Raises:
        RunError: if the folder holds a run already and isn't to be resumed, or cannot be written, or has no room.
    """
    if not resume and (out / CONFIG).exists():
        raise RunError(f"{out} holds a run already; continue it with --resume, or pass another folder.")
    room = 2 * checkpoint_bytes + _REST
    try:
        out.mkdir(parents=True, exist_ok=True)
        _try_out(out / "trial.part", room)
        config.save(out / CONFIG)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error}); a run keeps {room / 2**20:.1f} MiB there, which were tried. Make room "
            f"or get write access, or pass a folder elsewhere."
        ) from error


def _try_out(path: Path, size: int) -> None:
    try:
        with path.open("wb") as file:
            # Not zeros, for which a file system may need no room.
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
