"""Figures of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from applications.imaml.config import Config
from applications.imaml.criterion import criterion_of
from applications.imaml.episodes import Tasks

# Okabe and Ito's colours, which stay apart for the colour-blind; line styles tell them apart without any colour.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw_curve(metrics: dict[str, list[float]], config: Config, source: str, path: Path) -> None:
    """Draw score and loss against meta-steps.

    Args:
        metrics: columns of metrics.csv.
        config: of the run, for the title.
        source: what the images are, or the formula is, likewise.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    score, loss = figure.subplots(1, 2)
    criterion, steps = criterion_of(config), metrics["meta_step"]
    drawn, of = ("points", "tasks") if config.is_regression else ("images", "classes")
    trained = [criterion.scale * value for value in metrics[f"query_{criterion.score_name}"]]
    score.plot(steps, trained, color=BLUE, label=f"training {of}")
    validated = [
        (step, criterion.scale * value)
        for step, value in zip(steps, metrics[criterion.validation], strict=True)
        if value == value
    ]
    if validated:
        score.plot(*zip(*validated, strict=True), "o--", color=ORANGE, label=f"validation {of}, unseen")
    if config.is_regression:
        score.set(xlabel="meta-step", ylabel="mean squared error of queries", yscale="log")
    else:
        score.axhline(100 / config.ways, color="grey", linestyle=":", label="chance")
        score.set(xlabel="meta-step", ylabel="query accuracy (%)", ylim=(0, 101))
    loss.plot(steps, metrics[f"query_{criterion.loss_name}"], color=BLUE, label=f"query {drawn}, adapted")
    loss.plot(steps, metrics["support_loss"], "--", color=GREEN, label=f"support {drawn}, with proximal term")
    unit = "mean squared error" if config.is_regression else "cross-entropy (nats)"
    loss.set(xlabel="meta-step", ylabel=unit, yscale="log")
    for axes in (score, loss):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{source}: {config.size}, {config.algorithm}, inner solver {config.inner}")
    figure.savefig(path, dpi=130)


def draw_tasks(tasks: Tasks, answers: Tensor, path: Path) -> None:
    """Draw tasks, one a row: support images with their labels, query images with the answers given.

    A wrong answer has a cross, a dashed frame and the right answer beside it; a right one a tick and a solid frame.

    Args:
        tasks: a few, with labels below 26.
        answers: labels given to the query images, ``[tasks, ways * queries]``.
        path: PNG to write.
    """
    rows, supports, queries = len(answers), tasks.support_images.shape[1], tasks.query_images.shape[1]
    figure = Figure(figsize=(1.1 * (supports + queries) + 0.6, 1.35 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(supports, queries), wspace=0.05)[0]
    left.suptitle("support images: learnt from")
    right.suptitle("query images: answers")
    left_axes = left.subplots(rows, supports, squeeze=False)
    right_axes = right.subplots(rows, queries, squeeze=False)
    for row in range(rows):
        for column in range(supports):
            label = _letter(int(tasks.support_labels[row, column]))
            _draw_image(left_axes[row, column], tasks.support_images[row, column], label)
        for column in range(queries):
            answer, truth = int(answers[row, column]), int(tasks.query_labels[row, column])
            is_right = answer == truth
            title = f"{_letter(answer)} \u2713" if is_right else f"{_letter(answer)} \u2717 ({_letter(truth)})"
            axes = right_axes[row, column]
            _draw_image(axes, tasks.query_images[row, column], title)
            axes.title.set_color(BLUE if is_right else ORANGE)
            for spine in axes.spines.values():
                spine.set(color=BLUE if is_right else ORANGE, linewidth=2, linestyle="-" if is_right else (0, (2, 2)))
    figure.savefig(path, dpi=110)


def _draw_image(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(image.mean(0).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=11)
    axes.set(xticks=[], yticks=[])


def _letter(label: int) -> str:
    return chr(ord("A") + label)
