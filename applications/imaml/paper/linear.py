"""Meta-learning linear regression, where the exact meta-gradient has a closed form.

A task has the support loss |X w - y|²/(2m). With G = XᵀX/m, b = Xᵀy/m and A = G + lam,

    w*(theta) = A⁻¹(b + lam theta),   D = dw*/dtheta = lam A⁻¹,

and the meta-loss F(theta), the mean over tasks of |X' w* - y'|²/(2m') on query data, is a quadratic in theta: its
gradient, its curvature and its minimum are found by dense linear algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import implicitlayers as il
from applications.imaml.config import ConfigError

__all__ = ["Exact", "RegressionSettings", "RegressionTasks", "Way", "draw_tasks", "meta_gradient"]

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
