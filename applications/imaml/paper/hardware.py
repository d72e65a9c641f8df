"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform

import torch


def hardware(device: torch.device | str) -> str:
    """Name the machine.

    Args:
        device: where it computed.

    Returns:
        Processor or GPU, threads and version of PyTorch, in one line.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    return f"{name} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}"
