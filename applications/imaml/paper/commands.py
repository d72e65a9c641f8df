"""The commands ``figures`` and ``paper``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from applications.imaml.config import Config, CurvatureName, DataName, help_of
from applications.imaml.evaluate import Protocol
from applications.imaml.explained import explained
from applications.imaml.paper.accuracy import AccuracySettings, accuracy_of_gradients
from applications.imaml.paper.cells import Overrides, SettingsName, TableName
from applications.imaml.paper.chart import Chart
from applications.imaml.paper.cost import Clock, CostSettings, memory, seconds
from applications.imaml.paper.linear import RegressionSettings
from applications.imaml.paper.regression import regression
from applications.imaml.paper.table import Request, fill

__all__ = ["figures", "paper_command"]

figures = typer.Typer(
    help="Draw the paper's figures from runs made there and then: PNG, JSON and CSV.", no_args_is_help=True
)

_Out = Annotated[Path, typer.Option(help="folder for the files")]


@figures.command("regression")
def regression_command(
    context: typer.Context,
    out: _Out,
    features: Annotated[int, typer.Option(help="unknowns of a task")] = RegressionSettings.features,
    samples: Annotated[int, typer.Option(help="support and query samples of a task")] = RegressionSettings.samples,
    tasks: Annotated[int, typer.Option(help="tasks of a problem")] = RegressionSettings.tasks,
    condition: Annotated[float, typer.Option(help="of the features' covariance")] = RegressionSettings.condition,
    noise: Annotated[float, typer.Option(help="standard deviation of the targets")] = RegressionSettings.noise,
    lam: Annotated[float, typer.Option(help="strength of the pull")] = RegressionSettings.lam,
    most_inner_steps: Annotated[
        int, typer.Option(help="powers of two are measured up to there")
    ] = RegressionSettings.most_inner_steps,
    train_inner_steps: Annotated[
        int, typer.Option(help="inner steps of meta-training")
    ] = RegressionSettings.train_inner_steps,
    meta_steps: Annotated[int, typer.Option(help="of meta-training")] = RegressionSettings.meta_steps,
    repeats: Annotated[int, typer.Option(help="problems, each drawn anew")] = RegressionSettings.repeats,
    seed: Annotated[int, typer.Option(help="chooses them")] = RegressionSettings.seed,
) -> None:
    """Linear regression: meta-gradients against the exact one, and what their errors do to meta-training."""
    with explained(context):
        settings = RegressionSettings(**_given(context, RegressionSettings))
        _save(out, lambda: regression(settings))


@figures.command("accuracy")
def accuracy_command(
    context: typer.Context,
    out: _Out,
    run: Annotated[Path | None, typer.Option(help="a run whose trained network the last panel is about")] = None,
    tasks: Annotated[int, typer.Option(help="one repeat each")] = AccuracySettings.tasks,
    lam: Annotated[float, typer.Option(help="strength of the pull, smooth network")] = AccuracySettings.lam,
    lr: Annotated[float, typer.Option(help="of its inner gradient descent")] = AccuracySettings.lr,
    most_inner_steps: Annotated[
        int, typer.Option(help="powers of two are measured up to there")
    ] = AccuracySettings.most_inner_steps,
    most_cg_steps: Annotated[int, typer.Option(help="likewise")] = AccuracySettings.most_cg_steps,
    seed: Annotated[int, typer.Option(help="chooses tasks and networks")] = AccuracySettings.seed,
) -> None:
    """Networks: true errors of meta-gradients beside what their certificate estimates."""
    with explained(context):
        settings = AccuracySettings(**_given(context, AccuracySettings))
        _save(out, lambda: accuracy_of_gradients(settings, run))


_Ways = Annotated[int, typer.Option(help=help_of("ways"))]
_Shots = Annotated[int, typer.Option(help="support and query images of a class")]
_Tasks = Annotated[int, typer.Option(help=help_of("tasks"))]
_Steps = Annotated[int, typer.Option(help="powers of two are measured up to there")]
_PathSteps = Annotated[int, typer.Option(help="likewise, for MAML")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
_Threads = Annotated[int, typer.Option(help=help_of("threads"))]
_CGSteps = Annotated[int, typer.Option(help="of iMAML")]


@figures.command("memory")
def memory_command(
    context: typer.Context,
    out: _Out,
    ways: _Ways = CostSettings.ways,
    shots: _Shots = CostSettings.shots,
    tasks: _Tasks = CostSettings.tasks,
    cg_steps: _CGSteps = CostSettings.cg_steps,
    most_inner_steps: _Steps = CostSettings.most_inner_steps,
    most_path_steps: _PathSteps = CostSettings.most_path_steps,
    device: _Device = CostSettings.device,
    threads: _Threads = CostSettings.threads,
) -> None:
    """Peak memory of a meta-gradient against inner steps, each in a fresh process."""
    with explained(context):
        settings = CostSettings(**_given(context, CostSettings))
        _save(out, lambda: memory(settings))


@figures.command("time")
def time_command(
    context: typer.Context,
    out: _Out,
    ways: _Ways = CostSettings.ways,
    shots: _Shots = CostSettings.shots,
    tasks: _Tasks = CostSettings.tasks,
    cg_steps: _CGSteps = CostSettings.cg_steps,
    most_inner_steps: _Steps = CostSettings.most_inner_steps,
    most_path_steps: _PathSteps = CostSettings.most_path_steps,
    repeats: Annotated[int, typer.Option(help="timed meta-steps")] = CostSettings.repeats,
    clock: Annotated[
        Clock, typer.Option(help="wall; or cpu: the process's own seconds, where others compute as well")
    ] = CostSettings.clock,
    device: _Device = CostSettings.device,
    threads: _Threads = CostSettings.threads,
) -> None:
    """Time of a meta-step against inner steps."""
    with explained(context):
        settings = CostSettings(**_given(context, CostSettings))
        _save(out, lambda: seconds(settings))


def paper_command(
    context: typer.Context,
    table: Annotated[TableName, typer.Option(help="which table")],
    out: Annotated[Path, typer.Option(help="folder for the table and for one run a cell and seed")],
    root: Annotated[str | None, typer.Option(help=help_of("root"))] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(help="fill these only: a name such as 5way-1shot-imaml-hf, or a part of one; may be repeated"),
    ] = None,
    settings: Annotated[
        SettingsName,
        typer.Option(
            help="tuned: this application's defaults; paper: what the paper states, and MAML's and Reptile's own"
        ),
    ] = Request.settings,
    seeds: Annotated[int, typer.Option(help="runs of each cell")] = Request.seeds,
    meta_steps: Annotated[int | None, typer.Option(help="20,000 by default, and as published with paper")] = None,
    tasks: Annotated[
        int | None,
        typer.Option(help="of a meta-step; 32 by default, 4 with mini-imagenet, and as published with paper"),
    ] = None,
    query_sets: Annotated[int | None, typer.Option(help=help_of("query_sets"))] = None,
    curvature: Annotated[CurvatureName | None, typer.Option(help="of iMAML, in the place of the settings'")] = None,
    test_tasks: Annotated[int, typer.Option(help="tasks of an evaluation")] = Protocol.tasks,
    data: Annotated[
        DataName | None, typer.Option(help="other images, to rehearse: their numbers don't compare")
    ] = None,
    device: Annotated[str, typer.Option(help=help_of("device"))] = Config.device,
    threads: Annotated[int, typer.Option(help=help_of("threads"))] = Config.threads,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which to stop cleanly and save")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="show no progress")] = False,
) -> None:
    """Train and evaluate the cells of a table of the paper, beside its numbers; call again to go on."""
    with explained(context, cells="cell", seconds="time_limit"):
        with explained(context, tasks="test_tasks"):
            protocol = Protocol(tasks=test_tasks)
        overrides = Overrides(data, root, meta_steps, tasks, query_sets, curvature, device, threads)
        request = Request(table, settings, seeds, tuple(cell or ()), overrides, protocol, time_limit, quiet)
        complete, text, files = fill(request, out, typer.echo)
        typer.echo(text)
        typer.echo(", ".join(map(str, files)))
        if not complete:
            typer.echo("stopped; the same command goes on from there")


def _given(context: typer.Context, settings: type) -> dict[str, Any]:
    names = {entry.name for entry in fields(settings)}
    return {name: value for name, value in context.params.items() if name in names}


def _save(out: Path, draw: Any) -> None:
    # An unwritable folder is found out before the minutes of measuring.
    out.mkdir(parents=True, exist_ok=True)
    chart: Chart = draw()
    files = chart.save(out)
    for finding in chart.findings:
        typer.echo(finding)
    typer.echo(", ".join(map(str, files)))
