"""How wrong is a meta-gradient, and does its certificate know?

The exact meta-gradient of iMAML is lam A⁻¹ v at the exact solution phi* of the inner problem, with A the Hessian there
and v the gradient of the query loss. A computed one has two errors: phi is not phi*, which moves A and v, and the linear
system is not solved. `il.AdjointReport.error_estimate` is about the solution of that system for the v at hand, with A
at phi* (where `gradient_tol` has it measured): what moving phi does to v is not part of it, and is drawn apart.

The inner problem must have a solution for this. The network of the Omniglot experiments has rectified units, and the
minimum lies where some of them are at their kink: the gradient does not go to zero there, however many steps are made.
So inner steps are swept with a small network of smooth units, and with the network of the experiments CG steps alone,
at the point where its inner solver ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from applications.imaml.train import CONFIG

__all__ = ["AccuracySettings", "Certified", "ExperimentNetwork", "SmoothProblem", "accuracy_of_gradients", "relative_error"]

_POOL, _HIDDEN = 4, 16
# Inner steps after which Newton's method is close enough to find the same minimum.
_LONG = 2000
# Enough to reach rounding: what the rest is measured against.
_SOLVED = il.CG(rtol=1e-12, max_steps=2000)


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

    tasks: int = 8
    lam: float = 0.1
    lr: float = 0.5
    most_inner_steps: int = 512
    most_cg_steps: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "most_inner_steps", "most_cg_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass an integer of at least 1.")
        for name in ("lam", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass a number above 0.")


class Certified(NamedTuple):
    """A meta-gradient of every task ``[tasks, n]``, and the certificate's estimate ``[tasks]`` of its relative error."""

    gradient: Tensor
    estimate: Tensor


class SmoothProblem:
    """A network of one layer of tanh units on images pooled to 7x7, so small that its inner problem can be solved.

    Args:
        tasks: float64.
        lam: strength of the pull.
        lr: step size of gradient descent on the inner problem.
        generator: draws the network.
    """

    def __init__(self, tasks: Tasks, lam: float, lr: float, generator: torch.Generator) -> None:
        self._tasks, self._lam, self._lr = tasks, lam, lr
        inputs = _pixels(tasks.support_images[0]).shape[1]
        shapes = {"hidden": (inputs, _HIDDEN), "linear": (_HIDDEN, int(tasks.query_labels.max()) + 1)}
        network = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0])
            for name, shape in shapes.items()
        }
        # Each task has its own copy, so that the derivatives come apart.
        self._theta = {name: value.expand(len(tasks.query_labels), *value.shape) for name, value in network.items()}
        self._solution = self._solve()

    def certified(self, steps: int, cg_steps: int | None) -> Certified:
        """The meta-gradient after gradient steps from theta.

        Args:
            steps: how many.
            cg_steps: for the linear system; None to solve it.

        Returns:
            With its estimate.
        """
        linear = _SOLVED if cg_steps is None else il.CG(rtol=None, atol=None, max_steps=cg_steps)
        adjoint = il.Implicit(linear, on_failure="ignore", gradient_tol=math.inf)
        gradient, report = self._meta_gradient(self._descended(steps), adjoint)
        assert report.error_estimate is not None
        return Certified(gradient, report.error_estimate)

    def through_path(self, steps: int) -> Tensor:
        """The meta-gradient of MAML with the same inner problem, ``[tasks, n]``."""
        theta = self._leaves()
        phi = torch.vmap(lambda theta, task: self._inner(theta, task, theta, self._descent(steps), il.Unrolled()).value)
        return _rows(torch.autograd.grad(self._query_losses(phi(theta, self._tasks)).sum(), list(theta.values())))

    def exact(self) -> Tensor:
        """The exact meta-gradient, ``[tasks, n]``."""
        return self._meta_gradient(self._solution, il.Implicit(_SOLVED))[0]

    def exact_adjoint(self, steps: int) -> Tensor:
        """As `exact`, but with the query loss's gradient after that many steps from theta: what is certified."""
        phi = {name: value.requires_grad_() for name, value in self._descended(steps).items()}
        v = torch.autograd.grad(self._query_losses(phi).sum(), list(phi.values()))
        theta = self._leaves()
        solution = self._at(theta, self._solution, il.Implicit(_SOLVED)).value
        return _rows(torch.autograd.grad(list(solution.values()), list(theta.values()), v))

    def residual(self) -> float:
        """Norm of the inner problem's gradient at what counts as its solution, the largest of all tasks."""
        return self._at(self._theta, self._solution, il.Implicit()).stats.residual.max().item()

    def _meta_gradient(self, phi: Parameters, adjoint: il.Implicit) -> tuple[Tensor, il.AdjointReport]:
        theta = self._leaves()
        solution = self._at(theta, phi, adjoint)
        gradient = torch.autograd.grad(self._query_losses(solution.value).sum(), list(theta.values()))
        return _rows(gradient), solution.adjoint

    def _at(self, theta: Parameters, phi: Parameters, adjoint: il.Adjoint) -> il.Solution:
        """What is differentiated as if phi solved the inner problem."""

        def inner(theta: Parameters, phi: Parameters, task: Tasks) -> il.Solution:
            return replace(self._inner(theta, task, phi, il.Given(phi, rtol=None, atol=None), adjoint), aux=())

        return torch.vmap(inner)(theta, phi, self._tasks)

    def _inner(
        self, theta: Parameters, task: Tasks, start: Parameters, solver: il.Solver[Any], adjoint: il.Adjoint
    ) -> il.Solution:
        return il.argmin(
            _cross_entropy,
            start,
            task.support_images,
            task.support_labels,
            regularizer=il.Proximal(theta, self._lam),
            solver=solver,
            adjoint=adjoint,
            on_failure="ignore",
        )

    def _descent(self, steps: int) -> il.GradientDescent:
        return il.GradientDescent(lr=self._lr, rtol=None, atol=None, max_steps=steps)

    def _descended(self, steps: int) -> Parameters:
        return self._solved_from(self._theta, self._descent(steps))

    def _solve(self) -> Parameters:
        """By gradient descent first, so that it is the minimum which all steps lead to."""
        newton = il.Newton(linear_solver=_SOLVED, rtol=0.0, atol=1e-13, max_steps=50)
        return self._solved_from(self._descended(_LONG), newton)

    def _solved_from(self, start: Parameters, solver: il.Solver[Any]) -> Parameters:
        def solve(theta: Parameters, start: Parameters, task: Tasks) -> Parameters:
            return self._inner(theta, task, start, solver, il.Implicit()).value

        with torch.no_grad():
            return torch.vmap(solve)(self._theta, start, self._tasks)

    def _query_losses(self, phi: Parameters) -> Tensor:
        return torch.vmap(_cross_entropy)(phi, self._tasks.query_images, self._tasks.query_labels)

    def _leaves(self) -> Parameters:
        return {name: value.clone().requires_grad_() for name, value in self._theta.items()}


