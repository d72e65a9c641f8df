"""The folder of a run: what lies in it, and that it can be written, which is tried before an hour of training."""

from __future__ import annotations

import os
from pathlib import Path

from applications.imaml.checkpoint import POINTER
from applications.imaml.config import Config

CONFIG, METRICS, CURVE, EVENTS = "config.json", "metrics.csv", "curve.png", "tensorboard"
# Those that a file of a report could replace.
_OWN = (CONFIG, METRICS, CURVE, POINTER, "exactness.json", "cell.json", "answers.csv")
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


def check_report(path: Path, *, picture: bool = False) -> None:
    """Refuse a report that cannot be written or would replace a file of a run, before an hour of measuring.

    Args:
        path: JSON to write, and a CSV of the same name beside it.
        picture: whether a PNG of the same name is written as well.

    Raises:
        RunError: if it is no JSON by its name, or belongs to a run, or cannot be written.
    """
    if path.suffix != ".json":
        raise RunError(f"report={str(path)!r} is no JSON by its name; pass a name that ends in .json.")
    files = [path, path.with_suffix(".csv"), *([path.with_suffix(".png")] if picture else [])]
    for own in files:
        if own.name in _OWN:
            raise RunError(
                f"report={str(path)!r} would be written to {own.name}, which is a file that a run keeps; pass another "
                f"name."
            )
    try:
        for own in files:
            _try_out(own.with_name(own.name + ".trial"), 1)
            if own.is_dir():
                raise IsADirectoryError(f"{own} is a folder")
    except OSError as error:
        raise RunError(
            f"report={str(path)!r} cannot be written ({error}); pass a name in a folder that is there and may be "
            f"written."
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
