"""Checkpoints that are whole or not there: numbered tensor files, and one small JSON file that points to the valid one.

A process can be killed, or a disk fill up, at any moment. The tensors go into a new file first; only when it is on the
disk is the pointer replaced, which file systems do at once; only then is the previous file deleted. Whatever happens in
between, the pointer names a complete file. Neither format can hold code.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

CheckpointName = Literal["last", "best"]
"""Which network of a run: that of the last meta-step, or that of the best accuracy on validation classes."""

SCHEMA = 1
POINTER = "checkpoint.json"
# Also a file that a killed process left half-written.
_PATTERN = "checkpoint-*.safetensors*"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: says which file, why, and what to do."""


class Checkpoint(NamedTuple):
    """What a run needs to go on: tensors by name, and numbers by name."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def save(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and make it the valid one.

    Args:
        folder: of the run.
        step: number that tells it from earlier ones.
        checkpoint: what to keep; numbers must fit JSON.

    Raises:
        CheckpointError: if it cannot be written; the checkpoint before it stays valid.
    """
    content = tensors_to_bytes(
        {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    )
    name = f"checkpoint-{step:08d}.safetensors"
    pointer = {
        "schema": SCHEMA,
        "file": name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "numbers": checkpoint.numbers,
    }
    try:
        write_atomically(folder / name, content)
        write_atomically(folder / POINTER, (json.dumps(pointer, indent=2) + "\n").encode())
        for old in folder.glob(_PATTERN):
            if old.name != name:
                old.unlink()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); make room or get write access, "
            f"then `train --resume` continues from the checkpoint before it."
        ) from error


def load(folder: Path) -> Checkpoint:
    """Read the valid checkpoint of a run.

    Args:
        folder: of the run.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another version.
    """
    try:
        pointer = json.loads((folder / POINTER).read_text(encoding="utf-8"))
        schema = pointer["schema"]
        if schema != SCHEMA:
            raise CheckpointError(
                f"{folder / POINTER} has schema {schema!r}, and this version reads {SCHEMA}; use the version that "
                f"wrote it, or start a run in a new folder."
            )
        content = (folder / pointer["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != pointer["sha256"]:
            raise CheckpointError(
                f"{folder / pointer['file']} is not what was written (its SHA-256 differs); restore it from a copy, or "
                f"start a run in a new folder."
            )
        return Checkpoint(tensors_from_bytes(content), pointer["numbers"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} has no readable checkpoint ({type(error).__name__}: {error}); pass the folder of a run, or "
            f"start one in a new folder."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, at once and for good.

    Args:
        path: file to write.
        content: all of it.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # A rename is durable once its folder is; Windows knows no such thing as opening one.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
