"""Which network is for images of which size: one face for all.

28 pixels are for the strided network of the Omniglot experiments, which is the faster; everything else is for the
pooled one of the Mini-ImageNet experiments, but for a single number, which is for the perceptron of the regression
experiments. The size of the images decides wherever they are seen, so that nobody has
to hand a network about.
"""

from __future__ import annotations

import torch
from torch import Tensor

from applications.imaml import network, perceptron, pooled
from applications.imaml.network import HEAD, Parameters, Statistics, head
from applications.imaml.products import USUAL, Products

__all__ = [
    "HEAD",
    "NUMBER",
    "Parameters",
    "Statistics",
    "batch_statistics",
    "features",
    "forward",
    "head",
    "initialize",
]

NUMBER = (1, 1)
"""Channels and side of what is no image but one number."""


def initialize(ways: int, channels: int, side: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a new network.

    Args:
        ways: number of classes that it tells apart; of regression, numbers that it gives.
        channels: channels of its images.
        side: height and width of its images, in pixels; 1 for numbers.
        generator: source of randomness, on the CPU.

    Returns:
        float32 parameters by name.

    Raises:
        ValueError: if no network takes images so small.
    """
    if (channels, side) == NUMBER:
        return perceptron.initialize(ways, generator)
    if side == network.SIDE:
        return network.initialize(ways, channels, generator)
    return pooled.initialize(ways, channels, side, generator)


def forward(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None = None, how: Products = USUAL
) -> Tensor:
    """Classify images.

    Args:
        parameters: as drawn by ``initialize``.
        images: ``[batch, channels, side, side]``, between 0 and 1; or numbers, ``[batch, 1]``.
        statistics: what to normalise with, one entry for each block, from ``batch_statistics`` of another batch; the
            batch's own without. Numbers aren't normalised.
        how: the products are computed.

    Returns:
        Logits ``[batch, ways]``, or as many numbers.
    """
    return head(parameters, features(parameters, images, statistics, how), how)


def features(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None = None, how: Products = USUAL
) -> Tensor:
    """What the last layer sees of images; ``head`` makes logits of it.

    Args:
        parameters: as drawn by ``initialize``.
        images: as for ``forward``.
        statistics: as for ``forward``.
        how: as for ``forward``.

    Returns:
        Features ``[batch, features]``.
    """
    if images.shape[-1] == NUMBER[1]:
        return perceptron.features(parameters, images, how)
    if images.shape[-1] == network.SIDE:
        return network.features(parameters, images, statistics, how)
    return pooled.features(parameters, images, statistics, how)[0]


def batch_statistics(parameters: Parameters, images: Tensor, how: Products = USUAL) -> list[Statistics]:
    """What each block's batch normalisation sees of a batch, to be handed to ``forward`` with another.

    Args:
        parameters: as drawn by ``initialize``.
        images: ``[batch, channels, side, side]``, between 0 and 1.
        how: as for ``forward``.

    Returns:
        The statistics of each block.
    """
    if images.shape[-1] == network.SIDE:
        return network.batch_statistics(parameters, images, how)
    return pooled.features(parameters, images, None, how)[1]
