"""What every benchmark shares: timing, the table it prints, the JSON it writes, the machine it names."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Report:
    """The answer to one question.

    Attributes:
        question: what was asked, with the sizes.
        rows: measurements, all with the same keys.
        verdict: the figure that must be reached beside the one that was.
    """

    question: str
    rows: Sequence[Mapping[str, Any]]
    verdict: str


def machine(device: str) -> dict[str, Any]:
    """Device, threads and versions, to stand beside every figure."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def publish(name: str, report: Report, device: str, folder: Path) -> Path:
    """Print the table and write it as JSON.

    Args:
        name: of the benchmark; names the file.
        report: what it found.
        device: where it ran.
        folder: gets ``NAME.json``.

    Returns:
        The file.
    """
    console = Console()
    table = Table(title=report.question, title_justify="left")
    for column in report.rows[0]:
        table.add_column(column, justify="left" if isinstance(report.rows[0][column], str) else "right")
    for row in report.rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    console.print(table)
    console.print(report.verdict)
    console.print(machine(device))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(device), **asdict(report)}, indent=2) + "\n", encoding="utf-8")
    return path


def median_seconds(candidates: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """Median wall-clock seconds of each candidate, after a warm-up, taken in turns so that drift hits all alike.

    Args:
        candidates: what to time.
        device: is waited for before the clock is read.
        repeats: timed runs of each.
    """
    return {name: statistics.median(seconds) for name, seconds in _in_turns(candidates, device, repeats).items()}


def fastest_seconds(candidates: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """The same with the fastest run: whatever else the machine does can only add to it."""
    return {name: min(seconds) for name, seconds in _in_turns(candidates, device, repeats).items()}


def _in_turns(candidates: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, run in candidates.items():
            wait()
            begun = time.perf_counter()
            run()
            wait()
            if round_:
                taken[name].append(time.perf_counter() - begun)
    return taken
