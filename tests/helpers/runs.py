"""Settings of training runs that take seconds, and how such runs are started, watched and compared."""

import csv
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from applications.datasets import ClassImages
from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks, TaskSampler
from applications.imaml.processes import joined

SMALL = Config(
    tasks=4, meta_steps=12, inner_steps=5, cg_steps=1, meta_lr=5e-3, log_every=4, validate_every=12,
    validation_tasks=2, device="cpu",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
# On images that show nothing.
SHORT = Config(
    *("glyphs", None, 3),
    tasks=2, meta_steps=6, inner_steps=2, cg_steps=2, log_every=2, checkpoint_every=100, validate_every=4,
    validation_tasks=3, device="cpu", schedule="constant",
)  # fmt: skip
SIZES = {"glyphs": {"train": 6, "validation": 3, "test": 5}}
CLOCK = ("seconds", "tasks_per_second")


def few_classes(name="glyphs", root=None, seed=0):
    images = torch.randint(0, 256, (14, 4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ClassImages(images, tuple(f"class {index}" for index in range(14)), name)


def state(folder, *, timed=False):
    """What a run has come to: all tensors of its checkpoint, and its metrics, but for the clock unless it is asked."""
    left_out = () if timed else CLOCK
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name not in left_out} for row in csv.DictReader(file)]
    return checkpoint.load(folder).tensors, rows


def _equal(tensor, other):
    # Sums of what an algorithm doesn't have are NaN.
    return torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def assert_same(folder, other):
    (tensors, rows), (other_tensors, other_rows) = state(folder), state(other)
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not _equal(tensors[name], other_tensors[name])] == []
    assert rows == other_rows


@contextmanager
def double_precision():
    """What is to be the same but for rounding is told from what is merely alike in double precision only."""
    sample = TaskSampler.sample

    def doubled(sampler, tasks):
        return Tasks(*(part.double() if part.is_floating_point() else part for part in sample(sampler, tasks)))

    torch.set_default_dtype(torch.float64)
    TaskSampler.sample = doubled
    try:
        yield
    finally:
        TaskSampler.sample = sample
        torch.set_default_dtype(torch.float32)


COMMAND = ("-m", "tests.helpers.runs")


def spawn(*arguments, launcher=(), **environment):
    """The command line on images that show nothing, in a process of its own.

    DOUBLE=1 computes in double precision; PATIENCE is how many seconds to wait for another process.
    """
    return subprocess.Popen(
        [sys.executable, *launcher, *COMMAND, *(str(argument) for argument in arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(folder, step, process):
    pointer, end = folder / "checkpoint.json", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if pointer.exists() and json.loads(pointer.read_text())["numbers"]["meta_step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()}")


def main():
    episodes.load, episodes.SPLIT_SIZES = few_classes, SIZES
    if patience := os.environ.get("PATIENCE"):
        command.joined = lambda: joined(timedelta(seconds=float(patience)))
    with double_precision() if os.environ.get("DOUBLE") else nullcontext():
        command.app()


if __name__ == "__main__":
    main()
