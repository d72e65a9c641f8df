"""A minute of meta-learning on generated characters, judged on unseen ones and looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from applications.imaml import run_folder
from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.config import Config
from applications.imaml.device import use
from applications.imaml.episodes import Tasks, load_splits
from applications.imaml.evaluate import REPORT, Protocol, mean_and_interval, measure, sampler_for
from applications.imaml.figures import draw_tasks
from applications.imaml.networks import Parameters
from applications.imaml.run_folder import CURVE, RunError
from applications.imaml.train import Limits, train
from applications.imaml.trained import load_network
from applications.imaml.words import counted

TASKS_PICTURE = "tasks.png"
PICTURED = 6
# Settings for a minute rather than an hour: fewer tasks and adjoint steps in a meta-step, larger meta-steps.
CONFIG = Config(
    meta_steps=240, tasks=8, cg_steps=2, meta_lr=3e-3, log_every=20, validate_every=80, validation_tasks=100
)
PROTOCOL = Protocol(tasks=200)


@dataclass(frozen=True)
class Comparison:
    """Accuracy on unseen classes in percent, mean and 95 % interval over the same tasks.

    Args:
        before: of the network before adaptation.
        after: after adaptation.
        neighbour: of the class of the nearest support image, pixel by pixel.
        meta_steps: how many the network was trained for.
        files: what was written.
    """

    before: tuple[float, float]
    after: tuple[float, float]
    neighbour: tuple[float, float]
    meta_steps: int
    files: tuple[Path, ...]

    def __str__(self) -> str:
        lines = [
            f"{CONFIG.ways}-way {CONFIG.shots}-shot on characters not seen in training, {PROTOCOL.tasks} tasks,"
            f" after {counted(self.meta_steps, 'meta-step')}:"
        ]
        for name, (mean, interval) in (
            ("before adaptation", self.before),
            ("nearest neighbour in pixels", self.neighbour),
            ("after adaptation", self.after),
        ):
            lines.append(f"  {name:<28} {mean:5.1f} ± {interval:.1f} %")
        return "\n".join([*lines, *(str(file) for file in self.files)])


def demo(out: Path, seconds: float | None = None, *, quiet: bool = False) -> Comparison:
    """Train for about a minute, then compare accuracies on unseen classes and draw some tasks.

    Args:
        out: folder to make.
        seconds: stop training after this time, wherever it is; None for no limit.
        quiet: show no progress.

    Returns:
        What was measured.

    Raises:
        RunError: if the folder holds a run already or cannot be written.
    """
    if (out / run_folder.CONFIG).exists():
        raise RunError(
            f"out={str(out)!r} holds a run already, and the demo begins one of its own; pass a folder that isn't there "
            f"yet, or none for one named after the time. `train --resume` goes on with what is there."
        )
    meta_steps = train(CONFIG, out, Limits(seconds, quiet))
    device = use(CONFIG)
    network = load_network(out, device)
    dataset = load_splits(CONFIG, device)[PROTOCOL.split]
    evaluation = measure(CONFIG, network, dataset, PROTOCOL)
    evaluation.save(out / REPORT)
    tasks = sampler_for(CONFIG, dataset, PROTOCOL, device).sample(PROTOCOL.tasks)
    pictured = Tasks(*(part[:PICTURED] for part in tasks))
    draw_tasks(pictured, _answers(network.theta, pictured), out / TASKS_PICTURE)
    return Comparison(
        before=mean_and_interval(evaluation.measured.before),
        after=mean_and_interval(evaluation.measured.after),
        neighbour=mean_and_interval(torch.vmap(_nearest_neighbour)(tasks)),
        meta_steps=meta_steps,
        files=(out / CURVE, out / REPORT, out / TASKS_PICTURE),
    )


def _answers(theta: Parameters, tasks: Tasks) -> Tensor:
    def answer(task: Tasks) -> Tensor:
        return query_logits(adapt(theta, task, CONFIG).value, task, CONFIG.batch_norm).argmax(-1)

    with torch.no_grad():
        return torch.vmap(answer)(tasks)


def _nearest_neighbour(task: Tasks) -> Tensor:
    """Accuracy of answering with the label of the support image that is nearest in pixels."""
    distances = torch.cdist(task.query_images.flatten(1), task.support_images.flatten(1))
    return (task.support_labels[distances.argmin(-1)] == task.query_labels).float().mean()
