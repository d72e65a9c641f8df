"""Accuracy on tasks of unseen classes, with everything that the number depends on."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import special
from torch import Tensor

from applications.datasets import ClassImages, own_split
from applications.imaml.algorithms import accuracy, adapt, learnt_strengths, query_logits
from applications.imaml.checkpoint import CheckpointName, write_atomically
from applications.imaml.config import BatchNorm, Config, ConfigError
from applications.imaml.device import in_float32, use
from applications.imaml.episodes import (
    SplitName,
    Tasks,
    TaskSampler,
    check_same_data,
    generator_for,
    load_splits,
)
from applications.imaml.idle import idle
from applications.imaml.networks import Parameters
from applications.imaml.processes import Processes
from applications.imaml.products import Products
from applications.imaml.run_folder import CONFIG
from applications.imaml.trained import Network, load_network
from applications.imaml.words import counted

REPORT = "evaluation.json"
# Of percentages in a report: beyond what any number of tasks can tell.
_DIGITS = 6


class Accuracies(NamedTuple):
    """Fraction of each task's query images classified rightly, before and after adaptation, float64 ``[tasks]``."""

    before: Tensor
    after: Tensor


def accuracies(
    theta: Parameters, sampler: TaskSampler, config: Config, tasks: int, processes: Processes = Processes()
) -> Accuracies:
    """Measure the accuracy on each of a number of tasks, in float32, whatever the network is trained in.

    Args:
        theta: meta-parameters.
        sampler: draws the tasks.
        config: of the run; its inner solver, its batch normalisation, and how many tasks to solve at once.
        tasks: how many.
        processes: those that share the tasks.

    Returns:
        One accuracy a task, on the CPU, of all tasks in every process.
    """
    with in_float32(config) as exact, torch.no_grad():
        found = _shared_accuracies(theta, sampler, exact, tasks, processes)
    processes.add_up(found)
    before, after = found
    return Accuracies(before, after)


def _shared_accuracies(
    theta: Parameters, sampler: TaskSampler, config: Config, tasks: int, processes: Processes
) -> Tensor:
    """Before and after, ``[2, tasks]``, of this process's share of the tasks, and zero for the others."""
    how = Products.of(config)

    def judge(task: Tasks) -> tuple[Tensor, Tensor]:
        phi = adapt(theta, task, config).value
        before, after = (query_logits(values, task, config.batch_norm, how=how) for values in (theta, phi))
        return accuracy(before, task.query_labels), accuracy(after, task.query_labels)

    found = torch.zeros(2, tasks, dtype=torch.float64)
    for first in range(0, tasks, config.tasks):
        drawn = sampler.sample(min(config.tasks, tasks - first))
        share = processes.share(len(drawn.query_labels))
        if share.start < share.stop:
            judged = torch.vmap(judge)(Tasks(*(part[share] for part in drawn)))
            count = drawn.query_labels.shape[-1]
            # A mean in single precision is off in the eighth digit; how many were right is a whole number.
            right = (torch.stack(judged).cpu().double() * count).round()
            found[:, first + share.start : first + share.stop] = right / count
    return found


@dataclass(frozen=True)
class Protocol:
    """How an accuracy is measured.

    Args:
        tasks: how many tasks.
        split: whose classes they are drawn from.
        batch_norm: whose statistics normalise the query images; None as in training.
        seed: chooses the tasks.
        queries: query images of a class; None as in training. 1, as many as support images, and 15 are usual, and with
            transductive batch normalisation more of them make a task easier.
        inner_steps: steps of the inner solver; None as in training.
        regularized: whether tasks are learnt with the pull towards the meta-parameters, as in training, or by the plain
            loss of the support images.
        checkpoint: which network of the run.

    Raises:
        ConfigError: if there are fewer than two tasks, which have no spread, or the seed is negative.
    """

    tasks: int = 600
    split: SplitName = "test"
    batch_norm: BatchNorm | None = None
    seed: int = 0
    queries: int | None = None
    inner_steps: int | None = None
    regularized: bool = True
    checkpoint: CheckpointName = "last"

    def __post_init__(self) -> None:
        if self.tasks < 2:
            raise ConfigError(f"tasks={self.tasks} has no spread to make an interval of; pass at least 2.")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} cannot be; pass an integer of at least 0.")

    def applied(self, config: Config) -> Config:
        """What a network is measured with; in float32, whatever it was trained in.

        Args:
            config: of the run.

        Returns:
            Its settings, with those of this protocol.

        Raises:
            ConfigError: if a setting cannot be.
        """
        return replace(
            config,
            precision="float32",
            batch_norm=self.batch_norm or config.batch_norm,
            queries=config.queries if self.queries is None else self.queries,
            inner_steps=config.inner_steps if self.inner_steps is None else self.inner_steps,
        )


