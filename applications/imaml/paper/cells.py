"""The cells of the paper's tables: what is trained in each, and the number that the paper has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from applications.imaml.config import AlgorithmName, Config, ConfigError, CurvatureName, DataName, usual_lam
from applications.imaml.evaluate import Protocol
from applications.imaml.paper.quoted import QUOTED, QuotedName

__all__ = ["TABLES", "Cell", "Number", "Overrides", "SettingsName", "TableName", "cells_of", "config_of", "protocol_of"]

TableName = Literal["omniglot", "mini-imagenet"]
RowName = Literal["imaml-gd", "imaml-hf", "first-order", QuotedName]
SettingsName = Literal["tuned", "paper"]


@dataclass(frozen=True)
class Number:
    """An accuracy in percent.

    Args:
        mean: over tasks.
        interval: half of a 95 % interval.
    """

    mean: float
    interval: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.interval:.2f}"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        table: which.
        row: short name of the algorithm.
        ways: classes of a task.
        shots: support images of a class.
        published: what the paper has there, or quotes: for the first-order row, of first-order MAML.
    """

    table: TableName
    row: RowName
    ways: int
    shots: int
    published: Number

    @property
    def column(self) -> str:
        """Its column's heading."""
        return f"{self.ways}-way {self.shots}-shot"

    @property
    def algorithm(self) -> str:
        """Its row's heading."""
        return _HEADINGS[self.row]

    @property
    def source(self) -> str:
        """Heading of the row with the published numbers."""
        return f"{self.algorithm}: the paper" if self.row in _OWN else f"{_QUOTED_AS[self.row]}, quoted by the paper"

    @property
    def name(self) -> str:
        """By which it is chosen, and which its folder has."""
        return f"{self.ways}way-{self.shots}shot-{self.row}"


@dataclass(frozen=True)
class Overrides:
    """What a table's settings are replaced by; None leaves them.

    Args:
        data: images in the place of the table's own, to rehearse it; its numbers compare with nothing.
        root: folder with the files of the dataset.
        meta_steps: for a smaller budget.
        tasks: of a meta-step, likewise.
        query_sets: of a training task.
        curvature: of iMAML's linear system.
        device: where.
        threads: CPU threads; 0 leaves PyTorch's choice.

    Raises:
        ConfigError: if the data have no classes.
    """

    data: DataName | None = None
    root: str | None = None
    meta_steps: int | None = None
    tasks: int | None = None
    query_sets: int | None = None
    curvature: CurvatureName | None = None
    device: str = Config.device
    threads: int = Config.threads

    def __post_init__(self) -> None:
        if self.data == "sinusoid":
            Config(data=self.data).check_classes()


_HEADINGS: Mapping[RowName, str] = MappingProxyType(
    {
        "imaml-gd": "iMAML, gradient descent",
        "imaml-hf": "iMAML, Hessian-free",
        "first-order": "first-order",
        "maml": "MAML",
        "reptile": "Reptile",
    }
)

_ALGORITHMS: Mapping[RowName, AlgorithmName] = MappingProxyType(
    {"imaml-gd": "imaml", "imaml-hf": "imaml", "first-order": "fomaml", "maml": "maml", "reptile": "reptile"}
)
_OWN = ("imaml-gd", "imaml-hf")
_QUOTED_AS: Mapping[RowName, str] = MappingProxyType(
    {"first-order": "first-order MAML", "maml": "MAML", "reptile": "Reptile"}
)

_COLUMNS: Mapping[TableName, Sequence[tuple[int, int]]] = MappingProxyType(
    {"omniglot": ((5, 1), (5, 5), (20, 1), (20, 5)), "mini-imagenet": ((5, 1),)}
)

# Rajeswaran et al. 2019, tables 2 and 3, which quote MAML from Finn et al. 2017, and first-order MAML and Reptile from
# Nichol et al. 2018.
_PUBLISHED: Mapping[TableName, Mapping[RowName, Sequence[tuple[float, float]]]] = MappingProxyType(
    {
        "omniglot": {
            "imaml-gd": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
            "imaml-hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
            "first-order": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
            "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
            "reptile": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
        },
        "mini-imagenet": {
            "imaml-gd": ((48.96, 1.84),),
            "imaml-hf": ((49.30, 1.88),),
            "first-order": ((48.07, 1.75),),
            "maml": ((48.70, 1.84),),
            "reptile": ((49.97, 0.32),),
        },
    }
)

TABLES: Mapping[TableName, Sequence[Cell]] = MappingProxyType(
    {
        table: tuple(
            Cell(table, row, ways, shots, Number(*number))
            for row, numbers in _PUBLISHED[table].items()
            for (ways, shots), number in zip(_COLUMNS[table], numbers, strict=True)
        )
        for table in get_args(TableName)
    }
)
"""All cells of each table, row by row."""

