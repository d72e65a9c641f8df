"""Learning curves of a race, by meta-steps and by seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from applications.imaml.checkpoint import write_atomically

# Okabe and Ito's colours, which stay apart for the colour-blind; markers and line styles tell them apart without any.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vX*"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


class Curve(NamedTuple):
    """Accuracy along a run.

    Args:
        meta_steps: at which it was measured, rising.
        seconds: of training until then.
        accuracy: in percent.
        measured_on: what.
    """

    meta_steps: list[float]
    seconds: list[float]
    accuracy: list[float]
    measured_on: str

    def after(self, seconds: float) -> float:
        """The accuracy after a time, on the straight line between the measurements around it.

        Args:
            seconds: of training.

        Returns:
            The accuracy in percent; NaN before the first measurement and after the last.
        """
        if not self.seconds:
            return math.nan
        return float(np.interp(seconds, self.seconds, self.accuracy, left=math.nan, right=math.nan))


def draw_race(curves: Sequence[tuple[str, Curve]], title: str, path: Path) -> None:
    """Draw all runs, one colour, marker and line style a name; its label stands in the legend once.

    Args:
        curves: names, and a curve for every seed; at least one.
        title: what they have in common.
        path: PNG to write.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for name, _ in curves))
    seen: set[str] = set()
    for name, curve in curves:
        look = names.index(name) % len(_COLOURS)
        style = {"color": _COLOURS[look], "marker": _MARKERS[look], "linestyle": _LINES[look], "markersize": 4}
        label = None if name in seen else name
        seen.add(name)
        by_steps.plot(curve.meta_steps, curve.accuracy, label=label, **style)
        by_seconds.plot(curve.seconds, curve.accuracy, **style)
    by_steps.set(xlabel="meta-steps", ylabel=f"accuracy on {curves[0][1].measured_on} (%)")
    by_seconds.set(xlabel="seconds of training")
    for axes in (by_steps, by_seconds):
        axes.grid(alpha=0.3)
    by_steps.legend(title="meta-gradient, a line a seed")
    figure.suptitle(title)
    content = BytesIO()
    figure.savefig(content, dpi=130, format="png")
    write_atomically(path, content.getvalue())
