"""What tasks are drawn from: classes of images, or a formula; one face for both.

A family is one part of a dataset, for training, validation or testing. Images are parted by their classes. A formula
has no end of tasks, and every part draws its own from a stream of random numbers of its own.
"""

from __future__ import annotations

from typing import Protocol, get_args

import torch

from applications.datasets import Sinusoids
from applications.imaml.config import Config
from applications.imaml.episodes import Family, SplitName, Tasks, TaskSampler, load_splits
from applications.imaml.networks import NUMBER, Parameters, initialize

__all__ = ["Sampler", "SinusoidSampler", "image_of", "load_families", "new_network", "sampler_of"]


class Sampler(Protocol):
    """Draws tasks; the state of its generator is all the state there is."""

    generator: torch.Generator

    def sample(self, tasks: int) -> Tasks:
        """Draw tasks, without waiting for the device.

        Args:
            tasks: how many.

        Returns:
            The tasks, on the device of the generator.
        """
        ...


class SinusoidSampler:
    """Draws sine waves, each with ``shots`` support and ``queries`` query points.

    Args:
        sinusoids: the formula.
        shots: support points.
        queries: query points.
        generator: source of randomness, on the device where tasks are wanted.
    """

    def __init__(self, sinusoids: Sinusoids, shots: int, queries: int, generator: torch.Generator) -> None:
        self._sinusoids, self._shots, self._queries = sinusoids, shots, queries
        self.generator = generator

    def sample(self, tasks: int) -> Tasks:
        """Draw tasks.

        Args:
            tasks: how many.

        Returns:
            The tasks.
        """
        return Tasks(*self._sinusoids.sample(tasks, self._shots, self._queries, self.generator))


def load_families(config: Config, device: torch.device) -> dict[SplitName, Family]:
    """What the tasks of a run are drawn from, for training, validation and test.

    Args:
        config: of the run.
        device: where images are wanted.

    Returns:
        The family of each split, but for "validation" where there are no classes for it.

    Raises:
        OSError: if the files of a dataset cannot be read.
        ValueError: if they are damaged.
    """
    if config.is_regression:
        return dict.fromkeys(get_args(SplitName), Sinusoids())
    return {**load_splits(config, device)}


def sampler_of(family: Family, config: Config, generator: torch.Generator, query_sets: int = 1) -> Sampler:
    """Draws the tasks of a run.

    Args:
        family: what they are drawn from.
        config: ways, shots and queries.
        generator: source of randomness, on the device where they are wanted.
        query_sets: sets of query images.

    Returns:
        The sampler.

    Raises:
        ValueError: if there are too few classes or images for these tasks.
    """
    if isinstance(family, Sinusoids):
        return SinusoidSampler(family, config.shots, config.queries, generator)
    return TaskSampler(family, config.ways, config.shots, config.queries, generator, query_sets)


def image_of(family: Family) -> tuple[int, int]:
    """What a network sees at once.

    Args:
        family: what its tasks are drawn from.

    Returns:
        Channels and side of an image; `NUMBER` for a number.
    """
    if isinstance(family, Sinusoids):
        return NUMBER
    *_, channels, _, side = family.images.shape
    return channels, side


def new_network(family: Family, config: Config, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a network for the tasks of a run.

    Args:
        family: what they are drawn from.
        config: of the run.
        generator: source of randomness, on the CPU.

    Returns:
        float32 parameters by name.

    Raises:
        ValueError: if no network takes images so small.
    """
    return initialize(1 if config.is_regression else config.ways, *image_of(family), generator)
