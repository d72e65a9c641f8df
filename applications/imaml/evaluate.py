"""Accuracy on tasks of unseen classes, or error on unseen tasks, with everything that the number depends on."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from scipy import special
from torch import Tensor

from applications.datasets import ClassImages, own_split
from applications.imaml.algorithms import learnt_strengths
from applications.imaml.checkpoint import CheckpointName, write_atomically
from applications.imaml.config import BatchNorm, Config, ConfigError
from applications.imaml.criterion import criterion_of
from applications.imaml.device import use
from applications.imaml.episodes import Family, SplitName, check_same_data, generator_for
from applications.imaml.families import Sampler, load_families, sampler_of
from applications.imaml.idle import idle
from applications.imaml.run_folder import CONFIG
from applications.imaml.scores import Scores, scores
from applications.imaml.trained import Network, load_network
from applications.imaml.words import counted

REPORT = "evaluation.json"
# Of percentages in a report: beyond what any number of tasks can tell.
_DIGITS = 6


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
        shots: support images of a class; None as in training.
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
    shots: int | None = None

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
            shots=config.shots if self.shots is None else self.shots,
            queries=config.queries if self.queries is None else self.queries,
            inner_steps=config.inner_steps if self.inner_steps is None else self.inner_steps,
        )

    def adapting(self, config: Config) -> Config:
        """What tasks are learnt with: with the pull, or by the plain loss.

        Args:
            config: of the run.

        Returns:
            Its settings, with those of this protocol.

        Raises:
            ConfigError: if a setting cannot be.
        """
        applied = self.applied(config)
        if self.regularized:
            return applied
        # iMAML cannot be without the pull, for the sake of its meta-gradient. Nothing is differentiated here, and then
        # its first-order form is the same.
        algorithm = "fomaml" if config.algorithm == "imaml" else config.algorithm
        return replace(applied, algorithm=algorithm, lam=0.0, learn_lam="none", curvature="gauss-newton", damping=0.0)


@dataclass(frozen=True)
class Evaluation:
    """A measured score, and what it depends on.

    Args:
        run: settings of the run.
        config: the same, with what the protocol has otherwise.
        protocol: how it was measured.
        partition: name of the split into training, validation and test classes; None where there are none.
        source: what the images are, or the formula is.
        classes: number of classes of the split, or None.
        meta_step: meta-steps that led to the network.
        measured: one score a task.
        learnt_lam: the strengths by layer, where they were learnt.
    """

    run: Config
    config: Config
    protocol: Protocol
    partition: str | None
    source: str
    classes: int | None
    meta_step: int
    measured: Scores
    learnt_lam: Mapping[str, float]

    @property
    def regularized(self) -> bool:
        """Whether tasks were learnt with a pull: the protocol may leave it out, and not every algorithm has one."""
        return self.protocol.regularized and bool(self.config.lam)

    def row(self) -> dict[str, Any]:
        """The score, its 95 % interval, and everything that they depend on; None for what isn't used.

        An accuracy is in percent; of regression, "mse" stands in its place.
        """
        config, unused, criterion = self.config, idle(self.run), criterion_of(self.config)
        mean, interval = mean_and_interval(self.measured.after, criterion.scale)
        before = criterion.scale * self.measured.before.double().mean().item()

        def used(name: str) -> Any:
            return None if name in unused else getattr(config, name)

        return {
            "data": config.data,
            "source": self.source,
            "partition": self.partition,
            "split": self.protocol.split + ("" if self.classes is None else f", {self.classes} classes"),
            "ways": used("ways"),
            "shots": config.shots,
            "queries": config.queries,
            "algorithm": config.algorithm,
            "batch_norm": used("batch_norm"),
            "inner": config.inner,
            "inner_steps": config.inner_steps,
            "inner_lr": config.inner_lr,
            "regularized": self.regularized,
            "lam": None if self.learnt_lam else config.lam if self.regularized else 0.0,
            "learn_lam": config.learn_lam,
            "learnt_lam": dict(self.learnt_lam) or None,
            "query_sets": used("query_sets"),
            "curvature": used("curvature"),
            "cg_steps": used("cg_steps"),
            "tasks_per_meta_step": config.tasks,
            "checkpoint": self.protocol.checkpoint,
            "meta_step": self.meta_step,
            "training_seed": config.seed,
            "split_seed": used("split_seed"),
            "tasks": self.protocol.tasks,
            "task_seed": self.protocol.seed,
            "before": round(before, _DIGITS),
            criterion.score_name: round(mean, _DIGITS),
            "interval": round(interval, _DIGITS),
        }

    def __str__(self) -> str:
        row = self.row()
        step = "" if row["inner"] in ("hessian-free", "lbfgs") else f" of lr {row['inner_lr']:g}"
        learnt = self.learnt_lam.values()
        lam = f"lam learnt, {min(learnt):g} to {max(learnt):g}" if learnt else f"lam {self.config.lam:g}"
        pull = lam if self.regularized else "not regularized"
        meta_steps = counted(self.meta_step, "meta-step")
        steps = counted(self.config.inner_steps, f"{self.config.inner} step")
        if self.config.is_regression:
            drawn, norm = f"{counted(self.config.queries, 'query point')} | {row['split']} tasks", ""
            told = f"MSE before {row['before']:.3f} | after {row['mse']:.3f} ± {row['interval']:.3f}"
        else:
            drawn = (
                f"{counted(self.config.queries, 'query image')} a class | {row['split']} of split {row['partition']}, "
                f"split seed {row['split_seed']}"
            )
            norm = f" | batch norm {row['batch_norm']}"
            told = f"before {row['before']:.2f} % | after {row['accuracy']:.2f} ± {row['interval']:.2f} %"
        return (
            f"{row['source']} {self.config.size}, {drawn} | {row['algorithm']}, {meta_steps} ({row['checkpoint']} "
            f"checkpoint), seed {row['training_seed']} | {steps}{step}, {pull}{norm} | "
            f"{row['tasks']} tasks, seed {row['task_seed']} | {told}"
        )

    def save(self, path: Path) -> None:
        """Write the row, the run's settings and the protocol as JSON, and beside it the score of every task as CSV.

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
    splits = load_families(config, device)
    check_same_data(network.data, splits)
    if protocol.split not in splits:
        raise ConfigError(
            f"split={protocol.split!r} has no classes, since the run's split, {config.split or 'its own'}, has none "
            f"for it; pass one of {', '.join(splits)}."
        )
    return replace(measure(config, network, splits[protocol.split], protocol), run=Config.load(folder / CONFIG))


