"""Meta-gradients of linear regression, where the exact one has a closed form (section 5 of the paper, figure 2a).

A task has the support loss |X w - y|²/(2m). With G = XᵀX/m, b = Xᵀy/m and A = G + lam,

    w*(theta) = A⁻¹(b + lam theta),   D = dw*/dtheta = lam A⁻¹,

and the meta-loss F(theta), the mean over tasks of |X' w* - y'|²/(2m') on query data, is a quadratic in theta: its
gradient, its curvature and its minimum are found by dense linear algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml.config import ConfigError
from applications.imaml.episodes import generator_for
from applications.imaml.paper.chart import (
    EXACT,
    FIRST_ORDER,
    IMAML,
    IMAML_FEW,
    IMAML_SOME,
    MAML,
    Chart,
    Panel,
    Series,
    Style,
)

__all__ = ["Exact", "RegressionSettings", "RegressionTasks", "Way", "draw_tasks", "meta_gradient", "regression"]

Algorithm = Literal["imaml", "maml", "fomaml"]


class RegressionTasks(NamedTuple):
    """Tasks: ``X`` and ``Xq`` ``[tasks, samples, features]``, ``y`` and ``yq`` ``[tasks, samples]``, float64."""

    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor


@dataclass(frozen=True)
class RegressionSettings:
    """The experiment.

    Args:
        features: unknowns of a task.
        samples: support samples of a task, and query samples.
        tasks: of a problem.
        condition: of the covariance of the features, whose eigenvalues are spread evenly on a logarithmic scale from 1
            down.
        noise: standard deviation of the targets around the line; the tasks' own coefficients vary by 1.
        lam: strength of the pull.
        most_inner_steps: the sweep goes by powers of two from 1 to there.
        train_inner_steps: inner steps of meta-training.
        meta_steps: of meta-training.
        repeats: problems, each drawn anew.
        seed: chooses them.

    Raises:
        ConfigError: if a number cannot be.
    """

    features: int = 50
    samples: int = 25
    tasks: int = 10
    condition: float = 100.0
    noise: float = 0.5
    lam: float = 0.1
    most_inner_steps: int = 512
    train_inner_steps: int = 16
    meta_steps: int = 100
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "tasks", "most_inner_steps", "train_inner_steps", "meta_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be; pass an integer of at least 1.")
        if self.features < 2 or not self.condition >= 1 or not self.lam > 0 or not self.noise >= 0:
            raise ConfigError(
                f"features={self.features}, condition={self.condition:g}, lam={self.lam:g} and noise={self.noise:g} "
                f"cannot be together; pass features of at least 2, condition of at least 1, lam above 0 and noise not "
                f"negative."
            )
        if self.tasks * self.samples < self.features:
            raise ConfigError(
                f"tasks={self.tasks} of samples={self.samples} leave the best of features={self.features} "
                f"meta-parameters open; pass a product of at least as many."
            )


class Way(NamedTuple):
    """How a meta-gradient is computed: the algorithm, its gradient steps, and the CG steps of iMAML."""

    algorithm: Algorithm
    inner_steps: int
    cg_steps: int = 1


def draw_tasks(settings: RegressionSettings, generator: torch.Generator) -> RegressionTasks:
    """Draw one problem.

    Args:
        settings: its sizes.
        generator: source of randomness.

    Returns:
        Its tasks: coefficients around a common centre, and noisy targets.
    """
    n, m, count = settings.features, settings.samples, settings.tasks
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    scales = torch.logspace(0, -math.log10(settings.condition) / 2, n, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(n, n, **draw))[0]
    coefficients = torch.randn(n, **draw) + torch.randn(count, n, 1, **draw)[..., 0]

    def samples() -> tuple[Tensor, Tensor]:
        X = torch.randn(count, m, n, **draw) * scales @ rotation
        clean = torch.einsum("tmn,tn->tm", X, coefficients)
        return X, clean + settings.noise * torch.randn(count, m, **draw)

    return RegressionTasks(*samples(), *samples())


class Exact:
    """What has a closed form.

    Args:
        tasks: the problem.
        lam: strength of the pull.
    """

    def __init__(self, tasks: RegressionTasks, lam: float) -> None:
        X, y, Xq, yq = tasks
        count, m, n = X.shape
        G, b = X.mT @ X / m, torch.einsum("tmn,tm->tn", X, y) / m
        self._A = G + lam * torch.eye(n, dtype=X.dtype)
        inverse = torch.linalg.inv(self._A)
        # X' w* - y' = J theta - r
        J = lam * Xq @ inverse
        r = yq - torch.einsum("tmn,tn->tm", Xq @ inverse, b)
        scale = count * Xq.shape[1]
        self._curvature = torch.einsum("tmi,tmj->ij", J, J) / scale
        self._slope = torch.einsum("tmi,tm->i", J, r) / scale
        self._constant = r.square().sum() / scale / 2
        self.minimum = torch.linalg.solve(self._curvature, self._slope)

    def meta_loss(self, theta: Tensor) -> Tensor:
        """F(theta), 0-d; theta is ``[features]``."""
        return theta @ (self._curvature @ theta) / 2 - self._slope @ theta + self._constant

    def meta_gradient(self, theta: Tensor) -> Tensor:
        """Its gradient, ``[features]``."""
        return self._curvature @ theta - self._slope

    @property
    def meta_lr(self) -> float:
        """1/L, with L the largest curvature of F: with it the loss falls in every step of gradient descent."""
        return 1 / torch.linalg.eigvalsh(self._curvature)[-1].item()

    @property
    def inner_lr(self) -> float:
        """1/L, with L the largest curvature of any task's inner problem."""
        return 1 / torch.linalg.eigvalsh(self._A)[:, -1].max().item()


