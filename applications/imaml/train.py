"""Meta-training: sample tasks, differentiate the meta-loss, step Adam; record, validate, save, resume."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from applications.imaml import checkpoint
from applications.imaml.algorithms import initial_strengths
from applications.imaml.captured import CapturedStep, CudaGraph, check_capturable
from applications.imaml.checkpoint import Checkpoint, CheckpointError
from applications.imaml.config import Config, ConfigError
from applications.imaml.criterion import criterion_of
from applications.imaml.device import use
from applications.imaml.ending import Best, Ending, continued
from applications.imaml.episodes import Family, SplitName, check_same_data, check_ways, generator_for, identity_of
from applications.imaml.events import Events, check_importable
from applications.imaml.families import image_of, load_families, new_network, sampler_of
from applications.imaml.figures import draw_curve
from applications.imaml.interruptions import interruptions
from applications.imaml.meta_step import MetaStep
from applications.imaml.metrics import MetricsFile, columns, read_metrics
from applications.imaml.networks import Parameters
from applications.imaml.processes import Processes
from applications.imaml.progress import Display, announced
from applications.imaml.remedies import remedies
from applications.imaml.run_folder import CURVE, EVENTS, METRICS, RunError, claim
from applications.imaml.scores import scores
from applications.imaml.words import counted


@dataclass(frozen=True)
class Limits:
    """When to stop early and what to show; none of it changes what is computed.

    Args:
        seconds: stop cleanly after this time; None for no limit.
        quiet: show no progress.
        tensorboard: write the metrics as TensorBoard events as well.

    Raises:
        ConfigError: if the time is not above 0.
    """

    seconds: float | None = None
    quiet: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} cannot be; pass a number above 0.")


def train(
    config: Config, out: Path, limits: Limits, *, resume: bool = False, processes: Processes = Processes()
) -> int:
    """Train until the last meta-step, the time limit or Ctrl-C.

    Args:
        config: of the run.
        out: folder of the run; gets config.json, metrics.csv, curve.png and the checkpoint, which holds the network of
            the last meta-step and that of the best score on validation classes or tasks.
        limits: when to stop early.
        resume: go on from the checkpoint in that folder, to the bit as if there had been no interruption.
        processes: those that share the tasks of a meta-step, this one among them.

    Returns:
        Meta-steps done in all.

    Raises:
        RunError: if the folder holds a run already and isn't to be resumed, or cannot be written; if the loss is no
            longer finite, in which case the last checkpoint is from before; if TensorBoard is asked for and missing;
            if another process has ended; or as FirstFailedError in place of what the first process raises.
        CheckpointError: if a checkpoint cannot be read or written, or was made with other data.
        ConfigError: if there are more processes than tasks.
        OSError: if the dataset cannot be read or the metrics not be written.
        ValueError: if the dataset is damaged or too small for these tasks.
    """
    processes.check(config)
    if limits.tensorboard:
        processes.alike(check_importable)
    quiet = limits.quiet or not processes.is_first
    with announced(_what(config), quiet=quiet) as show:
        run = _Run(config, out, processes, resume=resume, tensorboard=limits.tensorboard)
        show(f"; {run}")
    begun = time.monotonic()
    display = Display(config.meta_steps, run.meta_step, config.tasks, limits.seconds, quiet, criterion_of(config))
    with interruptions() as interrupted, closing(run), display:
        while run.meta_step < config.meta_steps:
            run.step()
            display.step(run.meta_step)
            if run.meta_step % config.log_every == 0 or run.meta_step == config.meta_steps:
                display.row(run.record(), run.recording_seconds)
            late = limits.seconds is not None and time.monotonic() - begun >= limits.seconds
            # Asked after every step, since a signal doesn't reach all processes in the same one.
            stop = processes.any(late or interrupted.is_set())
            if stop or run.meta_step % config.checkpoint_every == 0 or run.meta_step == config.meta_steps:
                run.save()
            if stop:
                break
    run.draw()
    return run.meta_step


def _what(config: Config) -> str:
    return (
        f"{config.data} {config.size}, {config.algorithm}: "
        f"{counted(config.meta_steps, 'meta-step')} of {counted(config.tasks, 'task')}"
    )


def _check(finite: bool, told: str, config: Config) -> None:
    if not finite:
        raise RunError(
            f"{told}; start a run in a new folder with {remedies(config)}; the last checkpoint is from before."
        )


class _Run:
    """Everything that changes during training, restored from the checkpoint or fresh."""

    def __init__(self, config: Config, out: Path, processes: Processes, *, resume: bool, tensorboard: bool) -> None:
        self._config, self._out, self._processes = config, out, processes
        self._criterion = criterion_of(config)
        self._device = processes.alike(self._place)
        splits = processes.alike(self._splits)
        generator = generator_for(config.seed, "training tasks", self._device)
        sampler = sampler_of(splits["train"], config, generator, config.query_sets)
        self._validation, self._data = splits.get("validation"), identity_of(splits)
        self._source, self._image = splits["train"].source, image_of(splits["train"])
        network = new_network(splits["train"], config, generator_for(config.seed, "initialisation"))
        drawn = network | initial_strengths(network, config)
        self.theta: Parameters = {name: value.to(self._device).requires_grad_() for name, value in drawn.items()}
        # With or without a graph, so that both round alike.
        capturable = self._device.type == "cuda" or config.graph
        self._meta_step = MetaStep(self.theta, sampler, config, processes, capturable=capturable)
        self._take = CapturedStep(self._meta_step, CudaGraph(self._device)) if config.graph else self._meta_step
        self.meta_step = 0
        self._trained_seconds = 0.0
        self._row_seconds = 0.0
        # Of the last row: validating, writing and drawing.
        self.recording_seconds = 0.0
        self._clock = time.monotonic()
        self._best: Best | None = None
        self._ending: Ending | None = None
        # Both in the first process only.
        self._metrics: MetricsFile | None = None
        self._events: Events | None = None
        saved = processes.from_first(lambda: self._open(resume))
        if saved is not None:
            check_same_data(saved.numbers.get("data"), splits)
            self._restore(saved)
        if tensorboard and processes.is_first:
            # What was written at an end that is none any more is dropped as well.
            ended = saved is not None and saved.numbers.get("row_is_due", False)
            self._events = Events(out / EVENTS, self.meta_step - ended)
        if saved is None:
            self.save()
        elif saved.numbers.get("row_is_due") and self.meta_step % config.log_every == 0:
            self.record()

    def __str__(self) -> str:
        count = sum(value.numel() for value in self.theta.values())
        since = f", from meta-step {self.meta_step}" if self.meta_step else ""
        return f"{count:,} parameters on {self._device}{since}"

    def _place(self) -> torch.device:
        device = use(self._config)
        check_capturable(self._config, device, self._processes)
        return device

    def _splits(self) -> dict[SplitName, Family]:
        splits = load_families(self._config, self._device)
        check_ways(splits, self._config.ways)
        return splits

    def _open(self, resume: bool) -> Checkpoint | None:
        """Take the folder and read its checkpoint; there is none if a resumed run was killed before its first."""
        # The network, Adam's two moments, and the best network; at an odd end, the best one before it.
        networks = 5 if self._config.meta_steps % self._config.validate_every else 4
        size = networks * sum(value.numel() * value.element_size() for value in self.theta.values())
        claim(self._out, self._config, size, resume=resume)
        there = (self._out / checkpoint.POINTER).exists()
        saved = continued(checkpoint.load(self._out), self._config.meta_steps) if there else None
        size = 0 if saved is None else saved.numbers["metrics_bytes"]
        self._metrics = MetricsFile(self._out / METRICS, size, columns(self._criterion))
        return saved

    def step(self) -> None:
        """Take one meta-step, without waiting for the device."""
        self._meta_step.set_rate(self._meta_lr())
        self._take()
        self.meta_step += 1

    def _meta_lr(self) -> float:
        """A pure function of the meta-step, so that a resumed run follows the same schedule."""
        config = self._config
        if config.schedule == "constant":
            return config.meta_lr
        return config.meta_lr * (1 + math.cos(math.pi * self.meta_step / config.meta_steps)) / 2

    def record(self) -> dict[str, float]:
        """Write a row of metrics, of the meta-steps since the one before; the last one has a validation."""
        config = self._config
        meter = self._meta_step.meter
        self._processes.average(config.tasks, meter.sums)
        validates = self.meta_step % config.validate_every == 0
        if self.meta_step == config.meta_steps and not validates:
            validates = True
            self._ending = Ending(self._metrics_bytes, self._row_seconds, meter.sums.clone(), self._best)
        taken = (self.meta_step - 1) % config.log_every + 1
        row: dict[str, float] = {"meta_step": self.meta_step, **meter.take(taken)}
        loss = row[f"query_{self._criterion.loss_name}"]
        told = f"the query loss is {loss} in the {taken} meta-steps before {self.meta_step}"
        self._processes.from_first(lambda: _check(math.isfinite(loss), told, config))
        self._tick()
        row["seconds"] = self._trained_seconds
        row["tasks_per_second"] = taken * config.tasks / max(self._trained_seconds - self._row_seconds, 1e-9)
        row[self._criterion.validation] = self._validate() if validates else math.nan
        self._processes.from_first(lambda: self._write(row))
        if validates:
            self.draw()
        # Time spent validating is time of the run, but not of any row's tasks.
        self._tick()
        self.recording_seconds = self._trained_seconds - row["seconds"]
        self._row_seconds = self._trained_seconds
        return row

    def _write(self, row: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.append(row)
        if self._events is not None:
            self._events.append(row)

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = self._meta_step.tensors()
        # Sums of what an algorithm doesn't have are NaN.
        finite = all(bool(value.isfinite().all()) for name, value in tensors.items() if name != "meter")
        told = f"the parameters are no longer finite at meta-step {self.meta_step}"
        self._processes.from_first(lambda: _check(finite, told, self._config))
        # Every process goes on from the mean, as one that is resumed from here does.
        self._processes.average(self._config.tasks, self._meta_step.meter.sums)
        if self._best is not None:
            tensors |= self._best.tensors()
        if self._ending is not None:
            tensors |= self._ending.tensors(self._best)
        self._processes.from_first(
            lambda: checkpoint.save(self._out, self.meta_step, Checkpoint(tensors, self._numbers()))
        )

    def _numbers(self) -> dict[str, Any]:
        best, ending = self._best, self._ending
        self._tick()
        return {
            "meta_step": self.meta_step,
            "image": self._image,
            "data": self._data,
            "device": self._device.type,
            "best": None if best is None else best.numbers(),
            "ending": None if ending is None else ending.numbers(),
            "metrics_bytes": self._metrics_bytes,
            "trained_seconds": self._trained_seconds,
            "row_seconds": self._row_seconds,
        }

    @property
    def _metrics_bytes(self) -> int:
        return 0 if self._metrics is None else self._metrics.size

    def draw(self) -> None:
        """Draw the learning curve."""
        if self._processes.is_first:
            draw_curve(read_metrics(self._out / METRICS), self._config, self._source, self._out / CURVE)

    def close(self) -> None:
        """Let go of the files."""
        if self._events is not None:
            self._events.close()

    def _restore(self, saved: Checkpoint) -> None:
        tensors, numbers = saved
        # Runs that don't say were made when there was no best network.
        if numbers.get("device", self._device.type) != self._device.type:
            raise CheckpointError(
                f"the run draws its tasks on {numbers['device']}, and {self._device.type} would draw others; continue "
                f"it with --device {numbers['device']}, or start a run in a new folder."
            )
        self._meta_step.restore(tensors)
        self.meta_step = numbers["meta_step"]
        self._trained_seconds, self._row_seconds = numbers["trained_seconds"], numbers["row_seconds"]
        if best := numbers.get("best"):
            network = {name: tensors[f"best.{name}"].to(self._device) for name in self.theta}
            name = self._criterion.score_name
            self._best = Best(best["meta_step"], name, best[name], network)

    def _validate(self) -> float:
        if self._validation is None:
            return math.nan
        config, criterion = self._config, self._criterion
        # The same tasks every time, so that the curve shows the network and not the draw.
        generator = generator_for(config.seed, "validation tasks", self._device)
        sampler = sampler_of(self._validation, config, generator)
        after = scores(self.theta, sampler, config, config.validation_tasks, self._processes).after
        score = after.double().mean().item()
        if self._best is None or criterion.better(score, self._best.score):
            network = {name: value.detach().clone() for name, value in self.theta.items()}
            self._best = Best(self.meta_step, criterion.score_name, score, network)
        return score

    def _tick(self) -> None:
        now = time.monotonic()
        self._trained_seconds += now - self._clock
        self._clock = now
