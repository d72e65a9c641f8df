"""A race of meta-gradients: the same meta-steps from the same start on the same tasks, by meta-steps and by seconds.

Every cell, one variant with one seed, is a run of its own in a folder of its own. What is complete is kept and what is
not goes on to the bit when the race is called again; picture and table are drawn anew after every cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from applications.imaml import checkpoint
from applications.imaml.checkpoint import write_atomically
from applications.imaml.config import Config, ConfigError
from applications.imaml.evaluate import REPORT, Protocol, evaluate
from applications.imaml.metrics import read_metrics
from applications.imaml.race_picture import Curve, draw_race
from applications.imaml.run_folder import CONFIG, METRICS, RunError
from applications.imaml.train import Limits, train
from applications.imaml.words import counted

TABLE, PICTURE = "race.md", "race.png"
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gauss-newton": {"curvature": "gauss-newton"},
        "hessian": {"curvature": "hessian"},
        "hessian-damped": {"curvature": "hessian", "damping": 5.0},
        "hessian-unguarded": {"curvature": "hessian-unguarded"},
        "published": {"curvature": "published"},
        "first-order": {"algorithm": "fomaml"},
    }
)
"""Settings by name: curvature stopped where negative, damped, and as in the paper; the paper's code; none at all."""


@dataclass(frozen=True)
class Race:
    """What is compared.

    Args:
        base: settings that all share, seed aside. Its learning rate should be constant: a schedule that ends with the
            last meta-step favours nobody by meta-steps, but by seconds it compares different parts of it.
        variants: names out of ``VARIANTS``.
        seeds: how many, from 0.
        test_tasks: tasks on unseen classes, for the accuracy after the last meta-step.

    Raises:
        ConfigError: if there is no such variant, the base cannot be with one of them, or no validation accuracy is
            measured after the last meta-step.
    """

    base: Config
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 2
    test_tasks: int = 300

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise ConfigError(f"variants={self.variants!r} cannot be; pass some of {', '.join(VARIANTS)}.")
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} cannot be; pass an integer of at least 1.")
        if self.base.meta_steps % self.base.validate_every:
            raise ConfigError(
                f"meta_steps={self.base.meta_steps} is not a multiple of validate_every={self.base.validate_every}, "
                f"and the end of a curve is what it is compared by; pass one."
            )
        # Whatever cannot be is told now, not after the first cells.
        tuple(self.cells())

    def cells(self) -> Iterator[tuple[str, Config]]:
        """Name of the variant and settings of every cell; a seed at a time, so that what is there compares."""
        for seed in range(self.seeds):
            for name in self.variants:
                yield name, replace(self.base, seed=seed, **VARIANTS[name])


class Result(NamedTuple):
    """What came out of a cell.

    Args:
        variant: its name.
        curve: accuracy along the run.
        meta_steps: how many were done.
        source: what the images are; empty if it was not evaluated.
        accuracy: on test tasks, in percent; NaN where the run broke down.
        interval: 95 % interval over the tasks.
    """

    variant: str
    curve: Curve
    meta_steps: int
    source: str
    accuracy: float
    interval: float


def race(plan: Race, out: Path, tell: Callable[[str], None], *, quiet: bool = False) -> bool:
    """Train, evaluate and compare; whatever an earlier call has done is kept.

    Args:
        plan: what is compared.
        out: folder of the race; gets one folder a cell, race.md and race.png.
        tell: is given a line for every cell.
        quiet: show no progress of the cells.

    Returns:
        Whether all is done; False after Ctrl-C.

    Raises:
        ConfigError: if the folder holds a race with other settings.
        RunError: if it cannot be written.
        CheckpointError: if a cell cannot be read or written.
    """
    results: list[Result] = []
    for name, config in plan.cells():
        folder = out / f"{name}-seed{config.seed}"
        result = _cell(name, config, folder, Protocol(tasks=plan.test_tasks), quiet)
        if result is None:
            return False
        results.append(result)
        draw_race([(each.variant, each.curve) for each in results], _title(config, results), out / PICTURE)
        write_atomically(out / TABLE, table(plan, results).encode())
        tell(f"{folder}: {_percent(result.accuracy)} ± {_percent(result.interval)} % after {result.meta_steps}")
    return True