def _pixels(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, _POOL).flatten(1)


def _cross_entropy(phi: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((_pixels(images) @ phi["hidden"]).tanh() @ phi["linear"], labels)


def _rows(gradient: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in gradient], dim=1)


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
        self._theta = {name: value.double().expand(len(tasks.query_labels), *value.shape) for name, value in theta.items()}

    def certified(self, cg_steps: int | None, curvature: Literal["hessian", "gauss_newton"]) -> Certified:
        """The meta-gradient.

        Args:
            cg_steps: for the linear system; None to solve it.
            curvature: its matrix.

        Returns:
            With its estimate.
        """
        linear = _SOLVED if cg_steps is None else il.CG(rtol=None, atol=None, max_steps=cg_steps)
        adjoint = il.Implicit(linear, curvature=curvature, on_failure="ignore")

        def judge(theta: Parameters, task: Tasks) -> tuple[Tensor, il.Solution]:
            solution = adapt(theta, task, self._config, adjoint)
            logits = query_logits(solution.value, task, self._config.batch_norm)
            return F.cross_entropy(logits, task.query_labels), replace(solution, value=(), aux=())

        theta = {name: value.clone().requires_grad_() for name, value in self._theta.items()}
        losses, solution = torch.vmap(judge)(theta, self._tasks)
        gradient = torch.autograd.grad(losses.sum(), list(theta.values()), allow_unused=True, materialize_grads=True)
        assert solution.adjoint.error_estimate is not None
        return Certified(_rows(gradient), solution.adjoint.error_estimate)


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
        f"Accuracy of meta-gradients and its certificate: 5-way 1-shot, λ = {settings.lam:g}, float64",
        f"line: median of {settings.tasks} tasks; band: smallest to largest",
        asdict(settings) | {"run": None if run is None else str(run)},
        panels,
        [
            f"the smooth inner problem is solved to a gradient of {smooth.residual():.1g}",
            *(_finding(panel) for panel in panels),
            f"with the Hessian in the place of Gauss-Newton, CG met negative curvature in {broken} of "
            f"{settings.tasks} tasks of {name}, and the certificate said so: its estimate is infinite there",
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
        Series.of("of it by the linear system", IMAML_SOME, steps, torch.stack(adjoint)),
        Series.of(f"{_ESTIMATED} of that", ESTIMATE, steps, torch.stack([c.estimate for c in found])),
    ]
    return Panel("smooth network, against inner steps", "inner gradient steps", _ERROR, series)


def _against_cg_steps(smooth: SmoothProblem, settings: AccuracySettings) -> Panel:
    exact = smooth.exact()
    found = {cg: smooth.certified(_LONG, cg) for cg in _powers(settings.most_cg_steps)}
    return _certified_panel("smooth network, inner problem solved", found, exact)


def _of_the_network(network: ExperimentNetwork, name: str, settings: AccuracySettings) -> Panel:
    exact = network.certified(None, "gauss_newton").gradient
    found = {cg: network.certified(cg, "gauss_newton") for cg in _powers(settings.most_cg_steps)}
    return _certified_panel(f"{name} of the experiments, Gauss-Newton", found, exact)


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
