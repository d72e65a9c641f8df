"""Meta-training: sample tasks, differentiate the meta-loss, step Adam; record, validate, save, resume."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from applications.imaml import checkpoint
from applications.imaml.algorithms import initial_strengths, meta_loss
from applications.imaml.checkpoint import Checkpoint
from applications.imaml.config import Config
from applications.imaml.device import use
from applications.imaml.episodes import TaskSampler, generator_for, load_splits
from applications.imaml.evaluate import accuracies
from applications.imaml.figures import draw_curve
from applications.imaml.metrics import Meter, MetricsFile, read_metrics
from applications.imaml.networks import Parameters, initialize
from applications.imaml.progress import Display

CONFIG, METRICS, CURVE = "config.json", "metrics.csv", "curve.png"
# Two checkpoints of the largest network here, which is what is on the disk at once, with room to spare.
FREE_BYTES = 32 * 2**20

_CALMER = (
    "start a run with a smaller inner_lr or meta_lr, a larger lam or damping, or curvature gauss-newton; the last "
    "checkpoint is from before."
)


class RunError(RuntimeError):
    """A run that cannot start or go on: says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """When to stop early and what to show; none of it changes what is computed.

    Args:
        seconds: stop cleanly after this time; None for no limit.
        quiet: show no progress.
    """

    seconds: float | None = None
    quiet: bool = False


