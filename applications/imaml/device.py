"""Where a run computes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from applications.imaml.config import Config, ConfigError

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def use(config: Config) -> torch.device:
    """Make PyTorch compute as a configuration asks: number of threads, precision, repeatable convolutions, memory kept.

    Args:
        config: of the run.

    Returns:
        The device; for "auto" a CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: if there is no such device, or it has no such precision.
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
        # Off is said as well: PyTorch has it on for convolutions, and float32 is the known baseline.
        _allow_tf32(config.precision == "tf32")
        return device
    if config.precision == "tf32":
        raise ConfigError(
            f"precision='tf32' cannot be on {device.type}: it is a mode of the matrix units of CUDA devices; pass "
            f"precision='float32' or 'bf16', or a device that is one."
        )
    keep_freed_memory()
    return device


@contextmanager
def in_float32(config: Config) -> Iterator[Config]:
    """Judge in float32 what is trained in less: two runs compare by their networks, not by the rounding of a judgement.

    Args:
        config: of the run.

    Yields:
        The same but for the precision, in which PyTorch computes until the end.
    """
    tf32 = config.precision == "tf32"
    if tf32:
        _allow_tf32(False)
    try:
        yield replace(config, precision="float32")
    finally:
        if tf32:
            _allow_tf32(True)


def _allow_tf32(allowed: bool) -> None:
    # By the names of old, since once the new ones are used PyTorch refuses to tell what the old ones are.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed instead of handing it back to the system.

    A meta-step frees and allocates the same hundreds of megabytes again and again, and every page that comes back from
    the system is first cleared by it: 6 % of the time. Where there is no such switch (it is glibc's) nothing happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Setting one of the two fixes the other, so both are set. 32 MiB is the largest threshold that is allowed.
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
