"""Figures of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from applications.imaml.config import Config

# Okabe and Ito's colours, which stay apart for the colour-blind; line styles tell them apart without any colour.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw_curve(metrics: dict[str, list[float]], config: Config, path: Path) -> None:
    """Draw accuracy and loss against meta-steps.

    Args:
        metrics: columns of metrics.csv.
        config: of the run, for the title.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss = figure.subplots(1, 2)
    steps = metrics["meta_step"]
    accuracy.plot(steps, [100 * value for value in metrics["query_accuracy"]], color=BLUE, label="training classes")
    validated = [
        (step, 100 * value) for step, value in zip(steps, metrics["validation_accuracy"], strict=True) if value == value
    ]
    if validated:
        accuracy.plot(*zip(*validated, strict=True), "o--", color=ORANGE, label="validation classes, unseen")
    accuracy.axhline(100 / config.ways, color="grey", linestyle=":", label="chance")
    accuracy.set(xlabel="meta-step", ylabel="query accuracy (%)", ylim=(0, 101))
    loss.plot(steps, metrics["query_loss"], color=BLUE, label="query images")
    loss.plot(steps, metrics["support_loss"], "--", color=GREEN, label="support images")
    loss.set(xlabel="meta-step", ylabel="cross-entropy after adaptation (nats)", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{config.data}, {config.ways}-way {config.shots}-shot, {config.algorithm}, {config.inner}")
    figure.savefig(path, dpi=130)