@dataclass(frozen=True)
class Evaluation:
    """A measured accuracy, and what it depends on.

    Args:
        run: settings of the run.
        config: the same, with what the protocol has otherwise.
        protocol: how it was measured.
        partition: name of the split into training, validation and test classes.
        source: what the images are.
        classes: number of classes of the split.
        meta_step: meta-steps that led to the network.
        measured: one accuracy a task.
        learnt_lam: the strengths by layer, where they were learnt.
    """

    run: Config
    config: Config
    protocol: Protocol
    partition: str
    source: str
    classes: int
    meta_step: int
    measured: Accuracies
    learnt_lam: Mapping[str, float]

    @property
    def regularized(self) -> bool:
        """Whether tasks were learnt with a pull: the protocol may leave it out, and not every algorithm has one."""
        return self.protocol.regularized and bool(self.config.lam)

    def row(self) -> dict[str, Any]:
        """The accuracy in percent, its 95 % interval, and everything that they depend on; None for what isn't used."""
        config, unused = self.config, idle(self.run)
        mean, interval = mean_and_interval(self.measured.after)
        return {
            "data": config.data,
            "source": self.source,
            "partition": self.partition,
            "split": f"{self.protocol.split}, {self.classes} classes",
            "ways": config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "algorithm": config.algorithm,
            "batch_norm": config.batch_norm,
            "inner": config.inner,
            "inner_steps": config.inner_steps,
            "inner_lr": config.inner_lr,
            "regularized": self.regularized,
            "lam": None if self.learnt_lam else config.lam if self.regularized else 0.0,
            "learn_lam": config.learn_lam,
            "learnt_lam": dict(self.learnt_lam) or None,
            "query_sets": config.query_sets,
            "curvature": None if "curvature" in unused else config.curvature,
            "cg_steps": None if "cg_steps" in unused else config.cg_steps,
            "tasks_per_meta_step": config.tasks,
            "checkpoint": self.protocol.checkpoint,
            "meta_step": self.meta_step,
            "training_seed": config.seed,
            "split_seed": config.split_seed,
            "tasks": self.protocol.tasks,
            "task_seed": self.protocol.seed,
            "before": round(100 * self.measured.before.double().mean().item(), _DIGITS),
            "accuracy": round(mean, _DIGITS),
            "interval": round(interval, _DIGITS),
        }

    def __str__(self) -> str:
        row = self.row()
        step = "" if row["inner"] in ("hessian-free", "lbfgs") else f" of lr {row['inner_lr']:g}"
        learnt = self.learnt_lam.values()
        lam = f"lam learnt, {min(learnt):g} to {max(learnt):g}" if learnt else f"lam {self.config.lam:g}"
        pull = lam if self.regularized else "not regularized"
        queries, meta_steps = counted(self.config.queries, "query image"), counted(self.meta_step, "meta-step")
        steps = counted(self.config.inner_steps, f"{self.config.inner} step")
        return (
            f"{row['source']} {row['ways']}-way {row['shots']}-shot, {queries} a class | "
            f"{row['split']} of split {row['partition']}, split seed {row['split_seed']} | "
            f"{row['algorithm']}, {meta_steps} ({row['checkpoint']} checkpoint), "
            f"seed {row['training_seed']} | {steps}{step}, {pull} | batch norm {row['batch_norm']} | "
            f"{row['tasks']} tasks, seed {row['task_seed']} | before {row['before']:.2f} % | "
            f"after {row['accuracy']:.2f} ± {row['interval']:.2f} %"
        )

    def save(self, path: Path) -> None:
        """Write the row, the run's settings and the protocol as JSON, and beside it the accuracy of every task as CSV.

        Args:
            path: JSON to write; the CSV is called alike.
        """
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["task", "before", "after"])
        before, after = ([f"{value:.8g}" for value in part.tolist()] for part in self.measured)
        table.writerows(zip(range(self.protocol.tasks), before, after, strict=True))
        write_atomically(path.with_suffix(".csv"), text.getvalue().encode())
        content = {"row": self.row(), "config": asdict(self.run), "protocol": asdict(self.protocol)}
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def evaluate(config: Config, folder: Path, protocol: Protocol) -> Evaluation:
    """Measure the accuracy of a run.

    Args:
        config: of the run; where and how fast to compute may differ.
        folder: of the run.
        protocol: how to measure.

    Returns:
        The evaluation.

    Raises:
        CheckpointError: if there is no checkpoint to read, or the data are not those of the run.
        ConfigError: if the run's split has no classes for this.
        OSError: if the dataset cannot be read.
        ValueError: if it is damaged, or too small for these tasks.
    """
    device = use(replace(config, precision="float32"))
    network = load_network(folder, device, protocol.checkpoint)
    splits = load_splits(config, device)
    check_same_data(network.data, splits)
    if protocol.split not in splits:
        raise ConfigError(
            f"split={protocol.split!r} has no classes, since the run's split, {config.split or 'its own'}, has none "
            f"for it; pass one of {', '.join(splits)}."
        )
    return replace(measure(config, network, splits[protocol.split], protocol), run=Config.load(folder / CONFIG))


