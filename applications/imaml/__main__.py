"""Command line: ``python -m applications.imaml train | evaluate | adapt | demo | race | paper | figures``."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from applications.datasets.download import download as fetch
from applications.datasets.omniglot import MINIMAL
from applications.imaml.answer_sheet import draw_answers
from applications.imaml.answers import SHEET, TABLE, answer, check_outside
from applications.imaml.checkpoint import CheckpointName
from applications.imaml.config import (
    AlgorithmName,
    BatchNorm,
    Config,
    ConfigError,
    ConvolutionName,
    CurvatureName,
    DataName,
    LearnLam,
    PrecisionName,
    ScheduleName,
    help_of,
)
from applications.imaml.demo import demo
from applications.imaml.episodes import SplitName
from applications.imaml.evaluate import REPORT, Protocol, evaluate
from applications.imaml.explained import explained
from applications.imaml.fewshot import Learner
from applications.imaml.idle import refuse_idle
from applications.imaml.paper.commands import figures, paper_command
from applications.imaml.processes import joined
from applications.imaml.race import PICTURE, Race, race
from applications.imaml.race import TABLE as RACE_TABLE
from applications.imaml.run_folder import CONFIG, CURVE, METRICS, check_report
from applications.imaml.train import Limits, train
from applications.imaml.usual import usual
from applications.imaml.variants import VARIANTS, Subject
from applications.imaml.waves import draw_waves
from applications.imaml.words import counted

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

# Settings that may change when a run is resumed: they say where and how long it computes, not what.
MUTABLE = ("root", "device", "graph", "threads", "meta_steps", "checkpoint_every")


def _option(name: str) -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=help_of(name))


_RUNNERS = "; or ".join(f"{subject}: {', '.join(names)}" for subject, names in VARIANTS.items())
_CHECKPOINT = typer.Option(
    "--checkpoint", help="network of the last meta-step, or that of the best accuracy on validation classes"
)


@app.command("train")
def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder of the run")],
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in that folder, to the bit")] = False,
    data: Annotated[DataName, _option("data")] = Config.data,
    root: Annotated[str | None, _option("root")] = Config.root,
    ways: Annotated[int, _option("ways")] = Config.ways,
    shots: Annotated[int, _option("shots")] = Config.shots,
    queries: Annotated[int | None, typer.Option(help=f"{help_of('queries')}; as many as shots by default")] = None,
    query_sets: Annotated[int, _option("query_sets")] = Config.query_sets,
    algorithm: Annotated[AlgorithmName, _option("algorithm")] = Config.algorithm,
    inner: Annotated[str, _option("inner")] = Config.inner,
    lam: Annotated[
        float | None, typer.Option(help=f"{help_of('lam')}; by default {Config.lam} with imaml, else 0")
    ] = None,
    learn_lam: Annotated[LearnLam, _option("learn_lam")] = Config.learn_lam,
    path_steps: Annotated[int | None, _option("path_steps")] = Config.path_steps,
    inner_lr: Annotated[float, _option("inner_lr")] = Config.inner_lr,
    inner_steps: Annotated[int, _option("inner_steps")] = Config.inner_steps,
    cg_steps: Annotated[int, _option("cg_steps")] = Config.cg_steps,
    curvature: Annotated[CurvatureName, _option("curvature")] = Config.curvature,
    damping: Annotated[float, _option("damping")] = Config.damping,
    batch_norm: Annotated[BatchNorm, _option("batch_norm")] = Config.batch_norm,
    meta_lr: Annotated[float, _option("meta_lr")] = Config.meta_lr,
    schedule: Annotated[ScheduleName, _option("schedule")] = Config.schedule,
    meta_steps: Annotated[int, _option("meta_steps")] = Config.meta_steps,
    tasks: Annotated[int, _option("tasks")] = Config.tasks,
    device: Annotated[str, _option("device")] = Config.device,
    precision: Annotated[PrecisionName, _option("precision")] = Config.precision,
    convolution: Annotated[ConvolutionName, _option("convolution")] = Config.convolution,
    graph: Annotated[bool, typer.Option(help=help_of("graph"))] = Config.graph,
    threads: Annotated[int, _option("threads")] = Config.threads,
    seed: Annotated[int, _option("seed")] = Config.seed,
    split_seed: Annotated[int, _option("split_seed")] = Config.split_seed,
    split: Annotated[str | None, _option("split")] = Config.split,
    image_size: Annotated[int | None, _option("image_size")] = Config.image_size,
    channels: Annotated[int | None, _option("channels")] = Config.channels,
    download: Annotated[
        bool, typer.Option("--download", help="fetch archives that are missing in --root (omniglot)")
    ] = False,
    log_every: Annotated[int, _option("log_every")] = Config.log_every,
    checkpoint_every: Annotated[int, _option("checkpoint_every")] = Config.checkpoint_every,
    validate_every: Annotated[int, _option("validate_every")] = Config.validate_every,
    validation_tasks: Annotated[int, _option("validation_tasks")] = Config.validation_tasks,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which to stop cleanly and save")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write the metrics as TensorBoard events as well")
    ] = False,
) -> None:
    """Meta-train a network; every run leaves its settings, metrics, curves and a checkpoint in one folder.

    With `--data sinusoid` some defaults are others: those of `applications/imaml/README.md`.

    By `torchrun --nproc-per-node=N -m applications.imaml train ...` several processes share the tasks of a meta-step.
    """
    with explained(context, seconds="time_limit"), joined() as processes:
        given: dict[str, Any] = {entry.name: context.params[entry.name] for entry in fields(Config)}
        if resume:
            config = processes.from_first(lambda: _resumed(Config.load(out / CONFIG), given, context))
        else:
            typed = _typed(context)
            given |= {name: value for name, value in usual(data, algorithm).items() if name not in typed}
            given["queries"] = given["shots"] if queries is None else queries
            config = processes.from_first(lambda: Config(**given))
            processes.from_first(lambda: refuse_idle([config], typed))
        limits = processes.from_first(lambda: Limits(time_limit, quiet, tensorboard))
        processes.alike(lambda: processes.check(config))
        if download:
            processes.from_first(lambda: _fetch(config))
        done = train(config, out, limits, resume=resume, processes=processes)
        state = "trained" if done >= config.meta_steps else "stopped (continue with --resume)"
        if processes.is_first:
            typer.echo(f"{state}: {done} of {counted(config.meta_steps, 'meta-step')}; {out / METRICS}, {out / CURVE}")


@app.command("evaluate")
def evaluate_command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    tasks: Annotated[int, typer.Option(help="number of tasks")] = Protocol.tasks,
    split: Annotated[SplitName, typer.Option(help="classes that the tasks are drawn from")] = Protocol.split,
    batch_norm: Annotated[
        BatchNorm | None, typer.Option(help=f"{help_of('batch_norm')}; as in training by default")
    ] = Protocol.batch_norm,
    seed: Annotated[int, typer.Option(help="chooses the tasks")] = Protocol.seed,
    queries: Annotated[
        int | None, typer.Option(help=f"{help_of('queries')}; as in training by default")
    ] = Protocol.queries,
    inner_steps: Annotated[
        int | None, typer.Option(help="steps of the inner solver; as in training by default")
    ] = Protocol.inner_steps,
    regularized: Annotated[
        bool, typer.Option(help="learn tasks with the pull towards the meta-parameters, as in training")
    ] = Protocol.regularized,
    checkpoint: Annotated[CheckpointName, _CHECKPOINT] = Protocol.checkpoint,
    report: Annotated[
        Path | None, typer.Option(help=f"JSON to write, and a CSV beside it; {REPORT} of the run by default")
    ] = None,
    root: Annotated[str | None, typer.Option(help=f"{help_of('root')}, if it has moved")] = None,
    device: Annotated[str, _option("device")] = Config.device,
    threads: Annotated[int, _option("threads")] = Config.threads,
) -> None:
    """Measure the accuracy of a run on unseen classes, or its error on unseen waves: mean and 95 % interval."""
    with explained(context):
        protocol = Protocol(
            tasks,
            split,
            batch_norm,
            seed,
            queries=queries,
            inner_steps=inner_steps,
            regularized=regularized,
            checkpoint=checkpoint,
        )
        saved = Config.load(run / CONFIG)
        config = replace(saved, root=root or saved.root, device=device, threads=threads)
        refuse_idle([protocol.applied(config)], _typed(context))
        path = run / REPORT if report is None else report
        check_report(path, picture=config.is_regression)
        evaluation = evaluate(config, run, protocol)
        evaluation.save(path)
        typer.echo(str(evaluation))
        files = [path, path.with_suffix(".csv")]
        if config.is_regression:
            files.append(path.with_suffix(".png"))
            draw_waves(config, run, protocol, files[-1])
        typer.echo(", ".join(map(str, files)))


@app.command("adapt")
def adapt_command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    support: Annotated[Path, typer.Option(help="images to learn from: one folder for each class")],
    query: Annotated[Path, typer.Option(help="images to classify; in folders named like classes to have them counted")],
    out: Annotated[Path | None, typer.Option(help="folder for the answers; that of the run by default")] = None,
    inner_steps: Annotated[
        int | None, typer.Option(help=f"{help_of('inner_steps')}; as in training by default")
    ] = None,
    batch_norm: Annotated[
        BatchNorm | None, typer.Option(help=f"{help_of('batch_norm')}; as in training by default")
    ] = None,
    checkpoint: Annotated[CheckpointName, _CHECKPOINT] = Protocol.checkpoint,
    device: Annotated[str, _option("device")] = Config.device,
) -> None:
    """Learn classes of your own from a few images of each, and classify others: a table and a picture."""
    with explained(context):
        folder = out or run
        check_outside(folder, support, query)
        learner = Learner.load(
            run, device=device, inner_steps=inner_steps, batch_norm=batch_norm, checkpoint=checkpoint
        )
        answers = answer(learner, support, query)
        folder.mkdir(parents=True, exist_ok=True)
        answers.save(folder / TABLE)
        draw_answers(answers, folder / SHEET)
        typer.echo(f"{answers}; {folder / TABLE}, {folder / SHEET}")
        if answers.ignored:
            typer.echo(f"{counted(answers.ignored, 'file')} ignored, hidden or not .png, .jpg, .bmp or .webp", err=True)
        if learner.config.batch_norm == "transductive" and len(answers.query_names) < len(answers.classes):
            asked = counted(len(answers.query_names), "query image")
            typer.echo(
                f"warning: {asked} normalised by statistics of their own, which misleads where not all classes are "
                f"among them; --batch-norm support judges each by itself",
                err=True,
            )


@app.command("demo")
def demo_command(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="folder to make; one in runs/ named after the time by default")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="stop training after this time")] = 120,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Train on generated characters for a minute, and compare accuracies on unseen ones before and after adaptation."""
    with explained(context):
        folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
        typer.echo(str(demo(folder, seconds, quiet=quiet)))


