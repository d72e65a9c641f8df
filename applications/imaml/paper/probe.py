"""One meta-step in a process of its own, which prints the memory it took: ``python -m applications.imaml.paper.probe``.

On a CPU memory is the peak of the process, which never falls again: hence one process for every measurement.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.algorithms import meta_loss
from applications.imaml.config import Config
from applications.imaml.device import use
from applications.imaml.episodes import Tasks, generator_for
from applications.imaml.networks import Parameters, forward, initialize

if sys.platform != "win32":
    import resource


__all__ = ["Given", "Memory", "given", "inner_gradient", "meta_gradient"]

SIDE = 28


class Memory(NamedTuple):
    """Bytes before the meta-step and at its peak."""

    before: int
    peak: int


class Given(NamedTuple):
    """What a meta-step starts from."""

    theta: Parameters
    tasks: Tasks


def given(config: Config, device: torch.device) -> Given:
    """A new network, and tasks of noise: neither speed nor memory depends on what the images show.

    Args:
        config: ways, shots, tasks and seed.
        device: where.

    Returns:
        Both.
    """
    generator = generator_for(config.seed, "noise")
    network = initialize(config.ways, 1, SIDE, generator)
    count, ways = config.tasks, torch.arange(config.ways)
    labels = [ways.repeat_interleave(number).repeat(count, 1).to(device) for number in (config.shots, config.queries)]
    images = [torch.rand(*label.shape, 1, SIDE, SIDE, generator=generator).to(device) for label in labels]
    theta = {name: value.to(device).requires_grad_() for name, value in network.items()}
    return Given(theta, Tasks(images[0], labels[0], images[1], labels[1]))


def meta_gradient(start: Given, config: Config) -> None:
    """Compute the meta-gradient into the meta-parameters.

    Args:
        start: what from.
        config: the algorithm.
    """
    meta_loss(config)(start.theta, start.tasks).loss.backward()


def inner_gradient(start: Given) -> None:
    """Compute one gradient of the support loss of every task: the unit that the paper counts memory in.

    Args:
        start: what from.
    """
    phi = {name: value.detach().expand(len(start.tasks[0]), *value.shape) for name, value in start.theta.items()}
    torch.vmap(torch.func.grad(lambda p, x, y: F.cross_entropy(forward(p, x), y)))(phi, *start.tasks[:2])


def main(
    config: Annotated[Path, typer.Argument(help="settings of the meta-step, as saved by a run")],
    gradient: Annotated[bool, typer.Option("--gradient", help="one inner gradient in its place")] = False,
) -> None:
    """Print the memory before and at the peak, in bytes, as JSON."""
    settings = Config.load(config)
    device = use(settings)
    start = given(settings, device)
    # Loads what the library loads at its first call, so that it is not counted as memory of the step.
    x = torch.ones(1, device=device, requires_grad=True)
    il.argmin(lambda z: (z - x).square().sum(), torch.zeros(1, device=device)).value.sum().backward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else _peak(anew=True)
    if gradient:
        inner_gradient(start)
    else:
        meta_gradient(start, settings)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak()
    typer.echo(json.dumps(Memory(before, peak)._asdict()))


def _peak(*, anew: bool = False) -> int:
    """Largest resident memory so far; with `anew` it is counted from now on, where the system can."""
    if sys.platform == "win32":
        raise OSError("Windows does not tell the peak memory of a process this way; run it on Linux or macOS.")
    if sys.platform != "linux":
        # macOS counts in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if anew:
        # What imports freed would be used again by the step, and not be seen to grow.
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        # A container may forbid it: then imports may have left a peak that hides a smaller step.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(peak) * 1024


if __name__ == "__main__":
    typer.run(main)
