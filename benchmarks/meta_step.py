"""How much faster is a batched meta-step than the same mathematics task by task in plain PyTorch?"""

from __future__ import annotations

import torch

from applications.imaml.algorithms import meta_loss
from applications.imaml.config import Config, CurvatureName
from applications.imaml.device import keep_freed_memory
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters
from applications.imaml.paper.probe import Given, given
from benchmarks.report import Report, median_seconds
from benchmarks.task_by_task import meta_gradient

TASKS, WAYS, INNER_STEPS, CG_STEPS = 16, 5, 16, 5
# Not the paper's λ = 2: there the curvature is indefinite, and the baseline's conjugate gradients stop early while a
# batch goes on for its other tasks. Strong enough here that every task takes all its steps on both sides.
LAM, LR = 10.0, 0.05


def run(device: str, repeats: int) -> Report:
    """Time both ways on random tasks, and compare their meta-gradients.

    Args:
        device: where to run.
        repeats: timed runs of each.
    """
    # As `train` does; the baseline's tensors are so small that it makes no difference to them.
    keep_freed_memory()
    theta, tasks = _given(TASKS, device)
    seconds = median_seconds(
        {
            "task by task": lambda: one_by_one(theta, tasks),
            "batched": lambda: batched(theta, tasks, "hessian"),
            "batched, Gauss-Newton": lambda: batched(theta, tasks, "gauss-newton"),
        },
        device,
        repeats,
    )
    # In double precision, where rounding cannot hide a difference.
    theta, tasks = _given(2, device)
    theta = {name: value.detach().double().requires_grad_() for name, value in theta.items()}
    tasks = Tasks(*(t.double() if t.is_floating_point() else t for t in tasks))
    difference = relative_difference(batched(theta, tasks, "hessian"), one_by_one(theta, tasks))
    base = seconds["task by task"]
    rows = [
        {"way": way, "ms a meta-step": 1e3 * s, "tasks/s": TASKS / s, "ratio": base / s} for way, s in seconds.items()
    ]
    need = "≥ 50" if device.startswith("cuda") else "≥ 2.5, goal 3"
    return Report(
        f"a meta-step: {TASKS} tasks, {WAYS}-way 1-shot, {INNER_STEPS} inner and {CG_STEPS} CG steps, λ = {LAM:g}",
        rows,
        f"batched is {base / seconds['batched']:.2f} times as fast ({need}); "
        f"the two meta-gradients differ by {difference:.1e} of their norm",
    )


def batched(theta: Parameters, tasks: Tasks, curvature: CurvatureName) -> dict[str, torch.Tensor]:
    """The meta-gradient by the application: all tasks at once."""
    config = Config(lam=LAM, inner_lr=LR, inner_steps=INNER_STEPS, cg_steps=CG_STEPS, curvature=curvature)
    loss = meta_loss(config)(theta, tasks).loss
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def one_by_one(theta: Parameters, tasks: Tasks) -> dict[str, torch.Tensor]:
    """The meta-gradient by the baseline."""
    return meta_gradient(theta, tasks, LAM, LR, INNER_STEPS, CG_STEPS)


def _given(count: int, device: str) -> Given:
    return given(Config(ways=WAYS, tasks=count), torch.device(device))


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over all entries."""
    x, y = (torch.cat([value.flatten() for value in tree.values()]) for tree in (a, b))
    return float((x - y).norm() / y.norm())
