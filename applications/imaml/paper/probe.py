"""The memory of one meta-step, in a process of its own that prints it: ``python -m applications.imaml.paper.probe``.

On a CPU memory is the peak of the process, which never falls again: hence one process for every measurement.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
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
from applications.imaml.run_folder import RunError

if sys.platform != "win32":
    import resource


__all__ = ["Given", "Memory", "given", "inner_gradient", "memory_of", "meta_gradient"]

SIDE = 28
_ROOT = Path(__file__).parents[3]


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


def memory_of(config: Config, *, gradient: bool = False) -> Memory:
    """Measure the memory of a meta-step in a fresh process.

    Args:
        config: settings of the meta-step.
        gradient: one inner gradient in its place.

    Returns:
        Resident memory of the process, or on a GPU that of the allocator.

    Raises:
        RunError: if the process fails, for instance for lack of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        config.save(path)
        command = [sys.executable, "-m", "applications.imaml.paper.probe", str(path)]
        # The same code as here, wherever the user stands.
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [*command, "--gradient"] if gradient else command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": paths},
        )
    if done.returncode:
        raise RunError(
            f"measuring {config.algorithm} with {config.inner_steps} steps failed (exit status {done.returncode}): "
            f"{done.stderr.strip()[-500:]}; pass fewer steps, tasks, ways or shots if memory was short."
        )
    return Memory(**json.loads(done.stdout))


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
