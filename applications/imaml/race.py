"""A race of meta-gradients: the same meta-steps from the same start on the same tasks, by meta-steps and by seconds.

Every cell, one variant with one seed, is a run of its own in a folder of its own. What is complete is kept and what is
not goes on to the bit when the race is called again; picture and table are drawn anew after every cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from applications.imaml import checkpoint
from applications.imaml.checkpoint import write_atomically
from applications.imaml.config import Config, ConfigError
from applications.imaml.device import use
from applications.imaml.episodes import TaskSampler, check_same_data, generator_for, load_splits
from applications.imaml.evaluate import REPORT, Protocol, evaluate
from applications.imaml.exactness import Exactness, exactness
from applications.imaml.idle import idle
from applications.imaml.metrics import read_metrics
from applications.imaml.race_picture import Curve, draw_race
from applications.imaml.run_folder import CONFIG, METRICS, RunError
from applications.imaml.train import Limits, train
from applications.imaml.trained import load_network
from applications.imaml.variants import NOTES, VARIANTS, Subject
from applications.imaml.words import counted

TABLE, PICTURE = "race.md", "race.png"
EXACTNESS = "exactness.json"
# The tight reference of one task takes as long as sixty meta-steps, and that of these half a minute.
_EXACTNESS_TASKS = 8


@dataclass(frozen=True)
class Race:
    """What is compared.

    Args:
        base: settings that all share, seed aside. Its learning rate should be constant: a schedule that ends with the
            last meta-step favours nobody by meta-steps, but by seconds it compares different parts of it.
        subject: what the variants differ in, one of ``VARIANTS``.
        variants: names out of it; all if there are none.
        seeds: how many, from 0.
        test_tasks: tasks on unseen classes, for the accuracy after the last meta-step.
        tight: whether the last meta-gradient of a run is compared with a tight reference.

    Raises:
        ConfigError: if there is no such variant, the base cannot be with one of them, or has no classes, or no
            validation accuracy is measured after the last meta-step.
    """

    base: Config
    subject: Subject = "curvature"
    variants: tuple[str, ...] = ()
    seeds: int = 2
    test_tasks: int = 300
    tight: bool = True

    def __post_init__(self) -> None:
        self.base.check_classes()
        unknown = [name for name in self.variants if name not in VARIANTS[self.subject]]
        if unknown:
            raise ConfigError(
                f"variants={self.variants!r} cannot be; pass some of {', '.join(VARIANTS[self.subject])}."
            )
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
            for name, config in self.runners().items():
                yield name, replace(config, seed=seed)

    def runners(self) -> dict[str, Config]:
        """Settings of every variant, seed aside, by its name."""
        return {name: replace(self.base, **VARIANTS[self.subject][name]) for name in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variants that run."""
        return self.variants or tuple(VARIANTS[self.subject])


class Result(NamedTuple):
    """What came out of a cell.

    Args:
        variant: its name.
        curve: accuracy along the run.
        meta_steps: how many were done.
        source: what the images are; empty if it was not evaluated.
        accuracy: on test tasks, in percent; NaN where the run broke down.
        interval: 95 % interval over the tasks.
        exactness: of its meta-gradient, after the last meta-step, if it was compared.
    """

    variant: str
    curve: Curve
    meta_steps: int
    source: str
    accuracy: float
    interval: float
    exactness: Exactness = Exactness(*[math.nan] * 6)


