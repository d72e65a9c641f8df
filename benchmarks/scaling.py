"""How many more tasks a second does a training run learn in two processes than in one, and is it the same run?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from applications.imaml.metrics import read_metrics
from applications.imaml.run_folder import METRICS
from benchmarks.report import Report

PROCESSES = (1, 2)
WAYS, TASKS = 5, 16
# Meta-steps of one row of the metrics, whose rate is one measurement.
ROW = 2
COMMAND = ("-m", "applications.imaml", "train")
ROOT = Path(__file__).parents[1]


def run(device: str, repeats: int) -> Report:
    """Train by ``torchrun`` in one process and in two, with one thread each, and read the rates off their metrics.

    Args:
        device: where to run; on "cuda" every process takes a device of its own, and counts for which there are not
            enough are left out.
        repeats: measured rows of each run, after one for the warm-up.
    """
    cuda = device.startswith("cuda")
    counts = [count for count in PROCESSES if not cuda or count <= torch.cuda.device_count()]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    found = {count: _trained(count, "cuda" if cuda else device, repeats) for count in counts}
    # The first row is the warm-up.
    rates = {count: statistics.median(metrics["tasks_per_second"][1:]) for count, metrics in found.items()}
    one = rates[1]
    rows: list[dict[str, Any]] = [
        {"processes": count, "tasks/s": rate, "ratio": rate / one, "per process": rate / one / count}
        for count, rate in rates.items()
    ]
    most = max(counts)
    wanted = (
        "every process has a device of its own"
        if cuda
        else f"two processes need two free cores: there are {os.cpu_count()} here, and the load was {load:.1f} before"
    )
    return Report(
        f"training, {WAYS}-way 1-shot, {TASKS} tasks a meta-step, one thread a process",
        rows,
        f"{most} processes learn {rates[most] / one:.2f} times the tasks of one, {rates[most] / one / most:.2f} each "
        f"(≥ 0.9); losses of the first {ROW} meta-steps differ by {_difference(found[1], found[most]):.1e}; {wanted}",
    )


def _trained(count: int, device: str, repeats: int) -> Mapping[str, Sequence[float]]:
    """The metrics of a run in so many processes."""
    steps = ROW * (repeats + 1)
    settings = {
        **{"ways": WAYS, "tasks": TASKS, "threads": 1, "device": device, "schedule": "constant"},
        **{"meta-steps": steps, "checkpoint-every": steps, "log-every": ROW, "validate-every": 2 * steps},
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run(
            [sys.executable, *launcher, *COMMAND, "--out", str(out), "--quiet", *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"training in {count} processes failed:\n{done.stderr}")
        return read_metrics(out / METRICS)


def _difference(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> float:
    """Of the first rows' losses, relative.

    In single precision later rows say nothing: training multiplies a difference by a few at every meta-step, so that
    rounding is all over the loss after ten. Double precision, where whole runs compare, is for the tests.
    """
    ours, theirs = one["query_loss"][0], other["query_loss"][0]
    return abs(theirs - ours) / ours
