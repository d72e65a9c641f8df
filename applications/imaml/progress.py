"""How far a training run is, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from applications.imaml.criterion import CLASSIFICATION, Criterion
from applications.imaml.words import describe_seconds


@contextmanager
def announced(begun: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show what begins at once, and in the same line what is known of it later.

    Args:
        begun: what begins.
        quiet: whether to show nothing.

    Yields:
        Shows the rest.
    """

    def show(text: str) -> None:
        if not quiet:
            print(text, end="", flush=True)

    show(begun)
    try:
        yield show
    finally:
        # Also where it fails, so that the error has a line of its own.
        show("\n")


class Display:
    """Shows how far a run is: a bar on a terminal, a line for each row of metrics elsewhere, nothing if quiet.

    Args:
        total: meta-steps in all.
        done: meta-steps done before.
        tasks: tasks of each meta-step.
        limit: seconds after which training stops; None for no limit.
        quiet: whether to show nothing.
        criterion: of the run.
    """

    def __init__(
        self,
        total: int,
        done: int,
        tasks: int,
        limit: float | None,
        quiet: bool,
        criterion: Criterion = CLASSIFICATION,
    ) -> None:
        self._criterion = criterion
        self._total, self._first, self._tasks, self._limit, self._quiet = total, done, tasks, limit, quiet
        self._start = time.monotonic()
        # Of it, what went into rows.
        self._recording = 0.0
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        console = Console()
        if not quiet and console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(TextColumn("meta-step"), *columns, console=console)
            self._bar_task = self._bar.add_task("training", total=total, completed=done, rate="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, meta_step: int) -> None:
        """Move the bar.

        Args:
            meta_step: meta-steps done.
        """
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=meta_step, rate=self._rate(meta_step))

    def row(self, row: dict[str, float], seconds: float) -> None:
        """Tell a row of metrics.

        Args:
            row: as written to metrics.csv, whose rate is told.
            seconds: that its validation and whatever else its rate doesn't count have taken.
        """
        self._recording += seconds
        step = int(row["meta_step"])
        text = f"{step}/{self._total}  {self._criterion.told(row)}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self._quiet:
            # Not by the console, which would break the lines of a log file; flushed, since someone may be following.
            print(f"{text}  {self._told(row['tasks_per_second'], step)}", flush=True)

    def _rate(self, meta_step: int) -> str:
        """That of training alone, as in metrics.csv, over all meta-steps so far."""
        training = time.monotonic() - self._start - self._recording
        return self._told(self._tasks * (meta_step - self._first) / max(training, 1e-9), meta_step)

    def _told(self, rate: float, meta_step: int) -> str:
        # Validations are to come as well, so the end is reckoned with them.
        elapsed = time.monotonic() - self._start
        left = elapsed / max(1, meta_step - self._first) * (self._total - meta_step)
        if self._limit is not None:
            left = max(0.0, min(left, self._limit - elapsed))
        return f"{rate:.1f} tasks/s, {describe_seconds(left)} left"
