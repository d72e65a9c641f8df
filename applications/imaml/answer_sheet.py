"""A contact sheet of answers: what was learnt from on the left, what was answered on the right."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from applications.imaml.answers import Answers
from applications.imaml.checkpoint import write_atomically
from applications.imaml.figures import BLUE, ORANGE

SUPPORTS, QUERIES = 5, 12
_NEUTRAL = "#555555"
_INCH = 0.95


def draw_answers(answers: Answers, path: Path) -> None:
    """Draw one row a class: its support images, and the query images that were taken for it, the surest first.

    Of each class at most ``SUPPORTS`` and ``QUERIES`` are shown, and the row says how many there are. A wrong answer
    has a cross, a dashed frame and its own class; a right one a tick and a solid frame; where the own class isn't
    known, a thin frame and the probability alone.

    Args:
        answers: what to draw.
        path: PNG to write.
    """
    support_counts, query_counts = answers.support_labels.bincount(), answers.labels.bincount()
    supports = min(SUPPORTS, int(support_counts.max()))
    queries = min(QUERIES, int(query_counts.max()))
    rows = len(answers.classes)
    figure = Figure(figsize=(_INCH * (supports + queries + 1), 1.3 * _INCH * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(str(answers))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(supports + 0.7, queries), wspace=0.03)[0]
    left.suptitle("learnt from", fontsize=10)
    right.suptitle("taken for it, the surest first", fontsize=10)
    left_axes, right_axes = (part.subplots(rows, n, squeeze=False) for part, n in ((left, supports), (right, queries)))
    for axes in (*left_axes.flat, *right_axes.flat):
        axes.set_axis_off()
    for label, name in enumerate(answers.classes):
        chosen = (answers.support_labels == label).nonzero().flatten().tolist()
        for axes, index in zip(left_axes[label], chosen, strict=False):
            _draw_image(axes, answers.support_images[index])
        left_axes[label, 0].set_title(_shown(name, len(chosen), supports), fontsize=9, loc="left")
        taken = (answers.labels == label).nonzero().flatten()
        taken = taken[answers.probabilities[taken, label].argsort(descending=True)].tolist()
        for axes, index in zip(right_axes[label], taken, strict=False):
            _draw_answer(axes, answers, index)
        if len(taken) > queries:
            last: Axes = right_axes[label, -1]
            last.text(1.1, 0.5, f"+{len(taken) - queries}", transform=last.transAxes, fontsize=8)
    content = BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_atomically(path, content.getvalue())


def _shown(name: str, count: int, places: int) -> str:
    return f"{name} ({places} of {count})" if count > places else name


def _draw_answer(axes: Axes, answers: Answers, index: int) -> None:
    label, truth = int(answers.labels[index]), int(answers.truths[index])
    certainty = f"{100 * float(answers.probabilities[index, label]):.0f} %"
    _draw_image(axes, answers.query_images[index])
    if truth < 0:
        colour, style, width, title = _NEUTRAL, "-", 0.8, certainty
    elif truth == label:
        colour, style, width, title = BLUE, "-", 2.0, f"\u2713 {certainty}"
    else:
        colour, style, width, title = ORANGE, (0, (2, 2)), 2.0, f"\u2717 {answers.classes[truth]:.9}"
    axes.set_title(title, fontsize=8, color=colour)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width, linestyle=style)


def _draw_image(axes: Axes, image: Tensor) -> None:
    pixels = image.cpu().numpy().transpose(1, 2, 0)
    axes.set_axis_on()
    axes.imshow(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
