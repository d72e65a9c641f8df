"""Few-shot tasks, and how they are drawn from a set of images in classes without leaving its device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from applications.datasets import SPLIT_SIZES, ClassImages, Sinusoids, check_disjoint, load, partition
from applications.imaml.checkpoint import CheckpointError
from applications.imaml.config import Config

SplitName = Literal["train", "validation", "test"]
Family = ClassImages | Sinusoids
"""What tasks are drawn from: the classes of one part of a dataset, or a formula."""


class Tasks(NamedTuple):
    """A batch of tasks, each to be learnt from its support images and judged by its query images.

    Images are float32 between 0 and 1, ``[tasks, ways * shots, channels, height, width]`` and likewise with queries;
    labels are int64 below ``ways``, ``[tasks, ways * shots]``. Images of one class are neighbours; where a task has
    several query sets, one set follows the other. In regression there are numbers in the place of both: inputs and
    their targets, float32 ``[tasks, shots, 1]``. Seen from inside a map over tasks it is one task, and the leading
    dimension is missing.
    """

    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    query_labels: Tensor


def generator_for(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of randomness of its own for each purpose, so that drawing more for one leaves the others as they are.

    Args:
        seed: of the whole run; not negative.
        purpose: what is drawn, for instance "training tasks".
        device: where it is drawn.

    Returns:
        A generator, seeded by both.
    """
    # SeedSequence, since seeds like seed + 1 would let the tasks of one run be those of its neighbour.
    (state,) = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state))


def load_splits(config: Config, device: torch.device) -> dict[SplitName, ClassImages]:
    """Load the dataset of a run, cut into classes for training, validation and test.

    Args:
        config: of the run.
        device: where the images are wanted.

    Returns:
        The classes of each split, but for "validation" where there are none; no class is in two.

    Raises:
        ConfigError: if its dataset has no classes.
        OSError: if the files of the dataset cannot be read.
        ValueError: if they are damaged.
    """
    config.check_classes()
    root = None if config.root is None else Path(config.root)
    options = {"size": config.image_size, "channels": config.channels, "split": config.split}
    given = {name: value for name, value in options.items() if value is not None}
    dataset = load(config.data, root, config.split_seed, **given)
    chosen = partition(dataset, config.data, config.split, config.split_seed, SPLIT_SIZES)
    check_disjoint(chosen)
    return {name: dataset.take(chosen[name]).to(device) for name in get_args(SplitName) if name in chosen}


def check_ways(splits: Mapping[SplitName, Family], ways: int) -> None:
    """Refuse to train where validation or evaluation would find too few classes, hours later.

    Args:
        splits: of a run.
        ways: classes of a task.

    Raises:
        ValueError: if a part has fewer classes than a task needs.
    """
    sizes = {name: part.classes for name, part in splits.items() if isinstance(part, ClassImages)}
    if min(sizes.values(), default=ways) < ways:
        source = next(iter(splits.values())).source
        parts = ", ".join(f"{count} for {name}" for name, count in sizes.items())
        raise ValueError(
            f"{source} has too few classes for ways={ways}: {parts}, and every part needs {ways} or more; bring more "
            "classes, lay them out in folders train, validation and test, or pass ways of at most "
            f"{min(sizes.values())}."
        )


def identity_of(splits: Mapping[SplitName, Family]) -> dict[str, Any] | None:
    """What tells the data of a run from other data: which classes are for what, and the shape of their images.

    A class folder that is added moves others from one part to another. Where the files lie does not matter, and their
    pixels are not looked at: another version of a decoder rounds otherwise.

    Args:
        splits: of a run.

    Returns:
        The SHA-256 of names, parts and shapes; and the number of classes of each part, for people. Fits JSON. None of a
        formula, which is the same everywhere.
    """
    images = {name: part for name, part in splits.items() if isinstance(part, ClassImages)}
    if not images:
        return None
    told = {name: [list(part.names), list(part.images.shape)] for name, part in images.items()}
    return {
        "sha256": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
        "classes": {name: part.classes for name, part in images.items()},
    }


