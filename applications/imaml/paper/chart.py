"""A figure as data: what was measured, with its spread, and how it is drawn and written."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from applications.imaml.checkpoint import write_atomically
from applications.imaml.figures import BLUE, GREEN, ORANGE

# The rest of Okabe and Ito's colours that stand out from white.
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#666666"
# As many marks as this fit on a curve.
_MARKS = 12
# And so many letters of the title over a panel.
_LETTERS = 68
# A logarithmic scale has ticks at 1, 2 and 5 if it spans less than this, and at powers of ten otherwise.
_FEW_DECADES = 1e3


class Style(NamedTuple):
    """Colour, line and marker; each of them alone tells the curves of a panel apart."""

    color: str
    line: str
    marker: str


IMAML, MAML, FIRST_ORDER = Style(BLUE, "-", "o"), Style(ORANGE, "--", "s"), Style(GREEN, "-.", "^")
IMAML_FEW, IMAML_SOME = Style(SKY, ":", "v"), Style(PURPLE, "-", "D")
EXACT, ESTIMATE = Style(GREY, "-", ""), Style(BLACK, "--", "x")


@dataclass(frozen=True)
class Series:
    """One curve, with the spread over repeats.

    Args:
        label: what it is.
        style: how it is drawn.
        x: where it was measured.
        median: over repeats.
        low: the smallest of them.
        high: the largest.
        repeats: how many.
    """

    label: str
    style: Style
    x: Sequence[float]
    median: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    repeats: int

    @classmethod
    def of(cls, label: str, style: Style, x: Sequence[float], measured: Tensor) -> Series:
        """Summarise repeats.

        Args:
            label: what it is.
            style: how it is drawn.
            x: where it was measured.
            measured: ``[len(x), repeats]``.

        Returns:
            The curve.
        """
        median, low, high = measured.quantile(0.5, dim=1), measured.amin(1), measured.amax(1)
        return cls(label, style, list(x), median.tolist(), low.tolist(), high.tolist(), measured.shape[1])


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Args:
        title: what is seen.
        xlabel: with the unit.
        ylabel: with the unit.
        series: the curves.
        log_x: whether x is on a logarithmic scale, with a tick at every place that was measured.
        log_y: whether y is.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    log_x: bool = True
    log_y: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure.

    Args:
        name: of its files.
        title: what was measured, with the sizes.
        spread: what bands and error bars are.
        settings: all that the numbers depend on.
        panels: side by side.
        findings: what it shows, in sentences with numbers.
    """

    name: str
    title: str
    spread: str
    settings: Mapping[str, Any]
    panels: Sequence[Panel]
    findings: Sequence[str]

    def save(self, folder: Path) -> list[Path]:
        """Draw it as PNG, and write the data as JSON and CSV.

        Args:
            folder: gets NAME.png, NAME.json and NAME.csv.

        Returns:
            The files.

        Raises:
            OSError: if they cannot be written.
        """
        picture, data, table = (folder / f"{self.name}.{kind}" for kind in ("png", "json", "csv"))
        _draw(self, picture)
        write_atomically(data, (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_atomically(table, self._csv().encode())
        return [picture, data, table]

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["panel", "series", "x", "median", "low", "high", "repeats"])
        for panel in self.panels:
            for series in panel.series:
                for values in zip(series.x, series.median, series.low, series.high, strict=True):
                    cells = (f"{value:.8g}" for value in values)
                    writer.writerow([panel.title, series.label, *cells, series.repeats])
        return text.getvalue()


def _draw(chart: Chart, path: Path) -> None:
    count = len(chart.panels)
    figure = Figure(figsize=(5.2 * count + 1.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, count, squeeze=False)[0], chart.panels, strict=True):
        _draw_panel(axes, panel)
    figure.suptitle(textwrap.fill(chart.title, _LETTERS * count), fontsize=12)
    figure.supxlabel(chart.spread, fontsize=9, color=GREY)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        color, line, marker = series.style
        axes.plot(
            series.x,
            series.median,
            color=color,
            linestyle=line,
            marker=marker,
            markevery=max(1, len(series.x) // _MARKS),
            label=series.label,
        )
        if series.repeats > 1:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0)
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for series in panel.series for x in series.x})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if panel.log_y:
        # An error of exactly zero has no place on this scale, and is left out.
        axes.set_yscale("log", nonpositive="mask")
        low, high = axes.get_ylim()
        if high / low < _FEW_DECADES:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
