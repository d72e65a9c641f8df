"""Regression of sine waves, the smallest few-shot problem: tasks from a formula, with their exact answers.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017), section 5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class SinusoidTasks(NamedTuple):
    """A batch of tasks: points to learn from, and others to be judged by.

    The four tensors stand for the same things and in the same order as those of image tasks, with numbers for images
    and for labels: inputs and targets are float32, ``[tasks, shots, 1]`` and likewise with queries.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor


@dataclass(frozen=True)
class Sinusoids:
    """Sine waves y = a sin(x − p), one a task, with amplitude a, phase p and places x drawn uniformly.

    To choose where a method's own error is to be seen, since images and their statistics play no part, and each task
    is learnt from a few numbers.

    Args:
        amplitude: lowest and highest a.
        phase: lowest and highest p, in radians.
        domain: lowest and highest x.
        noise: standard deviation of normal noise on the support targets; query targets are exact.

    Raises:
        ValueError: if a range is empty or not finite, or the noise is negative.
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    domain: tuple[float, float] = (-5.0, 5.0)
    noise: float = 0.0

    source: ClassVar[str] = "sinusoid"

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "domain"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"{name}={(low, high)} is no range to draw from; pass finite (lowest, highest).")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise} cannot be a standard deviation; pass a finite number of at least 0.")

    def sample(self, tasks: int, shots: int, queries: int, generator: torch.Generator) -> SinusoidTasks:
        """Draw tasks.

        Args:
            tasks: how many.
            shots: support points of a task.
            queries: query points of a task.
            generator: source of randomness, on the device where the tasks are wanted; advanced.

        Returns:
            The tasks.

        Raises:
            ValueError: if a count is below 1.
        """
        for name, count in (("tasks", tasks), ("shots", shots), ("queries", queries)):
            if count < 1:
                raise ValueError(f"{name}={count} leaves nothing to draw; pass at least 1.")

        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)

        amplitude, phase = uniform(self.amplitude, tasks, 1, 1), uniform(self.phase, tasks, 1, 1)
        inputs = uniform(self.domain, tasks, shots + queries, 1)
        targets = amplitude * torch.sin(inputs - phase)
        support, query = inputs.split([shots, queries], dim=1)
        exact, judged = targets.split([shots, queries], dim=1)
        errors = torch.randn(exact.shape, generator=generator, device=generator.device)
        return SinusoidTasks(support, exact + self.noise * errors, query, judged)