def measure(config: Config, network: Network, dataset: ClassImages, protocol: Protocol) -> Evaluation:
    """Measure the accuracy of a network.

    Args:
        config: of the run that it comes from.
        network: what to measure.
        dataset: the classes of the protocol's split.
        protocol: how to measure.

    Returns:
        The evaluation.

    Raises:
        ValueError: if the dataset is too small for these tasks.
    """
    run, config = config, protocol.applied(config)
    adapting = config if protocol.regularized else _unregularized(config)
    measured = accuracies(network.theta, sampler_for(config, dataset, protocol), adapting, protocol.tasks)
    learnt = learnt_strengths(network.theta) if protocol.regularized else {}
    partition = config.split or own_split(config.data, has_parts=bool(dataset.parts))
    return Evaluation(
        run, config, protocol, partition, dataset.source, dataset.classes, network.meta_step, measured, learnt
    )


def _unregularized(config: Config) -> Config:
    # iMAML cannot be without the pull, for the sake of its meta-gradient. Nothing is differentiated here, and then its
    # first-order form is the same.
    algorithm = "fomaml" if config.algorithm == "imaml" else config.algorithm
    return replace(config, algorithm=algorithm, lam=0.0, learn_lam="none", curvature="gauss-newton", damping=0.0)


def sampler_for(config: Config, dataset: ClassImages, protocol: Protocol) -> TaskSampler:
    """Draws the tasks of a protocol, the same ones whenever it is made anew.

    Args:
        config: ways, shots and queries.
        dataset: the classes of the protocol's split.
        protocol: its split and seed.

    Returns:
        The sampler.

    Raises:
        ValueError: if the dataset is too small for these tasks.
    """
    generator = generator_for(protocol.seed, f"{protocol.split} tasks", dataset.images.device)
    return TaskSampler(dataset, config.ways, config.shots, config.queries, generator)


def mean_and_interval(fractions: Tensor) -> tuple[float, float]:
    """Mean and half of its 95 % interval, t s/sqrt(tasks).

    s is the standard deviation over tasks and t the 97.5 % quantile of Student's distribution of tasks - 1 degrees of
    freedom, since s is itself an estimate: 12.7 for 2 tasks, 2.262 for 10, 1.984 for 100 and 1.964 for 600, where a
    normal distribution has 1.960.

    Args:
        fractions: one accuracy a task, between 0 and 1, of at least two tasks, ``[tasks]``.

    Returns:
        Both in percent.
    """
    percent = 100 * fractions.double()
    quantile = float(special.stdtrit(len(percent) - 1, 0.975))
    return percent.mean().item(), quantile * percent.std().item() / math.sqrt(len(percent))