def _cell(name: str, config: Config, folder: Path, protocol: Protocol, quiet: bool) -> Result | None:
    """Run a cell, or read what it came to; None if it was interrupted."""
    begun = (folder / CONFIG).exists()
    if begun:
        saved = Config.load(folder / CONFIG)
        # Where it computes may change, and a constant rate lets it go on for longer.
        mutable = {entry: getattr(config, entry) for entry in ("root", "device", "threads", "meta_steps")}
        if replace(saved, **mutable) != config or saved.meta_steps > config.meta_steps:
            raise ConfigError(
                f"{folder} holds a run with other settings, and a race goes on as it began; pass the settings of that "
                f"race, or another folder."
            )
    done, broke_down = _meta_steps(folder) if begun else 0, False
    if done < config.meta_steps:
        try:
            done = train(config, folder, Limits(quiet=quiet), resume=begun)
        except RunError:
            # A cell that breaks down is a result; one that cannot even start is not.
            if not (folder / checkpoint.POINTER).exists():
                raise
            done, broke_down = _meta_steps(folder), True
    if done < config.meta_steps and not broke_down:
        return None
    curve = _curve(read_metrics(folder / METRICS), config)
    if broke_down:
        return Result(name, curve, done, "", math.nan, math.nan)
    row = _evaluated(config, folder, protocol)
    return Result(name, curve, done, row["source"], row["accuracy"], row["interval"])


def _meta_steps(folder: Path) -> int:
    return checkpoint.load(folder).numbers["meta_step"] if (folder / checkpoint.POINTER).exists() else 0


def _evaluated(config: Config, folder: Path, protocol: Protocol) -> dict[str, Any]:
    path = folder / REPORT
    if path.exists():
        row = json.loads(path.read_text(encoding="utf-8"))["row"]
        if (row["meta_step"], row["tasks"]) == (config.meta_steps, protocol.tasks):
            return row
    evaluation = evaluate(config, folder, protocol)
    evaluation.save(path)
    return evaluation.row()


def _curve(metrics: dict[str, list[float]], config: Config) -> Curve:
    """Accuracies along a run, on validation classes if the split has any, else on the training tasks themselves."""
    # Of the training alone: the column of seconds counts the validations, which are the same for all.
    rows = [config.log_every * config.tasks / rate for rate in metrics["tasks_per_second"]]
    seconds = list(accumulate(rows))
    column, measured_on = "validation_accuracy", "unseen validation classes"
    if all(map(math.isnan, metrics[column])):
        column, measured_on = "query_accuracy", "training tasks"
    kept = [at for at, value in enumerate(metrics[column]) if not math.isnan(value)]
    return Curve(
        [metrics["meta_step"][at] for at in kept],
        [seconds[at] for at in kept],
        [100 * metrics[column][at] for at in kept],
        measured_on,
    )


def _title(config: Config, results: Sequence[Result]) -> str:
    source = next((result.source for result in results if result.source), config.data)
    steps, cg_steps = counted(config.inner_steps, "step"), counted(config.cg_steps, "CG step")
    return (
        f"{source}, {config.ways}-way {config.shots}-shot; lam {config.lam:g}, {steps} of {config.inner} "
        f"(lr {config.inner_lr:g}), {cg_steps}"
    )


def table(plan: Race, results: Sequence[Result]) -> str:
    """The race as a Markdown table.

    Args:
        plan: what is compared.
        results: what came out so far, at least one.

    Returns:
        The table and its legend: means over seeds, and every seed in parentheses.
    """
    # What the fastest took for all meta-steps, so that everyone had as much.
    whole = [result for result in results if result.meta_steps == plan.base.meta_steps]
    budget = min((result.curve.seconds[-1] for result in whole), default=math.nan)
    measured_on = results[0].curve.measured_on
    lines = [
        f"{_title(plan.base, results)}; {counted(plan.base.tasks, 'task')} a meta-step, {plan.test_tasks} test tasks, "
        f"threads: {plan.base.threads or 'as PyTorch chooses'}.",
        "",
        f"| meta-gradient | meta-steps | seconds | test accuracy, % | on {measured_on} after {_seconds(budget)} s, % |",
        "|---|---|---|---|---|",
    ]
    for name in plan.variants:
        own = [result for result in results if result.variant == name]
        if own:
            cells = (
                ", ".join(dict.fromkeys(str(result.meta_steps) for result in own)),
                _mean([result.curve.seconds[-1] if result.curve.seconds else math.nan for result in own], _seconds),
                _mean([result.accuracy for result in own], _percent),
                _mean([result.curve.after(budget) for result in own], _percent),
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    legend = (
        "Means over the seeds, and in parentheses each of them, in order. Seconds are those of training alone. The "
        f"last column is read off the learning curve after {_seconds(budget)} s, what the fastest run took for all its "
        "meta-steps. A dash stands where there is no number: the run broke down before it, or was not validated yet."
    )
    return "\n".join([*lines, "", legend]) + "\n"


def _mean(values: Sequence[float], told: Callable[[float], str]) -> str:
    each = ", ".join(map(told, values))
    return f"{told(sum(values) / len(values))} ({each})"


def _percent(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.1f}"


def _seconds(value: float) -> str:
    # Three digits: a race may take seconds or hours.
    return "—" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