def measure(config: Config, network: Network, dataset: Family, protocol: Protocol) -> Evaluation:
    """Measure the score of a network.

    Args:
        config: of the run that it comes from.
        network: what to measure.
        dataset: what the tasks of the protocol's split are drawn from.
        protocol: how to measure.

    Returns:
        The evaluation.

    Raises:
        ValueError: if the dataset is too small for these tasks.
    """
    run, config = config, protocol.applied(config)
    device = next(iter(network.theta.values())).device
    sampler = sampler_for(config, dataset, protocol, device)
    measured = scores(network.theta, sampler, protocol.adapting(run), protocol.tasks)
    learnt = learnt_strengths(network.theta) if protocol.regularized else {}
    partition, classes = None, None
    if isinstance(dataset, ClassImages):
        partition, classes = config.split or own_split(config.data, has_parts=bool(dataset.parts)), dataset.classes
    return Evaluation(run, config, protocol, partition, dataset.source, classes, network.meta_step, measured, learnt)


def sampler_for(config: Config, dataset: Family, protocol: Protocol, device: torch.device) -> Sampler:
    """Draws the tasks of a protocol, the same ones whenever it is made anew.

    Args:
        config: ways, shots and queries.
        dataset: what they are drawn from.
        protocol: its split and seed.
        device: where they are wanted, and images lie.

    Returns:
        The sampler.

    Raises:
        ValueError: if the dataset is too small for these tasks.
    """
    return sampler_of(dataset, config, generator_for(protocol.seed, f"{protocol.split} tasks", device))


def mean_and_interval(measured: Tensor, scale: float = 100.0) -> tuple[float, float]:
    """Mean and half of its 95 % interval, t s/sqrt(tasks).

    s is the standard deviation over tasks and t the 97.5 % quantile of Student's distribution of tasks - 1 degrees of
    freedom, since s is itself an estimate: 12.7 for 2 tasks, 2.262 for 10, 1.984 for 100 and 1.964 for 600, where a
    normal distribution has 1.960.

    Args:
        measured: one score a task, such as an accuracy between 0 and 1, of at least two tasks, ``[tasks]``.
        scale: what they are multiplied by.

    Returns:
        Both; in percent unless said otherwise.
    """
    scaled = scale * measured.double()
    quantile = float(special.stdtrit(len(scaled) - 1, 0.975))
    return scaled.mean().item(), quantile * scaled.std().item() / math.sqrt(len(scaled))