def check_same_data(saved: Mapping[str, Any] | None, splits: Mapping[SplitName, Family]) -> None:
    """Refuse to go on with, or to judge by, other classes than a run was begun with.

    Args:
        saved: identity of the data that the run was begun with; None if it doesn't say, as runs once did not.
        splits: of what is there now.

    Raises:
        CheckpointError: if they differ.
    """
    found = identity_of(splits)
    if saved is None or found is None or saved["sha256"] == found["sha256"]:
        return
    before, now = (
        ", ".join(f"{count} for {name}" for name, count in each["classes"].items()) for each in (saved, found)
    )
    raise CheckpointError(
        f"{next(iter(splits.values())).source} is not what the run was trained on: its classes were {before}, and are "
        f"{now}, with other names, in other parts or with other images, so that some may be tested on that were "
        f"trained on; bring the classes back as they were, pass root=FOLDER that has them, or train a run in a new "
        f"folder."
    )


class TaskSampler:
    """Draws tasks of ``ways`` classes with ``shots`` support and ``queries`` query images each.

    Classes and their images are drawn without replacement, so that no query image is among the support images.
    Each class of a task is turned by a random multiple of 90°, support and query images alike (Santoro et al.,
    "Meta-Learning with Memory-Augmented Neural Networks", 2016, turned whole classes likewise to have more of them),
    unless the dataset has only one orientation.

    Args:
        dataset: classes to draw from, square images, on the device where tasks are wanted.
        ways: classes of a task.
        shots: support images of a class.
        queries: query images of a class.
        generator: source of randomness on the device of the images; its state is all the state there is.
        query_sets: sets of query images, of different images of the same classes.

    Raises:
        ValueError: if the dataset has too few classes or images, or if its images are not square.
    """

    def __init__(
        self,
        dataset: ClassImages,
        ways: int,
        shots: int,
        queries: int,
        generator: torch.Generator,
        query_sets: int = 1,
    ) -> None:
        classes, per_class, channels, height, width = dataset.images.shape
        if ways > classes:
            raise ValueError(
                f"ways={ways} asks for more classes in a task than the {classes} that this part of {dataset.source} "
                f"has; pass ways of at most {classes}."
            )
        asked = shots + queries * query_sets
        if asked > per_class:
            sets = f" in each of query_sets={query_sets}" if query_sets > 1 else ""
            raise ValueError(
                f"shots={shots} and queries={queries}{sets} ask for {asked} different images of a class, but "
                f"{dataset.source} has {per_class} of each; pass a sum of at most {per_class}."
            )
        if height != width:
            raise ValueError(
                f"images are {height}x{width}, and a quarter turn would change their shape; pass square images."
            )
        self._pixels = dataset.images.flatten(3)
        self._shape = (channels, height, width)
        self._ways, self._shots, self._queries, self._sets = ways, shots, queries, query_sets
        self.generator = generator
        upright = torch.arange(height * width, device=self._pixels.device).reshape(height, width)
        self._turned = torch.stack([upright.rot90(turns).flatten() for turns in range(dataset.orientations)])

    def sample(self, tasks: int) -> Tasks:
        """Draw tasks.

        Args:
            tasks: how many.

        Returns:
            The tasks, on the device of the dataset.
        """
        classes = self._choose((tasks,), self._pixels.shape[0], self._ways)
        chosen = self._choose((tasks, self._ways), self._pixels.shape[1], self._shots + self._queries * self._sets)
        pixels = self._pixels[classes[:, :, None], chosen]
        turns = self._random(tasks, self._ways).mul(len(self._turned)).long()
        order = self._turned[turns][:, :, None, None].expand(pixels.shape)
        images = pixels.gather(-1, order).float().div(255).unflatten(-1, self._shape[1:])
        support, query = images.split([self._shots, self._queries * self._sets], dim=2)
        query = query.unflatten(2, (self._sets, self._queries)).movedim(2, 1)
        labels = torch.arange(self._ways, device=images.device).expand(tasks, -1)
        return Tasks(
            support.flatten(1, 2),
            labels.repeat_interleave(self._shots, dim=1),
            query.flatten(1, 3),
            labels.repeat_interleave(self._queries, dim=1).repeat(1, self._sets),
        )

    def _choose(self, lanes: tuple[int, ...], population: int, size: int) -> Tensor:
        # The places of the largest of independent uniform numbers are a uniform draw without replacement.
        return self._random(*lanes, population).topk(size, dim=-1).indices

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self._pixels.device)
