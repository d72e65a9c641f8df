"""Errors of meta-gradients of linear regression, and what they do to meta-training (figure 2a of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

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
from applications.imaml.paper.linear import Exact, RegressionSettings, RegressionTasks, Way, draw_tasks, meta_gradient
from applications.imaml.words import counted

__all__ = ["regression"]


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
        f"task, {counted(settings.tasks, 'task')}, λ = {settings.lam:g}",
        f"line: median of {counted(settings.repeats, 'problem')}; band: smallest to largest",
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
            f"iMAML, {counted(inner, 'inner step')}",
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
    title = f"meta-training, {counted(k, 'inner step')}"
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
        f"relative error of the meta-gradient after {counted(settings.most_inner_steps, 'inner step')}, median: {told}",
        f"{most.label}, by CG steps: {few}",
        f"meta-loss above its minimum after {counted(settings.meta_steps, 'meta-step')}, from "
        f"{training.series[0].median[0]:.2g}: {end}",
    ]