def _make_folder(config: Config, out: Path) -> None:
    """Make the folder of a new run, so that whatever is wrong with it is known before training starts."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < FREE_BYTES:
            raise RunError(
                f"{out} has {free / 2**20:.0f} MiB left, and a run needs {FREE_BYTES / 2**20:.0f}; make room, or pass "
                f"a folder elsewhere."
            )
        config.save(out / CONFIG)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error}); pass a folder that can.") from error


def train(config: Config, out: Path, limits: Limits, *, resume: bool = False) -> int:
    """Train until the last meta-step, the time limit or Ctrl-C.

    Args:
        config: of the run.
        out: folder of the run; gets config.json, metrics.csv, curve.png and the checkpoint.
        limits: when to stop early.
        resume: go on from the checkpoint in that folder, to the bit as if there had been no interruption.

    Returns:
        Meta-steps done in all.

    Raises:
        RunError: if the folder holds a run already and isn't to be resumed, or cannot be written; or if the loss is
            no longer finite, in which case the last checkpoint is from before.
        CheckpointError: if a checkpoint cannot be read or written.
        OSError: if the dataset cannot be read or the metrics not be written.
        ValueError: if the dataset is damaged or too small for these tasks.
    """
    run = _Run(config, out, resume)
    begun = time.monotonic()
    display = Display(config.meta_steps, run.meta_step, config.tasks, limits.seconds, limits.quiet)
    with _interruptions() as interrupted, display:
        while run.meta_step < config.meta_steps:
            run.step()
            display.step(run.meta_step)
            if run.meta_step % config.log_every == 0:
                display.row(run.record())
            late = limits.seconds is not None and time.monotonic() - begun >= limits.seconds
            stop = late or interrupted.is_set()
            if stop or run.meta_step % config.checkpoint_every == 0 or run.meta_step == config.meta_steps:
                run.save()
            if stop:
                break
    run.draw()
    return run.meta_step


class _Run:
    """Everything that changes during training, restored from the checkpoint or fresh."""

    def __init__(self, config: Config, out: Path, resume: bool) -> None:
        if not resume and (out / CONFIG).exists():
            raise RunError(f"{out} holds a run already; continue it with --resume, or pass another folder.")
        self._config, self._out = config, out
        self._device = use(config)
        splits = load_splits(config, self._device)
        self._train_generator = generator_for(config.seed, "training tasks", self._device)
        self._sampler = TaskSampler(
            splits["train"], config.ways, config.shots, config.queries, self._train_generator, config.query_sets
        )
        self._validation_images = splits.get("validation")
        *_, channels, _, side = splits["train"].images.shape
        self._source, self._image = splits["train"].source, (channels, side)
        network = initialize(config.ways, channels, side, generator_for(config.seed, "initialisation"))
        drawn = network | initial_strengths(network, config)
        self.theta: Parameters = {name: value.to(self._device).requires_grad_() for name, value in drawn.items()}
        self._optimizer = torch.optim.Adam(self.theta.values(), lr=config.meta_lr)
        self._meta_loss = meta_loss(config)
        self._meter = Meter(self._device)
        self.meta_step = 0
        self._trained_seconds = 0.0
        self._row_seconds = 0.0
        self._clock = time.monotonic()
        if resume:
            config.save(out / CONFIG)
        else:
            _make_folder(config, out)
        if (out / checkpoint.POINTER).exists():
            self._restore(checkpoint.load(out))
        else:
            # Also where a run is resumed that was killed before its first checkpoint.
            self._metrics = MetricsFile(out / METRICS, 0)
            self.save()

    def step(self) -> None:
        """Take one meta-step, without waiting for the device."""
        outcome = self._meta_loss(self.theta, self._sampler.sample(self._config.tasks))
        self._optimizer.zero_grad()
        outcome.loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = self._meta_lr()
        self._optimizer.step()
        self._meter.add(outcome)
        self.meta_step += 1

    def _meta_lr(self) -> float:
        """A pure function of the meta-step, so that a resumed run follows the same schedule."""
        config = self._config
        if config.schedule == "constant":
            return config.meta_lr
        return config.meta_lr * (1 + math.cos(math.pi * self.meta_step / config.meta_steps)) / 2

    def record(self) -> dict[str, float]:
        """Write a row of metrics."""
        config = self._config
        row: dict[str, float] = {"meta_step": self.meta_step, **self._meter.take(config.log_every)}
        if not math.isfinite(row["query_loss"]):
            raise RunError(
                f"the query loss is {row['query_loss']} in the {config.log_every} meta-steps before {self.meta_step}; "
                f"{_CALMER}"
            )
        self._tick()
        row["seconds"] = self._trained_seconds
        row["tasks_per_second"] = config.log_every * config.tasks / max(self._trained_seconds - self._row_seconds, 1e-9)
        row["validation_accuracy"] = self._validate() if self.meta_step % config.validate_every == 0 else math.nan
        self._metrics.append(row)
        if self.meta_step % config.validate_every == 0:
            self.draw()
        # Time spent validating is time of the run, but not of the next row's tasks.
        self._tick()
        self._row_seconds = self._trained_seconds
        return row

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {f"theta.{name}": value for name, value in self.theta.items()}
        # Adam has no state before its first step.
        state = self._optimizer.state_dict()["state"]
        for index, name in enumerate(self.theta):
            tensors |= {f"adam.{name}.{key}": value for key, value in state.get(index, {}).items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise RunError(f"the parameters are no longer finite at meta-step {self.meta_step}; {_CALMER}")
        # Not checked: sums of what an algorithm doesn't have are NaN.
        tensors |= {"training_tasks": self._train_generator.get_state(), "meter": self._meter.sums}
        self._tick()
        numbers = {
            "meta_step": self.meta_step,
            "image": self._image,
            "metrics_bytes": self._metrics.size,
            "trained_seconds": self._trained_seconds,
            "row_seconds": self._row_seconds,
        }
        checkpoint.save(self._out, self.meta_step, Checkpoint(tensors, numbers))

    def draw(self) -> None:
        """Draw the learning curve."""
        draw_curve(read_metrics(self._out / METRICS), self._config, self._source, self._out / CURVE)

    def _restore(self, saved: Checkpoint) -> None:
        tensors, numbers = saved
        with torch.no_grad():
            for name, value in self.theta.items():
                value.copy_(tensors[f"theta.{name}"])
        if numbers["meta_step"]:
            keys = ("step", "exp_avg", "exp_avg_sq")
            # A parameter that cancels, as a bias before a normalisation does, may have had no gradient and so no state.
            state = {
                index: {key: tensors[f"adam.{name}.{key}"] for key in keys}
                for index, name in enumerate(self.theta)
                if f"adam.{name}.step" in tensors
            }
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._train_generator.set_state(tensors["training_tasks"])
        self._meter.sums.copy_(tensors["meter"])
        self.meta_step = numbers["meta_step"]
        self._trained_seconds, self._row_seconds = numbers["trained_seconds"], numbers["row_seconds"]
        self._metrics = MetricsFile(self._out / METRICS, numbers["metrics_bytes"])

    def _validate(self) -> float:
        if self._validation_images is None:
            return math.nan
        config = self._config
        # The same tasks every time, so that the curve shows the network and not the draw.
        generator = generator_for(config.seed, "validation tasks", self._device)
        sampler = TaskSampler(self._validation_images, config.ways, config.shots, config.queries, generator)
        return accuracies(self.theta, sampler, config, config.validation_tasks).after.mean().item()

    def _tick(self) -> None:
        now = time.monotonic()
        self._trained_seconds += now - self._clock
        self._clock = now


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one ends the program at once, as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals.
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
