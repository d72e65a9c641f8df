"""One meta-step in a process of its own, which prints the memory it took: ``python -m benchmarks.memory_probe ...``."""

from __future__ import annotations

import json
import resource
import sys
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.episodes import Tasks
from applications.imaml.network import Parameters, forward, initialize
from benchmarks.meta_step import random_tasks

Way = Literal["gradient", "imaml", "fomaml", "maml"]
WAYS, SHOTS, LAM, LR, CG_STEPS = 20, 5, 2.0, 0.1, 5


def meta_step(way: Way, steps: int, tasks: Tasks, theta: Parameters) -> None:
    """One meta-gradient, or with "gradient" one gradient of the support loss of every task."""

    def support_loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    objective = il.Composite(lambda phi, images, labels: forward(phi, images), support_loss)
    fixed = il.CG(rtol=None, atol=None, max_steps=CG_STEPS)
    adjoint = il.Unrolled() if way == "maml" else il.Implicit(fixed, curvature="gauss_newton", on_failure="ignore")

    def query_loss(task: Tasks) -> Tensor:
        phi = il.argmin(
            objective,
            theta,
            task.support_images,
            task.support_labels,
            regularizer=il.Proximal(theta, LAM),
            solver=il.GradientDescent(lr=LR, rtol=None, atol=None, max_steps=steps),
            adjoint=adjoint,
        ).value
        if way == "fomaml":
            phi = {name: value + (phi[name] - value).detach() for name, value in theta.items()}
        return F.cross_entropy(forward(phi, task.query_images), task.query_labels)

    if way == "gradient":
        phi = {name: value.detach().expand(len(tasks[0]), *value.shape) for name, value in theta.items()}
        torch.vmap(torch.func.grad(lambda p, x, y: F.cross_entropy(forward(p, x), y)))(phi, *tasks[:2])
    else:
        torch.vmap(query_loss)(tasks).mean().backward()


def main(
    way: Annotated[str, typer.Option()], steps: Annotated[int, typer.Option()], tasks: int = 2, device: str = "cpu"
) -> None:
    """Print peak and starting memory in bytes, as JSON."""
    generator = torch.Generator().manual_seed(0)
    theta = {name: value.to(device).requires_grad_() for name, value in initialize(WAYS, 1, generator).items()}
    batch = random_tasks(tasks, WAYS, generator, device, SHOTS)
    # Loads what the library loads at its first call, so that it is not counted as memory of the step.
    x = torch.ones(1, device=device, requires_grad=True)
    il.argmin(lambda z: (z - x).square().sum(), torch.zeros(1, device=device)).value.sum().backward()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _peak_rss()
    meta_step(way, steps, batch, theta)  # type: ignore[arg-type]
    after = torch.cuda.max_memory_allocated() if cuda else _peak_rss()
    typer.echo(json.dumps({"before": before, "peak": after}))


def _peak_rss() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    typer.run(main)
