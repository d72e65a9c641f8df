"""Does the memory of a meta-step grow with the number of inner steps?"""

from __future__ import annotations

from typing import Any

import torch

from applications.imaml.paper.cost import CostSettings
from applications.imaml.paper.probe import Memory, memory_of
from benchmarks.report import Report

STEPS = (1, 4, 16, 64, 256)
# Backpropagation through the path keeps every step: beyond this it takes gigabytes to show what is clear by then.
LAST_MAML = 16
WAYS, SHOTS, TASKS = 20, 5, 2
MIB = 2**20


def run(device: str, repeats: int) -> Report:
    """Measure every way and number of steps in a fresh process.

    Args:
        device: where to run.
        repeats: not used: a peak is a peak.
    """
    settings = CostSettings(ways=WAYS, shots=SHOTS, tasks=TASKS, device=device, threads=torch.get_num_threads())
    one = _grown(memory_of(settings.config("imaml", 1), gradient=True))
    rows: list[dict[str, Any]] = []
    for way in ("imaml", "fomaml", "maml"):
        for steps in STEPS:
            if way == "maml" and steps > LAST_MAML:
                continue
            measured = memory_of(settings.config(way, steps))
            rows.append(
                {
                    "way": way,
                    "inner steps": steps,
                    "peak MiB": measured.peak / MIB,
                    "of the step MiB": _grown(measured) / MIB,
                    "in inner gradients": _grown(measured) / one,
                }
            )
    imaml = [row for row in rows if row["way"] == "imaml"]
    flat = imaml[-1]["peak MiB"] / imaml[0]["peak MiB"]
    most = max(row["in inner gradients"] for row in imaml)
    need = "≤ 1.02 by the allocator" if device.startswith("cuda") else "≤ 1.05 by peak resident memory"
    return Report(
        f"peak memory of a meta-step: {TASKS} tasks, {WAYS}-way {SHOTS}-shot; an inner gradient is {one / MIB:.0f} MiB",
        rows,
        f"iMAML with {STEPS[-1]} inner steps takes {flat:.3f} times the memory of 1 ({need}), and at most {most:.2f} "
        "inner gradients (≤ 2.5)",
    )


def _grown(memory: Memory) -> int:
    return memory.peak - memory.before