# Below its table 2 the paper says that Hessian-free takes 5 CG steps for a direction and its step size from a line
# search, but not how many directions; and the published code has no Hessian-free solver.
_NEWTON_STEPS = 3
# Not in the paper, but in the instructions for its code: at least so many meta-steps, of so many tasks.
_META_STEPS, _TASKS = 20_000, 32
# For Mini-ImageNet the paper gives strength and inner steps only. These are MAML's, whose protocol it follows (Finn et
# al. 2017, appendix A.1: a meta-batch of 4 for one shot, 15 examples of a class for the meta-gradient).
_MINI_IMAGENET_QUERIES, _MINI_IMAGENET_TASKS = 15, 4


def cells_of(table: TableName, chosen: Sequence[str]) -> list[Cell]:
    """The cells to fill.

    Args:
        table: which.
        chosen: names or parts of names, such as "5way-1shot" or "imaml-hf"; all cells without.

    Returns:
        Those cells whose name has one of the parts in it, in the table's order.

    Raises:
        ConfigError: if a part is in no cell's name.
    """
    cells = TABLES[table]
    for part in chosen:
        if not any(_matches(cell, part) for cell in cells):
            raise ConfigError(
                f"cells={part!r} is in no cell of {table}; pass one of {', '.join(cell.name for cell in cells)}, or a "
                f"part of such a name."
            )
    return [cell for cell in cells if not chosen or any(_matches(cell, part) for part in chosen)]


def _matches(cell: Cell, part: str) -> bool:
    # Whole words, so that 5way-1shot is not 25way-1shot nor 5way-15shot.
    return f"-{part}-" in f"-{cell.name}-"


def config_of(cell: Cell, settings: SettingsName, seed: int, overrides: Overrides) -> Config:
    """What a cell is trained with.

    Args:
        cell: which.
        settings: "tuned" for this application's defaults, with the budget of the paper; "paper" for what it says, and
            for MAML and Reptile what their own papers say.
        seed: of the run.
        overrides: what is different.

    Returns:
        The settings of its run.

    Raises:
        ConfigError: if they cannot be.
    """
    mini, algorithm = cell.table == "mini-imagenet", _ALGORITHMS[cell.row]
    given = {name: value for name, value in vars(overrides).items() if value is not None}
    if algorithm != "imaml":
        # It has no linear system.
        given.pop("curvature", None)
    if given.get("data") == "glyphs":
        given.pop("root", None)
    values: dict[str, Any] = {
        "data": cell.table,
        "ways": cell.ways,
        "shots": cell.shots,
        "queries": _MINI_IMAGENET_QUERIES if mini else cell.shots,
        # Where there is one query image a class, others are there to be used. Reptile doesn't look at them.
        "query_sets": 4 if settings == "tuned" and not mini and cell.shots == 1 and cell.row != "reptile" else 1,
        "algorithm": algorithm,
        "inner": "hessian-free" if cell.row == "imaml-hf" else "gradient",
        "meta_steps": _META_STEPS,
        "tasks": _MINI_IMAGENET_TASKS if mini else _TASKS,
        "checkpoint_every": 500,
        "seed": seed,
    }
    return Config(**values | (_paper(cell) if settings == "paper" else _tuned(cell)) | given)


def protocol_of(cell: Cell, settings: SettingsName, protocol: Protocol) -> Protocol:
    """How a cell is evaluated.

    Args:
        cell: which.
        settings: "tuned" or "paper".
        protocol: of the table.

    Returns:
        The same; for MAML and Reptile as their papers have them, with their inner steps in evaluation, and as many
        support images as the column says where training has more.
    """
    if settings == "paper" and (cell.row == "maml" or cell.row == "reptile"):
        quoted = QUOTED[cell.table, cell.row, cell.ways, cell.shots]
        return replace(protocol, inner_steps=quoted.test_steps, shots=cell.shots)
    return protocol


def _tuned(cell: Cell) -> dict[str, Any]:
    if cell.row == "maml" or cell.row == "reptile":
        return {"lam": usual_lam(cell.row)}
    return {"inner_steps": _NEWTON_STEPS, "cg_steps": 5} if cell.row == "imaml-hf" else {}


def _paper(cell: Cell) -> dict[str, Any]:
    if cell.row == "maml" or cell.row == "reptile":
        return QUOTED[cell.table, cell.row, cell.ways, cell.shots].training(cell.row)
    mini = cell.table == "mini-imagenet"
    descent = 10 if mini else {5: 16, 20: 25}[cell.ways]
    return {
        # First-order MAML, which the published number beside that row is of, has no pull.
        "lam": 0.0 if cell.row == "first-order" else 0.5 if mini else 2.0,
        # Both learning rates are those of the instructions for the published code, which is about Omniglot.
        "inner_lr": 0.1,
        "inner_steps": _NEWTON_STEPS if cell.row == "imaml-hf" else descent,
        "cg_steps": 5,
        "meta_lr": 1e-3,
        "schedule": "constant",
        **({} if cell.row == "first-order" else {"curvature": "hessian-unguarded"}),
    }