def race(plan: Race, out: Path, tell: Callable[[str], None], *, quiet: bool = False) -> bool:
    """Train, evaluate and compare; whatever an earlier call has done is kept.

    Args:
        plan: what is compared.
        out: folder of the race; gets one folder a cell, race.md and race.png.
        tell: is given a line for every cell, and one before a meta-gradient is compared with the reference.
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
        result = _cell(name, config, folder, plan, tell, quiet)
        if result is None:
            return False
        results.append(result)
        draw_race([(each.variant, each.curve) for each in results], _title(plan, results), out / PICTURE)
        write_atomically(out / TABLE, table(plan, results).encode())
        tell(f"{folder}: {_percent(result.accuracy)} ± {_percent(result.interval)} % after {result.meta_steps}")
    return True


def _cell(
    name: str, config: Config, folder: Path, plan: Race, tell: Callable[[str], None], quiet: bool
) -> Result | None:
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
    row = _evaluated(config, folder, Protocol(tasks=plan.test_tasks))
    result = Result(name, curve, done, row["source"], row["accuracy"], row["interval"])
    return result._replace(exactness=_exactness(config, folder, tell)) if plan.tight else result


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


def _exactness(config: Config, folder: Path, tell: Callable[[str], None]) -> Exactness:
    path = folder / EXACTNESS
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("meta_step") == config.meta_steps:
            return Exactness(**saved)
    tell(f"{folder}: comparing the meta-gradient of {_EXACTNESS_TASKS} tasks with a tight reference, for half a minute")
    device = use(config)
    splits, network = load_splits(config, device), load_network(folder, device)
    check_same_data(network.data, splits)
    images = splits.get("validation", splits["train"])
    generator = generator_for(0, "exactness tasks", device)
    tasks = TaskSampler(images, config.ways, config.shots, config.queries, generator, config.query_sets)
    found = exactness(network.theta, tasks.sample(_EXACTNESS_TASKS), config)
    content = {"meta_step": config.meta_steps, **found._asdict()}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return found


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


def _title(plan: Race, results: Sequence[Result]) -> str:
    """What all runners share."""
    runners = list(plan.runners().values())
    one = runners[0]

    def shared(*names: str) -> bool:
        return all(getattr(runner, name) == getattr(one, name) for runner in runners for name in names)

    source = next((result.source for result in results if result.source), one.data)
    told = [f"lam {one.lam:g}"] if shared("lam") else []
    if shared("inner", "inner_steps"):
        rate = f" (lr {one.inner_lr:g})" if shared("inner_lr") and "inner_lr" not in idle(one) else ""
        told.append(f"{counted(one.inner_steps, 'step')} of {one.inner}{rate}")
    if shared("cg_steps"):
        told.append(counted(one.cg_steps, "CG step"))
    return f"{source}, {one.ways}-way {one.shots}-shot" + (f"; {', '.join(told)}" if told else "")


def _settings(plan: Race) -> list[str]:
    """A line a runner: the options of ``train`` in which the runners differ and which it uses."""
    runners = plan.runners()
    names = [entry.name for entry in fields(Config)]
    differing = [name for name in names if len({getattr(runner, name) for runner in runners.values()}) > 1]
    lines = []
    for runner, config in runners.items():
        unused = idle(config)
        options = (f"--{name.replace('_', '-')} {getattr(config, name)}" for name in differing if name not in unused)
        note = NOTES.get((plan.subject, runner))
        lines.append(f"- {runner}: `{' '.join(options)}`" + (f"; {note}" if note else ""))
    return ["", *lines] if differing else []


def table(plan: Race, results: Sequence[Result]) -> str:
    """The race as a Markdown table.

    Args:
        plan: what is compared.
        results: what came out so far, at least one.

    Returns:
        The table, what its runners are trained with, and its legend: means over seeds, and every seed in parentheses.
    """
    # What the fastest took for all meta-steps, so that everyone had as much.
    whole = [result for result in results if result.meta_steps == plan.base.meta_steps]
    budget = min((result.curve.seconds[-1] for result in whole), default=math.nan)
    measured_on = results[0].curve.measured_on
    lines = [
        f"{_title(plan, results)}; {counted(plan.base.tasks, 'task')} a meta-step, {plan.test_tasks} test tasks, "
        f"threads: {plan.base.threads or 'as PyTorch chooses'}.",
        "",
        f"| {plan.subject} | meta-steps | seconds | test accuracy, % | on {measured_on} after {_seconds(budget)} s, % "
        "| residual | estimate | cosine | reference residual | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in plan.names:
        own = [result for result in results if result.variant == name]
        if own:
            cells = (
                ", ".join(dict.fromkeys(str(result.meta_steps) for result in own)),
                _mean([result.curve.seconds[-1] if result.curve.seconds else math.nan for result in own], _seconds),
                _mean([result.accuracy for result in own], _percent),
                _mean([result.curve.after(budget) for result in own], _percent),
                *(_mean(column, _figure) for column in zip(*(_shown(result.exactness) for result in own), strict=True)),
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    legend = (
        "Means over the seeds, and in parentheses each of them, in order. Seconds are those of training alone. The "
        f"accuracy after {_seconds(budget)} s, what the fastest run took for all its meta-steps, is read off the "
        "learning curve. The last five columns judge the meta-gradient of eight tasks at the last meta-step: the norm "
        "of the inner problem's gradient where its solver ended; the estimated relative error of the linear system "
        "alone, which knows nothing of the inner problem; the cosine of the angle to a tight reference, which is the "
        "meta-gradient after 150 steps of L-BFGS and 60 of conjugate gradients with the Gauss-Newton curvature; the "
        "norm of the inner problem's gradient where that reference ended, for it is not exact either; and the "
        "processor time. A dash stands where there is no number: the run broke down before it, was not validated yet, "
        "was not compared, or has no such thing."
    )
    return "\n".join([*lines, *_settings(plan), "", legend]) + "\n"


def _mean(values: Sequence[float], told: Callable[[float], str]) -> str:
    each = ", ".join(map(told, values))
    return f"{told(sum(values) / len(values))} ({each})"


def _percent(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.1f}"


def _shown(found: Exactness) -> tuple[float, ...]:
    return found.residual, found.estimate, found.cosine, found.reference_residual, found.seconds


def _figure(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.2g}"


def _seconds(value: float) -> str:
    # Three digits: a race may take seconds or hours.
    return "—" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
