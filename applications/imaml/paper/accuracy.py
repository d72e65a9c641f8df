"""How wrong is a meta-gradient, and does its certificate know?

The exact meta-gradient of iMAML is lam A⁻¹ v at the exact solution phi* of the inner problem, with A the Hessian there
and v the gradient of the query loss. A computed one has two errors: phi is not phi*, which moves A and v, and the
linear system is not solved. `il.AdjointReport.error_estimate` is about the solution of that system for the v at hand,
with A at phi* (where `gradient_tol` has it measured): what moving phi does to v is not part of it, and is drawn apart.

The inner problem must have a solution for this. The network of the Omniglot experiments has rectified units, and the
minimum lies where some of them are at their kink: the gradient does not go to zero there, however many steps are made.
So inner steps are swept with a small network of smooth units, and with the network of the experiments CG steps alone,
at the point where its inner solver ends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.algorithms.strength import network_of
from applications.imaml.config import Config, ConfigError
from applications.imaml.episodes import Tasks, TaskSampler, generator_for, load_splits
from applications.imaml.evaluate import load_network
from applications.imaml.networks import Parameters, initialize
from applications.imaml.paper.chart import (
    ESTIMATE,
    IMAML,
    IMAML_FEW,
    IMAML_SOME,
    MAML,
    Chart,
    Panel,
    Series,
)
from applications.imaml.paper.smooth import SOLVED, Certified, SmoothProblem, rows
from applications.imaml.run_folder import CONFIG
from applications.imaml.words import counted

__all__ = ["AccuracySettings", "ExperimentNetwork", "accuracy_of_gradients", "relative_error"]


@dataclass(frozen=True)
class AccuracySettings:
    """The experiment: 5-way 1-shot tasks of glyphs, in float64.

    Args:
        tasks: how many, one repeat each.
        lam: strength of the pull on the smooth network.
        lr: step size of its inner gradient descent.
        most_inner_steps: the sweep goes by powers of two from 1 to there.
        most_cg_steps: likewise.
        seed: chooses tasks and networks.

    Raises:
        ConfigError: if a number cannot be.
    """

    tasks: int = 5
    lam: float = 0.3
    lr: float = 0.5
    most_inner_steps: int = 256
    most_cg_steps: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "most_inner_steps", "most_cg_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass an integer of at least 1.")
        for name in ("lam", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass a number above 0.")


def relative_error(computed: Tensor, true: Tensor) -> Tensor:
    """Of every task, relative to the computed one as the certificate's, ``[tasks]``."""
    return (computed - true).norm(dim=1) / computed.norm(dim=1)


class ExperimentNetwork:
    """The network of the experiments, where its inner solver ends.

    Args:
        tasks: float64.
        theta: meta-parameters.
        config: of the inner problem.
    """

    def __init__(self, tasks: Tasks, theta: Parameters, config: Config) -> None:
        self._tasks, self._config = tasks, config
        self.lam = config.lam
        self._theta = {
            name: value.double().expand(len(tasks.query_labels), *value.shape) for name, value in theta.items()
        }

    def certified(self, cg_steps: int | None, curvature: Literal["hessian", "gauss_newton"]) -> Certified:
        """The meta-gradient.

        Args:
            cg_steps: for the linear system; None to solve it.
            curvature: its matrix.

        Returns:
            With its estimate.
        """
        linear = SOLVED if cg_steps is None else il.CG(rtol=None, atol=None, max_steps=cg_steps)
        adjoint = il.Implicit(linear, curvature=curvature, on_failure="ignore")

        def judge(theta: Parameters, task: Tasks) -> tuple[Tensor, il.Solution]:
            solution = adapt(theta, task, self._config, adjoint)
            logits = query_logits(solution.value, task, self._config.batch_norm)
            return F.cross_entropy(logits, task.query_labels), replace(solution, value=(), aux=())

        theta = {name: value.clone().requires_grad_() for name, value in self._theta.items()}
        losses, solution = torch.vmap(judge)(theta, self._tasks)
        gradient = torch.autograd.grad(losses.sum(), list(theta.values()), allow_unused=True, materialize_grads=True)
        assert solution.adjoint.error_estimate is not None
        return Certified(rows(gradient), solution.adjoint.error_estimate)


