"""What has been measured of a table, as Markdown beside the paper's numbers and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from applications.imaml.evaluate import mean_and_interval
from applications.imaml.paper.cells import Cell, Number
from applications.imaml.words import counted

__all__ = ["CellResult", "SeedResult", "as_json", "as_markdown"]

# Other images are called something else by the datasets, whatever their layout.
_COMPARABLE = ("omniglot", "mini-imagenet")


@dataclass(frozen=True)
class SeedResult:
    """One trained and evaluated network.

    Args:
        row: of its evaluation: accuracy, protocol and settings.
        accuracies: one a task, between 0 and 1.
        query_sets: of a training task.
        tasks: of a meta-step.
        curvature: of the linear system.
        seconds: spent training.
        hardware: on which.
        inner_steps: in training.
        shots: support images of a class in training.
    """

    row: Mapping[str, Any]
    accuracies: Sequence[float]
    query_sets: int
    tasks: int
    curvature: str
    seconds: float
    hardware: str
    inner_steps: int
    shots: int


@dataclass(frozen=True)
class CellResult:
    """What has been measured of a cell.

    Args:
        cell: which.
        seeds: one result a seed, of those that are done.
        failures: why others are not.
    """

    cell: Cell
    seeds: Sequence[SeedResult]
    failures: Sequence[str] = ()

    @property
    def number(self) -> Number | None:
        """The accuracy, or None where nothing is done yet.

        All seeds are judged by the same tasks. Their accuracies are averaged in each task, and the interval is that
        over tasks, as the paper's.
        """
        if not self.seeds:
            return None
        return Number(*mean_and_interval(torch.tensor([seed.accuracies for seed in self.seeds]).double().mean(0)))

    @property
    def comparable(self) -> bool:
        """Whether the images are those of the paper."""
        return all(seed.row["source"] in _COMPARABLE for seed in self.seeds)

    def entry(self) -> dict[str, Any]:
        """All about it, for JSON."""
        number = self.number
        return {
            "row": self.cell.algorithm,
            "column": self.cell.column,
            "ours": None if number is None else asdict(number),
            "paper": asdict(self.cell.published),
            "comparable": self.comparable,
            "failures": list(self.failures),
            "seeds": [asdict(seed) for seed in self.seeds],
        }


def as_json(table: str, settings: str, results: Sequence[CellResult]) -> dict[str, Any]:
    """The table for machines.

    Args:
        table: its name.
        settings: what its cells are trained with.
        results: of its cells.

    Returns:
        What JSON can hold.
    """
    return {"table": table, "settings": settings, "cells": [result.entry() for result in results]}


def as_markdown(table: str, settings: str, results: Sequence[CellResult], images: str | None = None) -> str:
    """The table for readers: the numbers beside the paper's, then what each depends on.

    Args:
        table: its name.
        settings: what its cells are trained with.
        results: of its cells.
        images: what was asked for in the place of the table's own images, if anything.

    Returns:
        Markdown.
    """
    columns = list(dict.fromkeys(result.cell.column for result in results))
    rows = list(dict.fromkeys(result.cell.algorithm for result in results))
    by_place = {(result.cell.algorithm, result.cell.column): result for result in results}
    # What was read says what it is, and may not be what it was taken for.
    sources = dict.fromkeys(seed.row["source"] for result in results for seed in result.seeds)
    used = ", ".join(sources) or images or table
    what = table if used == table else f"{used}, in the place of {table}"
    lines = [f"# {what}, {settings} settings: test accuracy (%), ours and the paper's, 95 % intervals over tasks", ""]
    lines += _line(["", *columns]), _line(["---"] * (len(columns) + 1))
    for row in rows:
        found = [by_place.get((row, column)) for column in columns]
        lines.append(_line([f"{row}: ours", *("—" if one is None else _ours(one) for one in found)]))
        whose = next(result.cell.source for result in results if result.cell.algorithm == row)
        lines.append(_line([whose, *("" if one is None else str(one.cell.published) for one in found)]))
    details = [_details(result, seed) for result in results for seed in result.seeds]
    if details:
        lines += ["", _line(details[0]), _line(["---"] * len(details[0]))]
        lines += [_line(map(str, detail.values())) for detail in details]
    failures = [f"- {result.cell.name}: {failure}" for result in results for failure in result.failures]
    if not all(result.comparable for result in results):
        failures.append("- \\* not the paper's images: the numbers do not compare")
    return "\n".join([*lines, "", *failures]).rstrip() + "\n"


def _ours(result: CellResult) -> str:
    number = result.number
    if number is None:
        return "diverged" if result.failures else "—"
    return str(number) + ("" if result.comparable else "\\*")


def _details(result: CellResult, seed: SeedResult) -> dict[str, Any]:
    row, inner = seed.row, seed.row["inner"]
    step = f" of {row['inner_lr']:g}" if inner in ("gradient", "adam") else ""
    curvature = f", {seed.curvature}" if row["algorithm"] == "imaml" else ""
    return {
        "cell": result.cell.name,
        "seed": row["training_seed"],
        "accuracy": Number(row["accuracy"], row["interval"]),
        "images": row["source"],
        "protocol": f"{row['split']}, {row['tasks']} tasks, {counted(row['queries'], 'query image')} a class, "
        f"batch norm {row['batch_norm']}, task seed {row['task_seed']}",
        "inner problem": f"λ = {row['lam']:g}, {counted(row['inner_steps'], f'{inner} step')}{step}{curvature}"
        f"{_otherwise(seed)}",
        "budget": f"{counted(row['meta_step'], 'meta-step')} of {counted(seed.tasks, 'task')} with "
        f"{counted(seed.query_sets, 'query set')}, {seed.seconds / 60:.1f} minutes",
        "hardware": seed.hardware,
    }


def _otherwise(seed: SeedResult) -> str:
    """What training has otherwise than the evaluation."""
    told = []
    if seed.inner_steps != seed.row["inner_steps"]:
        told.append(counted(seed.inner_steps, "step"))
    if seed.shots != seed.row["shots"]:
        told.append(counted(seed.shots, "support image") + " a class")
    return f"; in training {', '.join(told)}" if told else ""


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