def meta_gradient(theta: Tensor, tasks: RegressionTasks, lam: float, lr: float, way: Way) -> Tensor:
    """The meta-gradient as an algorithm computes it.

    Args:
        theta: ``[features]``.
        tasks: the problem.
        lam: strength of the pull.
        lr: step size of the inner gradient descent, which starts at theta.
        way: how.

    Returns:
        ``[features]``.
    """
    theta = theta.detach().requires_grad_()
    linear_solver = il.CG(rtol=None, atol=None, max_steps=way.cg_steps)
    implicit = way.algorithm != "maml"
    adjoint = il.Implicit(linear_solver, on_failure="ignore") if implicit else il.Unrolled()
    solver = il.GradientDescent(lr=lr, rtol=None, atol=None, max_steps=way.inner_steps)

    def query_loss(X: Tensor, y: Tensor, Xq: Tensor, yq: Tensor) -> Tensor:
        anchor = theta.detach() if way.algorithm == "fomaml" else theta
        pull = il.Proximal(anchor, lam)
        w = il.argmin(_loss, anchor, X, y, regularizer=pull, solver=solver, adjoint=adjoint, on_failure="ignore").value
        return _loss(theta + (w - theta).detach() if way.algorithm == "fomaml" else w, Xq, yq)

    (gradient,) = torch.autograd.grad(torch.vmap(query_loss)(*tasks).mean(), theta)
    return gradient


