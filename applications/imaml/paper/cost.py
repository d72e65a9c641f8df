"""Memory and time of a meta-step against the number of inner steps (figure 2b of the paper)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from applications.imaml.config import AlgorithmName, Config, ConfigError
from applications.imaml.device import use
from applications.imaml.paper.chart import FIRST_ORDER, IMAML, MAML, Chart, Panel, Series, Style
from applications.imaml.paper.hardware import hardware
from applications.imaml.paper.probe import given, memory_of, meta_gradient
from applications.imaml.words import counted

Clock = Literal["wall", "cpu"]

__all__ = ["Clock", "CostSettings", "memory", "seconds"]

_WAYS: tuple[tuple[AlgorithmName, str, Style], ...] = (
    ("imaml", "iMAML", IMAML),
    ("maml", "MAML, through the path", MAML),
    ("fomaml", "first-order", FIRST_ORDER),
)
_MIB = 2**20


@dataclass(frozen=True)
class CostSettings:
    """The meta-step: the network of the Omniglot experiments on 28x28 images.

    Args:
        ways: classes of a task.
        shots: support and query images of a class.
        tasks: of the meta-step.
        cg_steps: of iMAML.
        most_inner_steps: the sweep goes by powers of two from 1 to there.
        most_path_steps: where MAML's ends, whose memory and time grow with the steps.
        repeats: of a measured time; a peak of memory is one.
        device: where.
        threads: CPU threads; 0 leaves PyTorch's choice.
        clock: "wall", or "cpu" for the process's own seconds over all its threads, where others compute as well.

    Raises:
        ConfigError: if a number cannot be.
    """

    ways: int = 20
    shots: int = 5
    tasks: int = 1
    cg_steps: int = 5
    most_inner_steps: int = 32
    most_path_steps: int = 16
    repeats: int = 3
    device: str = "cpu"
    threads: int = 0
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        if self.clock == "cpu" and self.device != "cpu":
            raise ConfigError(
                f"clock='cpu' doesn't see what device={self.device!r} computes; pass clock='wall', or device='cpu'."
            )
        for name in ("most_inner_steps", "most_path_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass an integer of at least 1.")

    def steps(self, algorithm: AlgorithmName) -> list[int]:
        """Numbers of inner steps at which an algorithm is measured.

        Args:
            algorithm: which.

        Returns:
            Powers of two.
        """
        most = self.most_inner_steps
        most = min(most, self.most_path_steps) if algorithm == "maml" else most
        return [2**k for k in range(most.bit_length())]

    def config(self, algorithm: AlgorithmName, steps: int) -> Config:
        """Settings of one meta-step.

        Args:
            algorithm: which.
            steps: inner steps.

        Returns:
            With the strength and step size of the paper, and Gauss-Newton curvature.

        Raises:
            ConfigError: if they cannot be.
        """
        return Config(
            ways=self.ways,
            shots=self.shots,
            queries=self.shots,
            algorithm=algorithm,
            lam=2.0,
            inner_lr=0.1,
            inner_steps=steps,
            cg_steps=self.cg_steps,
            tasks=self.tasks,
            device=self.device,
            threads=self.threads,
        )


def memory(settings: CostSettings) -> Chart:
    """Peak memory of a meta-gradient against inner steps, each in a fresh process.

    Args:
        settings: of the experiment.

    Returns:
        The figure.

    Raises:
        RunError: if a process fails, for instance for lack of memory.
    """
    gradient = memory_of(settings.config("imaml", 1), gradient=True)
    unit = gradient.peak - gradient.before
    series, found = [], {}
    for algorithm, label, style in _WAYS:
        steps = settings.steps(algorithm)
        taken = [memory_of(settings.config(algorithm, k)) for k in steps]
        found[label] = torch.tensor([[m.peak - m.before] for m in taken], dtype=torch.float64)
        series.append(Series.of(label, style, steps, found[label] / _MIB))
    panel = Panel("above what the process had before", "inner gradient steps", "peak memory (MiB)", series)
    counted = "the allocator's" if settings.device.startswith("cuda") else "the resident memory of the process"
    return Chart(
        "memory",
        _title("Peak memory of a meta-gradient", settings),
        f"one fresh process a point; {counted}",
        _recorded(settings),
        [panel],
        [f"an inner gradient of all tasks takes {unit / _MIB:.0f} MiB"]
        + [_growth(s, "MiB", found[s.label][-1, 0].item() / unit) for s in series],
    )


def seconds(settings: CostSettings) -> Chart:
    """Time of a meta-step, Adam included, against inner steps.

    Args:
        settings: of the experiment.

    Returns:
        The figure.
    """
    device = use(settings.config("imaml", 1))
    taken: dict[tuple[AlgorithmName, int], list[float]] = {
        (algorithm, k): [] for algorithm, _, _ in _WAYS for k in settings.steps(algorithm)
    }
    # In turns, so that whatever else the machine does hits all alike; the first turn is the warm-up.
    for turn in range(settings.repeats + 1):
        for (algorithm, k), found in taken.items():
            measured = _timed(settings.config(algorithm, k), settings.clock, device)
            if turn:
                found.append(measured)
    series = []
    for algorithm, label, style in _WAYS:
        steps = settings.steps(algorithm)
        rows = torch.tensor([taken[algorithm, k] for k in steps], dtype=torch.float64)
        series.append(Series.of(label, style, steps, rows))
    what = "time (s)" if settings.clock == "wall" else "CPU time (s)"
    panel = Panel("one meta-step", "inner gradient steps", what, series)
    return Chart(
        "time",
        _title("Time of a meta-step", settings),
        f"line: median of {counted(settings.repeats, 'meta-step')} after a warm-up; band: shortest to longest",
        _recorded(settings),
        [panel],
        [_growth(s, "s") for s in series] + [_ratio(series)],
    )


def _timed(config: Config, clock: Clock, device: torch.device) -> float:
    """Seconds of one meta-step."""
    start = given(config, device)
    optimizer = torch.optim.Adam(start.theta.values(), lr=config.meta_lr)
    now = time.perf_counter if clock == "wall" else time.process_time
    _wait(device)
    begun = now()
    meta_gradient(start, config)
    optimizer.step()
    _wait(device)
    return now() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _title(what: str, settings: CostSettings) -> str:
    tasks, steps = counted(settings.tasks, "task"), counted(settings.cg_steps, "CG step")
    return f"{what}: {settings.ways}-way {settings.shots}-shot, {tasks}, {steps}"


def _recorded(settings: CostSettings) -> dict[str, Any]:
    return asdict(settings) | {"hardware": hardware(settings.device)}


def _growth(series: Series, unit: str, gradients: float | None = None) -> str:
    first, last = series.median[0], series.median[-1]
    of_gradients = "" if gradients is None else f", which is {gradients:.2f} inner gradients"
    return (
        f"{series.label}: {first:.3g} {unit} with {counted(series.x[0], 'inner step')}, {last:.3g} {unit} with "
        f"{series.x[-1]:g}{of_gradients}"
    )


def _ratio(series: Sequence[Series]) -> str:
    """Of MAML's time to iMAML's, where both were measured last."""
    by_label = {s.label: dict(zip(s.x, s.median, strict=True)) for s in series}
    implicit, path = by_label["iMAML"], by_label["MAML, through the path"]
    k = max(set(implicit) & set(path))
    return f"with {counted(k, 'inner step')} MAML takes {path[k] / implicit[k]:.2f} times as long as iMAML"
