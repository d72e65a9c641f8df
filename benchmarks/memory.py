"""Does the memory of a meta-step grow with the number of inner steps?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.memory_probe import SHOTS, WAYS
from benchmarks.report import Report

STEPS = (1, 4, 16, 64, 256)
# Backpropagation through the path keeps every step: beyond this it takes gigabytes to show what is clear by then.
LAST_MAML = 16
TASKS = 2
MIB = 2**20


def run(device: str, repeats: int) -> Report:
    """Measure every way and number of steps in a fresh process.

    Args:
        device: where to run.
        repeats: not used: a peak is a peak.
    """
    gradient = _probe("gradient", 1, device)
    one = gradient["peak"] - gradient["before"]
    rows: list[dict[str, Any]] = []
    for way in ("imaml", "fomaml", "maml"):
        for steps in STEPS:
            if way == "maml" and steps > LAST_MAML:
                continue
            measured = _probe(way, steps, device)
            step = measured["peak"] - measured["before"]
            rows.append(
                {
                    "way": way,
                    "inner steps": steps,
                    "peak MiB": measured["peak"] / MIB,
                    "of the step MiB": step / MIB,
                    "in inner gradients": step / one,
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


def _probe(way: str, steps: int, device: str) -> dict[str, int]:
    options = ["--way", way, "--steps", str(steps), "--tasks", str(TASKS), "--device", device]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_probe", *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the memory probe for {way} with {steps} steps failed:\n{done.stderr}")
    return json.loads(done.stdout)