def _loss(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return (X @ w - y).square().mean() / 2


def regression(settings: RegressionSettings) -> Chart:
    """Errors of meta-gradients against inner steps and CG steps, and what they do to meta-training.

    Args:
        settings: of the experiment.

    Returns:
        The figure.
    """
    problems = list(_problems(settings))
    panels = (
        _against_inner_steps(settings, problems),
        _against_cg_steps(settings, problems),
        _trained(settings, problems),
    )
    return Chart(
        "regression",
        f"Linear regression with an exact meta-gradient: {settings.features} features, {settings.samples} samples a "
        f"task, {settings.tasks} tasks, λ = {settings.lam:g}",
        f"line: median of {settings.repeats} problems; band: smallest to largest",
        asdict(settings),
        panels,
        _findings(settings, panels),
    )


class _Problem(NamedTuple):
    tasks: RegressionTasks
    exact: Exact

    def error(self, lam: float, way: Way) -> Tensor:
        """Relative error of the meta-gradient at the origin, where training starts."""
        theta = torch.zeros_like(self.exact.minimum)
        true = self.exact.meta_gradient(theta)
        return (meta_gradient(theta, self.tasks, lam, self.exact.inner_lr, way) - true).norm() / true.norm()


def _problems(settings: RegressionSettings) -> Iterator[_Problem]:
    generator = generator_for(settings.seed, "regression tasks")
    for _ in range(settings.repeats):
        tasks = draw_tasks(settings, generator)
        yield _Problem(tasks, Exact(tasks, settings.lam))


def _errors(settings: RegressionSettings, problems: list[_Problem], ways: list[Way]) -> Tensor:
    return torch.stack([torch.stack([problem.error(settings.lam, way) for problem in problems]) for way in ways])


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


# More than the CG steps that a problem of this size needs.
_PLENTY = 60
_CG: tuple[tuple[int, str, Style], ...] = (
    (2, "iMAML, 2 CG steps", IMAML_FEW),
    (5, "iMAML, 5 CG steps", IMAML_SOME),
    (_PLENTY, f"iMAML, {_PLENTY} CG steps", IMAML),
)
_ERROR = "relative error of the meta-gradient"


def _against_inner_steps(settings: RegressionSettings, problems: list[_Problem]) -> Panel:
    steps = _powers(settings.most_inner_steps)
    curves: list[tuple[str, Style, Callable[[int], Way]]] = [
        *((label, style, lambda k, cg=cg: Way("imaml", k, cg)) for cg, label, style in _CG),
        ("MAML, through the path", MAML, lambda k: Way("maml", k)),
        ("first-order", FIRST_ORDER, lambda k: Way("fomaml", k)),
    ]
    series = [
        Series.of(label, style, steps, _errors(settings, problems, [way(k) for k in steps]))
        for label, style, way in curves
    ]
    return Panel("against inner steps", "inner gradient steps", _ERROR, series)


def _against_cg_steps(settings: RegressionSettings, problems: list[_Problem]) -> Panel:
    steps = _powers(settings.features)
    most = settings.most_inner_steps
    levels = [(max(1, most // 32), IMAML_FEW), (max(1, most // 8), IMAML_SOME), (most, IMAML)]
    series = [
        Series.of(
            f"iMAML, {inner} inner steps",
            style,
            steps,
            _errors(settings, problems, [Way("imaml", inner, cg) for cg in steps]),
        )
        for inner, style in levels
    ]
    return Panel("against CG steps", "conjugate gradient steps", _ERROR, series)


def _trained(settings: RegressionSettings, problems: list[_Problem]) -> Panel:
    k = settings.train_inner_steps
    curves: list[tuple[str, Style, Way | None]] = [
        ("exact meta-gradient", EXACT, None),
        ("iMAML, 2 CG steps", IMAML_FEW, Way("imaml", k, 2)),
        ("iMAML, 5 CG steps", IMAML_SOME, Way("imaml", k, 5)),
        ("MAML, through the path", MAML, Way("maml", k)),
        ("first-order", FIRST_ORDER, Way("fomaml", k)),
    ]
    series = [
        Series.of(
            label,
            style,
            range(settings.meta_steps + 1),
            torch.stack([_descend(settings, problem, way) for problem in problems], dim=1),
        )
        for label, style, way in curves
    ]
    title = f"meta-training, {k} inner steps"
    return Panel(title, "meta-step (gradient descent)", "meta-loss above its minimum", series, log_x=False)


def _descend(settings: RegressionSettings, problem: _Problem, way: Way | None) -> Tensor:
    """The exact meta-loss above its minimum, ``[meta_steps + 1]``, along gradient descent from the origin."""
    tasks, exact = problem
    theta, least = torch.zeros_like(exact.minimum), exact.meta_loss(exact.minimum)
    losses = []
    for step in range(settings.meta_steps + 1):
        losses.append(exact.meta_loss(theta) - least)
        if step < settings.meta_steps:
            gradient = (
                exact.meta_gradient(theta)
                if way is None
                else meta_gradient(theta, tasks, settings.lam, exact.inner_lr, way)
            )
            theta = theta - exact.meta_lr * gradient
    return torch.stack(losses)


def _findings(settings: RegressionSettings, panels: tuple[Panel, ...]) -> list[str]:
    inner, conjugate, training = panels
    last = {series.label: series.median[-1] for series in inner.series}
    told = ", ".join(f"{label} {error:.2g}" for label, error in last.items())
    most = conjugate.series[-1]
    few = ", ".join(f"{x:g}: {error:.2g}" for x, error in zip(most.x, most.median, strict=True))
    end = ", ".join(f"{series.label} {series.median[-1]:.2g}" for series in training.series)
    return [
        f"relative error of the meta-gradient after {settings.most_inner_steps} inner steps, median: {told}",
        f"{most.label}, by CG steps: {few}",
        f"meta-loss above its minimum after {settings.meta_steps} meta-steps, from "
        f"{training.series[0].median[0]:.2g}: {end}",
    ]
