"""A picture of regression: some tasks, and what a network makes of them before and after it has learnt them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from applications.datasets import Sinusoids
from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.config import Config
from applications.imaml.device import use
from applications.imaml.episodes import Tasks
from applications.imaml.evaluate import Protocol, sampler_for
from applications.imaml.figures import BLUE, GREEN, ORANGE
from applications.imaml.trained import load_network
from applications.imaml.words import counted

__all__ = ["draw_waves"]

_TASKS = 4
# So close that a curve through them is smooth.
_POINTS = 400


def draw_waves(config: Config, run: Path, protocol: Protocol, path: Path) -> None:
    """Draw tasks of a protocol: the wave, the support points, and the network before and after adaptation.

    Args:
        config: of the run; where to compute may differ.
        run: folder of the run.
        protocol: how it was measured; the tasks are drawn like those, with so many query points that a wave shows.
        path: PNG to write.

    Raises:
        CheckpointError: if there is no checkpoint to read.
        ConfigError: if a setting cannot be.
    """
    config = replace(protocol.adapting(config), queries=_POINTS)
    device = use(config)
    theta = load_network(run, device, protocol.checkpoint).theta
    tasks = sampler_for(config, Sinusoids(), protocol, device).sample(_TASKS)

    def answers(task: Tasks) -> tuple[Tensor, Tensor]:
        phi = adapt(theta, task, config).value
        before, after = (query_logits(values, task, config.batch_norm) for values in (theta, phi))
        return before, after

    with torch.no_grad():
        before, after = torch.vmap(answers)(tasks)
    figure = Figure(figsize=(3.6 * _TASKS, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves = (
        (tasks.query_labels, "wave", GREEN, "-"),
        (before, "network before", BLUE, ":"),
        (after, "network after adaptation", ORANGE, "--"),
    )
    for place, axes in enumerate(figure.subplots(1, _TASKS, sharey=True)):
        x, order = tasks.query_images[place, :, 0].sort()
        for values, label, color, line in curves:
            axes.plot(x.tolist(), values[place, order, 0].tolist(), line, color=color, label=label)
        axes.plot(*(part[place, :, 0].tolist() for part in tasks[:2]), "k^", label="support points")
        error = (after[place] - tasks.query_labels[place]).square().mean().item()
        axes.set(xlabel="x", title=f"MSE after adaptation: {error:.2g}")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    steps = counted(config.inner_steps, f"{config.inner} step")
    figure.suptitle(f"{config.data} {config.size}, {config.algorithm}: {protocol.split} tasks, {steps}")
    figure.savefig(path, dpi=110)
