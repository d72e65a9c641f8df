"""Fill a table of the paper: train and evaluate every cell, going on where an earlier call was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from applications.imaml import checkpoint
from applications.imaml.checkpoint import write_atomically
from applications.imaml.config import Config, ConfigError
from applications.imaml.device import use
from applications.imaml.evaluate import REPORT, Protocol, evaluate
from applications.imaml.paper.cells import Overrides, SettingsName, TableName, cells_of, config_of, protocol_of
from applications.imaml.paper.hardware import hardware
from applications.imaml.paper.results import CellResult, SeedResult, as_json, as_markdown
from applications.imaml.run_folder import CONFIG, RunError
from applications.imaml.train import Limits, train

__all__ = ["DONE", "Request", "fill"]

DONE = "cell.json"
# They say where a run computes, not what.
_WHERE = ("root", "device", "threads", "checkpoint_every")


@dataclass(frozen=True)
class Request:
    """Which cells to fill, and how.

    Args:
        table: which.
        settings: "tuned" for this application's defaults, "paper" for those that the paper states.
        seeds: runs of each cell; the first has seed 0.
        cells: names or parts of names; all without.
        overrides: what is different from the settings.
        protocol: of the evaluations.
        seconds: stop cleanly after this time; None for no limit.
        quiet: show no progress.

    Raises:
        ConfigError: if there are no seeds.
    """

    table: TableName
    settings: SettingsName = "tuned"
    seeds: int = 1
    cells: tuple[str, ...] = ()
    overrides: Overrides = field(default_factory=Overrides)
    protocol: Protocol = field(default_factory=Protocol)
    seconds: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} trains nothing; pass an integer of at least 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} cannot be; pass a number above 0.")


def fill(request: Request, out: Path, told: Callable[[str], None]) -> tuple[bool, str, list[Path]]:
    """Train and evaluate what is missing of the chosen cells, all with one seed before any with the next.

    Args:
        request: what.
        out: gets ``NAME.md`` and ``NAME.json``, renewed after every cell, and one folder a cell and seed, which is a
            run like any other. What earlier calls have measured there with the same settings stays in the table.
        told: hears of every cell.

    Returns:
        Whether all is done, the table as Markdown, and its files.

    Raises:
        ConfigError: if a cell's folder holds a run with other settings, or the settings cannot be.
        RunError: if a folder cannot be written.
        CheckpointError: if a checkpoint cannot be read or written.
        OSError: if the dataset cannot be read.
        ValueError: if it is damaged or too small.
    """
    cells = cells_of(request.table, request.cells)
    # What cannot be is refused before the first hour.
    plan = [
        (cell, config_of(cell, request.settings, seed, request.overrides), out / cell.name / f"seed-{seed}")
        for seed in range(request.seeds)
        for cell in cells
    ]
    for _, config, folder in plan:
        _check_same(config, folder)
    results = {cell.name: CellResult(cell, []) for cell in cells}
    kept = _kept(request, out)
    begun, complete = time.monotonic(), True
    for cell, config, folder in plan:
        before = results[cell.name]
        try:
            protocol = protocol_of(cell, request.settings, request.protocol)
            seed = _done(config, folder, protocol) or _filled(config, folder, request, protocol, begun)
            if seed is None:
                complete = False
                break
            results[cell.name] = CellResult(cell, [*before.seeds, seed], before.failures)
        except RunError as error:
            if not (folder / checkpoint.POINTER).exists():
                raise
            # It diverged, which is a result: the other cells go on.
            results[cell.name] = CellResult(cell, before.seeds, [*before.failures, f"seed {config.seed}: {error}"])
        told(f"{cell.name}, seed {config.seed}: {results[cell.name].number or 'diverged'} (paper: {cell.published})")
        _write(request, out, _tabled(request.table, results, kept))
    text, files = _write(request, out, _tabled(request.table, results, kept))
    return complete, text, files


def _kept(request: Request, out: Path) -> dict[str, list[SeedResult]]:
    """What earlier calls have measured with these settings and is not asked for now, by the name of the cell."""
    asked = {cell.name for cell in cells_of(request.table, request.cells)}
    kept: dict[str, list[SeedResult]] = {}
    for cell in cells_of(request.table, ()):
        protocol = protocol_of(cell, request.settings, request.protocol)
        for seed in count(request.seeds if cell.name in asked else 0):
            folder = out / cell.name / f"seed-{seed}"
            config = config_of(cell, request.settings, seed, request.overrides)
            found = None if _differing(config, folder) else _done(config, folder, protocol)
            if found is None:
                break
            kept.setdefault(cell.name, []).append(found)
    return kept


def _tabled(
    table: TableName, results: Mapping[str, CellResult], kept: Mapping[str, Sequence[SeedResult]]
) -> list[CellResult]:
    """All that is done or asked for, in the order of the table."""
    tabled = []
    for cell in cells_of(table, ()):
        if cell.name in results or cell.name in kept:
            now = results.get(cell.name, CellResult(cell, []))
            tabled.append(replace(now, seeds=[*now.seeds, *kept.get(cell.name, ())]))
    return tabled


def _filled(config: Config, folder: Path, request: Request, protocol: Protocol, begun: float) -> SeedResult | None:
    """Train to the end and evaluate; None if training was stopped before."""
    left = None if request.seconds is None else request.seconds - (time.monotonic() - begun)
    if left is not None and left <= 0:
        return None
    done = train(config, folder, Limits(left, request.quiet), resume=(folder / CONFIG).exists())
    if done < config.meta_steps:
        return None
    evaluation = evaluate(config, folder, protocol)
    evaluation.save(folder / REPORT)
    result = SeedResult(
        row=evaluation.row(),
        accuracies=evaluation.measured.after.tolist(),
        query_sets=config.query_sets,
        tasks=config.tasks,
        curvature=config.curvature,
        seconds=checkpoint.load(folder).numbers["trained_seconds"],
        hardware=hardware(use(config)),
        inner_steps=config.inner_steps,
        shots=config.shots,
    )
    content = {"protocol": asdict(protocol), "result": asdict(result)}
    write_atomically(folder / DONE, (json.dumps(content, indent=2) + "\n").encode())
    return result


def _done(config: Config, folder: Path, protocol: Protocol) -> SeedResult | None:
    """What an earlier call has measured in the same way, if it has."""
    if not (folder / DONE).exists():
        return None
    try:
        content = json.loads((folder / DONE).read_text(encoding="utf-8"))
        result = SeedResult(**content["result"])
        same = content["protocol"] == asdict(protocol) and result.row["meta_step"] == config.meta_steps
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / DONE} is not what was written ({type(error).__name__}: {error}); delete it, and the cell is "
            f"evaluated anew."
        ) from error
    return result if same else None


def _check_same(config: Config, folder: Path) -> None:
    """That a run which is there is one with these settings."""
    differing = _differing(config, folder)
    if differing:
        told = ", ".join(f"{name}={there!r} there, {now!r} now" for name, (there, now) in differing.items())
        raise ConfigError(
            f"{folder} holds a run with other settings ({told}), and a cell goes on as it began; pass the same "
            f"settings, or another folder."
        )


def _differing(config: Config, folder: Path) -> dict[str, tuple[Any, Any]]:
    """What the run in a folder is trained with and what it would be now, by the name of each setting that differs."""
    if not (folder / CONFIG).exists():
        return {}
    saved = Config.load(folder / CONFIG)
    names = [entry.name for entry in fields(Config) if entry.name not in _WHERE]
    both = {name: (getattr(saved, name), getattr(config, name)) for name in names}
    return {name: (there, now) for name, (there, now) in both.items() if there != now}


def _write(request: Request, out: Path, results: list[CellResult]) -> tuple[str, list[Path]]:
    text = as_markdown(request.table, request.settings, results, request.overrides.data)
    content = as_json(request.table, request.settings, results)
    markdown, data = out / f"{request.table}.md", out / f"{request.table}.json"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(markdown, text.encode())
    write_atomically(data, (json.dumps(content, indent=2) + "\n").encode())
    return text, [markdown, data]