def accuracy_of_gradients(settings: AccuracySettings, run: Path | None = None) -> Chart:
    """True errors of meta-gradients beside the certificate's estimates.

    Args:
        settings: of the experiment.
        run: folder of a run whose trained network, data and inner problem the last panel is about; a new network on
            glyphs with the default settings without.

    Returns:
        The figure.

    Raises:
        ConfigError: if there is no such run.
        CheckpointError: if it has no checkpoint.
    """
    network, name = _experiment(settings, run)
    smooth = SmoothProblem(
        _tasks(Config(), settings), settings.lam, settings.lr, generator_for(settings.seed, "smooth network")
    )
    panels = [_against_inner_steps(smooth, settings), _against_cg_steps(smooth, settings)]
    panels.append(_of_the_network(network, name, settings))
    broken = network.certified(settings.most_cg_steps, "hessian").estimate.isinf().sum().item()
    return Chart(
        "accuracy",
        "Accuracy of meta-gradients and its certificate: 5-way 1-shot, float64",
        f"line: median of {counted(settings.tasks, 'task')}; band: smallest to largest",
        asdict(settings) | {"run": None if run is None else str(run)},
        panels,
        [
            f"the smooth inner problem is solved to a gradient of {smooth.residual():.1g}",
            *(_finding(panel) for panel in panels),
            f"with the Hessian in the place of Gauss-Newton, CG met negative curvature in {broken} of "
            f"{counted(settings.tasks, 'task')} of {name}; its estimate is infinite there",
        ],
    )


def _experiment(settings: AccuracySettings, run: Path | None) -> tuple[ExperimentNetwork, str]:
    if run is None:
        config, name = Config(), "a new network"
        theta = initialize(config.ways, 1, 28, generator_for(settings.seed, "initialisation"))
    else:
        config, name = Config.load(run / CONFIG), "the trained network"
        theta = network_of(load_network(run, torch.device("cpu")).theta)
    return ExperimentNetwork(_tasks(config, settings), theta, replace(config, learn_lam="none")), name


def _tasks(config: Config, settings: AccuracySettings) -> Tasks:
    dataset = load_splits(config, torch.device("cpu"))["train"]
    generator = generator_for(settings.seed, "tasks of the figure")
    tasks = TaskSampler(dataset, config.ways, config.shots, config.queries, generator).sample(settings.tasks)
    return Tasks(*(part.double() if part.is_floating_point() else part for part in tasks))


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


_TRUE, _ESTIMATED = "true error", "certificate's estimate"
_ERROR = "relative error"


def _against_inner_steps(smooth: SmoothProblem, settings: AccuracySettings) -> Panel:
    steps, exact = _powers(settings.most_inner_steps), smooth.exact()
    found = [smooth.certified(k, None) for k in steps]
    few = [relative_error(smooth.certified(k, 2).gradient, exact) for k in steps]
    adjoint = [relative_error(c.gradient, smooth.exact_adjoint(k)) for k, c in zip(steps, found, strict=True)]
    path = [relative_error(smooth.through_path(k), exact) for k in steps]
    whole = [relative_error(c.gradient, exact) for c in found]
    series = [
        Series.of("iMAML, 2 CG steps", IMAML_FEW, steps, torch.stack(few)),
        Series.of("MAML, through the path", MAML, steps, torch.stack(path)),
        Series.of("iMAML, system solved", IMAML, steps, torch.stack(whole)),
        Series.of("the part that is certified", IMAML_SOME, steps, torch.stack(adjoint)),
        Series.of(f"{_ESTIMATED} of that part", ESTIMATE, steps, torch.stack([c.estimate for c in found])),
    ]
    return Panel(f"smooth network, λ = {settings.lam:g}: inner steps", "inner gradient steps", _ERROR, series)


def _against_cg_steps(smooth: SmoothProblem, settings: AccuracySettings) -> Panel:
    exact = smooth.exact()
    found = {cg: smooth.certified(None, cg) for cg in _powers(settings.most_cg_steps)}
    return _certified_panel("the same, inner problem solved", found, exact)


def _of_the_network(network: ExperimentNetwork, name: str, settings: AccuracySettings) -> Panel:
    exact = network.certified(None, "gauss_newton").gradient
    found = {cg: network.certified(cg, "gauss_newton") for cg in _powers(settings.most_cg_steps)}
    return _certified_panel(f"{name} of the experiments, λ = {network.lam:g}", found, exact)


def _certified_panel(title: str, found: dict[int, Certified], exact: Tensor) -> Panel:
    steps = list(found)
    true = torch.stack([relative_error(c.gradient, exact) for c in found.values()])
    estimated = torch.stack([c.estimate for c in found.values()])
    series = [Series.of(_TRUE, IMAML, steps, true), Series.of(_ESTIMATED, ESTIMATE, steps, estimated)]
    return Panel(title, "conjugate gradient steps", _ERROR, series)


def _finding(panel: Panel) -> str:
    told = (f"{series.label} {_told(series)}" for series in panel.series)
    return f"{panel.title}, median at {panel.series[0].x}: " + "; ".join(told)


def _told(series: Series) -> str:
    return ", ".join(f"{value:.2g}" for value in series.median)
