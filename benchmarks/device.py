"""What a device does with a meta-step: task by task, batched, as one graph; in every lowering and precision.

Made to be run once on each new device: its table says how to train there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch.nn import functional as F

from applications.datasets import ClassImages
from applications.imaml.algorithms import meta_loss
from applications.imaml.captured import CapturedStep, CudaGraph
from applications.imaml.config import Config, ConvolutionName, PrecisionName
from applications.imaml.device import use
from applications.imaml.episodes import Tasks, TaskSampler, generator_for
from applications.imaml.meta_step import MetaStep
from applications.imaml.network import Parameters, initialize
from applications.imaml.processes import Processes
from benchmarks.meta_step import LAM, LR, one_by_one
from benchmarks.report import Report, median_seconds

# A CPU does as much for a task whether there are 8 or 32, and the loop would take minutes.
TASKS = {"cuda": 32, "cpu": 8}
# The paper's numbers, and the loop's mathematics.
SAME = Config(ways=5, lam=LAM, inner_lr=LR, inner_steps=16, cg_steps=5, curvature="hessian", schedule="constant")
WHOLE_RUN = 20_000 * 32


class Way(NamedTuple):
    """How to take a meta-step."""

    way: str
    steps: str
    config: Config


def run(device: str, repeats: int) -> Report:
    """Time whole meta-steps, with sampling and Adam; of the loop the meta-gradient alone, which flatters it.

    Args:
        device: where to run.
        repeats: timed runs of each.
    """
    cuda = device.startswith("cuda")
    tasks = TASKS["cuda" if cuda else "cpu"]
    ways = list(_ways(replace(SAME, device=device, tasks=tasks), cuda=cuda))
    theta, sampler = _given(SAME, device)
    batch = sampler.sample(tasks)
    single = replace(SAME, device=device, precision="float32")
    loop = "task by task"
    candidates = {loop: _in(single, lambda: one_by_one(theta, batch))}
    candidates |= {str(way): _in(way.config, _step(way)) for way in ways}
    seconds = median_seconds(candidates, device, repeats)
    exact = _gradient(single, theta, batch)
    rows = [_row(loop, _steps(SAME), "PyTorch's", "float32", tasks / seconds[loop], 1.0, 1.0)]
    for way in ways:
        config = way.config
        # Of the loop's mathematics; the other has another meta-gradient.
        gradient = _gradient(replace(single, convolution=config.convolution, precision=config.precision), theta, batch)
        cosine = F.cosine_similarity(gradient, exact, dim=0).item()
        rate, ratio = tasks / seconds[str(way)], seconds[loop] / seconds[str(way)]
        rows.append(_row(way.way, way.steps, config.convolution, config.precision, rate, ratio, cosine))
    question = f"whole meta-steps of {tasks} tasks, 5-way 1-shot, by way, convolution and precision"
    return Report(question, rows, _verdict(rows, cuda))


def _ways(base: Config, *, cuda: bool) -> Iterator[Way]:
    precisions = [name for name in get_args(PrecisionName) if cuda or name != "tf32"]
    usual = replace(Config(schedule="constant"), device=base.device, tasks=base.tasks)
    for config in (base, usual):
        for convolution in get_args(ConvolutionName)[1:]:
            for precision in precisions:
                chosen = replace(config, convolution=convolution, precision=precision)
                for graph in (False, True) if cuda else (False,):
                    yield Way("graph" if graph else "batched", _steps(chosen), replace(chosen, graph=graph))


def _steps(config: Config) -> str:
    return f"{config.inner_steps} inner + {config.cg_steps} CG, {config.curvature}"


def _given(config: Config, device: str) -> tuple[Parameters, TaskSampler]:
    generator = torch.Generator().manual_seed(0)
    theta = {name: t.to(device).requires_grad_() for name, t in initialize(config.ways, 1, generator).items()}
    # Speed does not depend on what the images show.
    images = torch.randint(0, 256, (100, 4, 1, 28, 28), dtype=torch.uint8, generator=generator)
    dataset = ClassImages(images, tuple(map(str, range(100))), "noise").to(torch.device(device))
    draws = generator_for(0, "training tasks", device)
    return theta, TaskSampler(dataset, config.ways, config.shots, config.queries, draws)


def _step(way: Way) -> Callable[[], None]:
    config = way.config
    theta, sampler = _given(config, config.device)
    step = MetaStep(theta, sampler, config, Processes(), capturable=config.device.startswith("cuda"))
    return CapturedStep(step, CudaGraph(torch.device(config.device))) if config.graph else step


def _in(config: Config, function: Callable[[], Any]) -> Callable[[], Any]:
    """In the precision of the configuration, which is partly a setting of the process."""

    def run() -> None:
        use(config)
        function()

    return run


def _gradient(config: Config, theta: Parameters, batch: Tasks) -> torch.Tensor:
    use(config)
    gradient = torch.autograd.grad(meta_loss(config)(theta, batch).loss, list(theta.values()))
    return torch.cat([part.flatten() for part in gradient])


def _row(way: str, steps: str, convolution: str, precision: str, rate: float, ratio: float, cosine: float) -> dict:
    return {
        "way": way,
        "steps": steps,
        "convolution": convolution,
        "precision": precision,
        "tasks/s": rate,
        "ratio": ratio,
        "minutes for 20,000 x 32": WHOLE_RUN / rate / 60,
        "cosine": cosine,
    }


def _verdict(rows: list[dict[str, Any]], cuda: bool) -> str:
    same = max((row for row in rows if row["steps"] == _steps(SAME)), key=lambda row: row["ratio"])
    soonest = min(rows, key=lambda row: row["minutes for 20,000 x 32"])

    def named(row: dict[str, Any]) -> str:
        return f"{row['way']}, {row['convolution']}, {row['precision']}"

    return (
        f"with the loop's mathematics {same['ratio']:.2f} times as fast ({named(same)}; "
        f"{'≥ 50' if cuda else '≥ 2.5, goal 3'}); 20,000 meta-steps of 32 tasks in "
        f"{soonest['minutes for 20,000 x 32']:.1f} minutes ({named(soonest)}; {soonest['steps']}"
        f"{'; < 5' if cuda else ''}). cosine is with the float32 meta-gradient, of {_steps(SAME)}"
    )