@app.command("race")
def race_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder of the race; an unfinished one goes on")],
    of: Annotated[
        Subject, typer.Option("--of", help="what the runners differ in: the linear system, the inner problem, or all")
    ] = Race.subject,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"{_RUNNERS}; several times for several; all by default")
    ] = None,
    seeds: Annotated[int, typer.Option(help="runs of each variant")] = Race.seeds,
    test_tasks: Annotated[int, typer.Option(help="tasks of the accuracy after the last meta-step")] = Race.test_tasks,
    data: Annotated[DataName, _option("data")] = Config.data,
    root: Annotated[str | None, _option("root")] = Config.root,
    lam: Annotated[float, _option("lam")] = Config.lam,
    inner_lr: Annotated[float, _option("inner_lr")] = Config.inner_lr,
    inner_steps: Annotated[int, _option("inner_steps")] = Config.inner_steps,
    cg_steps: Annotated[int, _option("cg_steps")] = Config.cg_steps,
    meta_steps: Annotated[int, typer.Option(help="meta-steps of every run")] = 500,
    tasks: Annotated[int, _option("tasks")] = Config.tasks,
    validate_every: Annotated[int, typer.Option(help="meta-steps between the points of a curve")] = 50,
    validation_tasks: Annotated[int, _option("validation_tasks")] = Config.validation_tasks,
    device: Annotated[str, _option("device")] = Config.device,
    threads: Annotated[int, _option("threads")] = Config.threads,
    tight: Annotated[
        bool, typer.Option(help="compare the last meta-gradient with a tight reference: half a minute a run")
    ] = Race.tight,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Compare meta-gradients by what they learn in equal meta-steps and in equal time: a table and a picture."""
    with explained(context, variants="variant"):
        base = Config(
            data=data, root=root, lam=lam, inner_lr=inner_lr, inner_steps=inner_steps, cg_steps=cg_steps,
            meta_steps=meta_steps, tasks=tasks, validate_every=validate_every, validation_tasks=validation_tasks,
            device=device, threads=threads, schedule="constant", log_every=validate_every,
        )  # fmt: skip
        with explained(context, tasks="test_tasks"):
            protocol = Protocol(tasks=test_tasks)
        plan = Race(base, of, tuple(variant or ()), seeds, protocol.tasks, tight)
        refuse_idle(plan.runners().values(), _typed(context))
        done = race(plan, out, typer.echo, quiet=quiet)
        typer.echo(f"{'done' if done else 'stopped (the same command goes on)'}: {out / RACE_TABLE}, {out / PICTURE}")


app.command("paper")(paper_command)
app.add_typer(figures, name="figures")


def _fetch(config: Config) -> None:
    if config.root is None:
        raise ConfigError("root=None, so there is nowhere to download to; pass the folder for the archives.")
    for archive in fetch(config.data, Path(config.root), minimal=config.split if config.split in MINIMAL else None):
        typer.echo(f"fetched: {archive}")


def _resumed(saved: Config, given: dict[str, Any], context: typer.Context) -> Config:
    """The settings of a saved run, with those changed that were given and may be."""
    there = _typed(context)
    typed = {name: value for name, value in given.items() if name in there and value != getattr(saved, name)}
    # The cosine reaches zero at the last meta-step, so another last meta-step would be another schedule.
    fixed = {"meta_steps"} if saved.schedule == "cosine" else set()
    for name, value in typed.items():
        if name not in MUTABLE or name in fixed:
            raise ConfigError(
                f"{name}={value!r} differs from the run's {getattr(saved, name)!r}, and a resumed run goes on as it "
                f"began; leave the option out, or start a run in a new folder."
            )
    config = replace(saved, **typed)
    refuse_idle([config], typed)
    return config


def _typed(context: typer.Context) -> list[str]:
    """Names of the settings that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


if __name__ == "__main__":
    app()
