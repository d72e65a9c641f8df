"""A trained network, as it lies in the folder of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from applications.imaml import checkpoint
from applications.imaml.checkpoint import CheckpointError, CheckpointName
from applications.imaml.config import ConfigError
from applications.imaml.networks import Parameters


class Network(NamedTuple):
    """A trained network: its meta-parameters, the meta-steps that led to them, its images, and its data if known."""

    theta: Parameters
    meta_step: int
    channels: int
    side: int
    data: Mapping[str, Any] | None = None


def load_network(folder: Path, device: torch.device, which: CheckpointName = "last") -> Network:
    """Read the network of a run's checkpoint.

    Args:
        folder: of the run.
        device: where it is wanted.
        which: "last", that of the last meta-step; or "best", that of the highest accuracy on validation classes, the
            first of equals.

    Returns:
        The network.

    Raises:
        CheckpointError: if there is no checkpoint to read, or no best network in it.
        ConfigError: if it is neither.
    """
    if which not in get_args(CheckpointName):
        raise ConfigError(f"checkpoint={which!r} is not known; pass one of {', '.join(get_args(CheckpointName))}.")
    tensors, numbers = checkpoint.load(folder)
    prefix, meta_step = "theta.", numbers["meta_step"]
    if which == "best":
        best = numbers.get("best")
        if best is None:
            raise CheckpointError(
                f"{folder} has no best network, since it has not been validated so far; train it on (it may be that "
                f"its split has no validation classes), or pass checkpoint='last'."
            )
        prefix, meta_step = "best.", best["meta_step"]
    theta = {name.removeprefix(prefix): value.to(device) for name, value in tensors.items() if name.startswith(prefix)}
    # Runs that don't say were made when all images were characters.
    channels, side = numbers.get("image", (1, 28))
    return Network(theta, meta_step, channels, side, numbers.get("data"))
