"""A trained network put to use: it learns classes that it has never seen from a few images of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from applications.imaml.algorithms import adapt, query_logits
from applications.imaml.checkpoint import CheckpointName
from applications.imaml.config import BatchNorm, Config
from applications.imaml.device import use
from applications.imaml.episodes import Tasks
from applications.imaml.networks import Parameters
from applications.imaml.run_folder import CONFIG
from applications.imaml.trained import load_network


@dataclass(frozen=True)
class Learner:
    """A trained network, and how it learns.

    Args:
        theta: meta-parameters.
        config: of the run that it comes from.
        channels: channels of its images.
        side: their height and width, in pixels.
        device: where it computes.
    """

    theta: Parameters
    config: Config
    channels: int
    side: int
    device: torch.device

    @classmethod
    def load(
        cls,
        run: Path,
        *,
        device: str = "auto",
        inner_steps: int | None = None,
        batch_norm: BatchNorm | None = None,
        checkpoint: CheckpointName = "last",
    ) -> Learner:
        """Read the network of a run.

        Args:
            run: folder of the run.
            device: where to compute.
            inner_steps: steps of the inner solver; None for as many as in training.
            batch_norm: "transductive" normalises the images to be classified by their own statistics, so that they are
                judged together, "support" by those of the support images, each on its own; None as in training.
            checkpoint: "last" for the network of the last meta-step, "best" for that of the highest accuracy on
                validation classes.

        Returns:
            The learner.

        Raises:
            CheckpointError: if there is no such checkpoint to read.
            ConfigError: if a setting cannot be, or the run is of regression.
        """
        saved = Config.load(run / CONFIG)
        saved.check_classes()
        config = replace(
            saved,
            device=device,
            threads=0,
            precision="float32",
            inner_steps=saved.inner_steps if inner_steps is None else inner_steps,
            batch_norm=batch_norm or saved.batch_norm,
        )
        where = use(config)
        network = load_network(run, where, checkpoint)
        return cls(network.theta, config, network.channels, network.side, where)

    def learn(self, images: Tensor, labels: Tensor) -> Learned:
        """Learn classes from support images.

        The network has as many outputs as its training tasks had classes. With fewer classes the first ones are used;
        which ones makes little difference, since classes took them at random in training.

        Args:
            images: float32 between 0 and 1, ``[count, channels, side, side]``.
            labels: int64 from 0 to the number of classes, all of which occur, ``[count]``.

        Returns:
            What was learnt.

        Raises:
            ValueError: if the images don't fit the network, or there are more classes than it has outputs.
        """
        self.check(images)
        classes = int(labels.max()) + 1
        if classes > self.config.ways:
            raise ValueError(
                f"there are {classes} classes, but the network was trained to tell {self.config.ways} apart; give at "
                f"most so many, or train one with --ways {classes}."
            )
        theta = {
            name: value[:classes] if name in ("linear.weight", "linear.bias") else value
            for name, value in self.theta.items()
        }
        support, targets = images.to(self.device), labels.to(self.device)
        with torch.no_grad():
            solution = adapt(theta, Tasks(support, targets, support, targets), self.config)
        return Learned(self, solution.value, support, targets)

    def check(self, images: Tensor) -> None:
        """Refuse images that the network doesn't take.

        Args:
            images: to be learnt from or classified.

        Raises:
            ValueError: if their shape or range doesn't fit.
        """
        expected = [self.channels, self.side, self.side]
        if images.dim() != 4 or list(images.shape[1:]) != expected or not len(images):
            raise ValueError(
                f"images have shape {list(images.shape)}, but the network takes {['count', *expected]}, "
                f"count at least 1; resize them, or train a network with --image-size and --channels to fit."
            )
        low, high = images.min().item(), images.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"images range from {low:g} to {high:g}, but the network was trained on 0 (black) to 1 (white); pass "
                f"bytes, or divide by the largest value that there can be."
            )


@dataclass(frozen=True)
class Learned:
    """Classes that were learnt.

    Args:
        learner: what they were learnt with.
        phi: the parameters for them.
        support_images: what they were learnt from, ``[count, channels, side, side]``.
        support_labels: likewise, ``[count]``.
    """

    learner: Learner
    phi: Parameters
    support_images: Tensor
    support_labels: Tensor

    def probabilities(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: float32 between 0 and 1, ``[count, channels, side, side]``.

        Returns:
            The probability of each class, ``[count, classes]``, on the CPU.

        Raises:
            ValueError: if the images don't fit the network.
        """
        self.learner.check(images)
        queries = images.to(self.learner.device)
        task = Tasks(self.support_images, self.support_labels, queries, self.support_labels)
        with torch.no_grad():
            return query_logits(self.phi, task, self.learner.config.batch_norm).softmax(-1).cpu()
