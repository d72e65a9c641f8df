"""A network with smooth units, so small that its inner problem and its linear system can be solved to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters

__all__ = ["SOLVED", "Certified", "SmoothProblem", "rows"]

_POOL, _HIDDEN = 4, 16
# Inner steps after which Newton's method is close enough to find the same minimum.
_LONG = 1000
SOLVED = il.CG(rtol=1e-13, max_steps=2000)
"""Conjugate gradients to rounding: what the rest is measured against."""


class Certified(NamedTuple):
    """A meta-gradient of every task ``[tasks, n]``, and the estimate ``[tasks]`` of its relative error."""

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

    def certified(self, steps: int | None, cg_steps: int | None) -> Certified:
        """The meta-gradient after gradient steps from theta.

        Args:
            steps: how many; None for the solution that they lead to.
            cg_steps: for the linear system; None to solve it.

        Returns:
            With its estimate.
        """
        linear = SOLVED if cg_steps is None else il.CG(rtol=None, atol=None, max_steps=cg_steps)
        adjoint = il.Implicit(linear, on_failure="ignore", gradient_tol=math.inf)
        phi = self._solution if steps is None else self._descended(steps)
        gradient, report = self._meta_gradient(phi, adjoint)
        assert report.error_estimate is not None
        return Certified(gradient, report.error_estimate)

    def through_path(self, steps: int) -> Tensor:
        """The meta-gradient of MAML with the same inner problem, ``[tasks, n]``."""
        theta = self._leaves()
        phi = torch.vmap(lambda theta, task: self._inner(theta, task, theta, self._descent(steps), il.Unrolled()).value)
        return rows(torch.autograd.grad(self._query_losses(phi(theta, self._tasks)).sum(), list(theta.values())))

    def exact(self) -> Tensor:
        """The exact meta-gradient, ``[tasks, n]``."""
        return self._meta_gradient(self._solution, il.Implicit(SOLVED, on_failure="ignore"))[0]

    def exact_adjoint(self, steps: int) -> Tensor:
        """As `exact`, but with the query loss's gradient after that many steps from theta: what is certified."""
        phi = {name: value.requires_grad_() for name, value in self._descended(steps).items()}
        v = torch.autograd.grad(self._query_losses(phi).sum(), list(phi.values()))
        theta = self._leaves()
        solution = self._at(theta, self._solution, il.Implicit(SOLVED, on_failure="ignore")).value
        return rows(torch.autograd.grad(list(solution.values()), list(theta.values()), v))

    def residual(self) -> float:
        """Norm of the inner problem's gradient at what counts as its solution, the largest of all tasks."""
        return self._at(self._theta, self._solution, il.Implicit()).stats.residual.max().item()

    def _meta_gradient(self, phi: Parameters, adjoint: il.Implicit) -> tuple[Tensor, il.AdjointReport]:
        theta = self._leaves()
        solution = self._at(theta, phi, adjoint)
        gradient = torch.autograd.grad(self._query_losses(solution.value).sum(), list(theta.values()))
        return rows(gradient), solution.adjoint

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
        newton = il.Newton(linear_solver=SOLVED, rtol=0.0, atol=1e-13, max_steps=50)
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
    return 1 - F.avg_pool2d(images, _POOL).flatten(1)


def _cross_entropy(phi: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((_pixels(images) @ phi["hidden"]).tanh() @ phi["linear"], labels)


def rows(gradient: Sequence[Tensor]) -> Tensor:
    """The parts of every task's gradient, one task a row."""
    return torch.cat([part.flatten(1) for part in gradient], dim=1)
