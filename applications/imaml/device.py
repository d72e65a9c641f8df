"""Where a run computes."""

from __future__ import annotations

import torch

from applications.imaml.config import Config, ConfigError


def use(config: Config) -> torch.device:
    """Make PyTorch compute as a configuration asks: number of threads, repeatable convolutions.

    Args:
        config: of the run.

    Returns:
        The device; for "auto" a CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: if there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={config.device!r} cannot be used here ({error}); pass auto or cpu.") from error
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        # The fastest convolution may add in any order, and then no run could be repeated to the bit.
        torch.backends.cudnn.deterministic = True
    return device
