"""The convolutional network of the Omniglot experiments, as pure functions of its parameters.

Four blocks of convolution, batch normalisation and ReLU, then a linear layer: Vinyals et al., "Matching Networks for
One Shot Learning" (2016), in the strided form of Finn et al., "Model-Agnostic Meta-Learning" (2017, section 5.2).
Batch normalisation has no running statistics: they would have to be kept for every task, and mutating them breaks
``torch.func``. A batch is normalised by its own statistics, or by those of another batch handed over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from applications.imaml.convolution import convolve
from applications.imaml.normalization import EPSILON, moments, normalize
from applications.imaml.products import USUAL, Products

BLOCKS = 4
FILTERS = 64
SIDE = 28
FEATURES = FILTERS * 2 * 2
# Gain and largest bias of the initialisation with which the iMAML experiments were run.
GAIN = 1.73
BIAS = 0.05
HEAD = ("linear.weight", "linear.bias")
"""Names of the parameters of the last layer."""

Parameters = dict[str, Tensor]


class Statistics(NamedTuple):
    """Mean and variance of the channels that one batch normalisation saw, each ``[FILTERS]``."""

    mean: Tensor
    variance: Tensor


def initialize(ways: int, channels: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a new network: weights Xavier-uniform, biases uniform between 0 and ``BIAS``.

    Args:
        ways: number of classes that it tells apart.
        channels: channels of its images.
        generator: source of randomness, on the CPU, so that the same seed gives the same network on any device.

    Returns:
        float32 parameters by name; 113,221 numbers for 5 ways and 1 channel.
    """
    parameters: Parameters = {}
    for block in range(BLOCKS):
        weight = torch.empty(FILTERS, channels if block == 0 else FILTERS, 3, 3)
        drawn = init.xavier_uniform_(weight, GAIN, generator)
        # Channels last: [height, width, in, out].
        parameters[f"convolution{block}.weight"] = drawn.permute(2, 3, 1, 0).contiguous()
        parameters[f"convolution{block}.bias"] = torch.empty(FILTERS).uniform_(0, BIAS, generator=generator)
        parameters[f"normalization{block}.scale"] = torch.ones(FILTERS)
        parameters[f"normalization{block}.shift"] = torch.zeros(FILTERS)
    parameters["linear.weight"] = init.xavier_uniform_(torch.empty(ways, FEATURES), GAIN, generator)
    parameters["linear.bias"] = torch.empty(ways).uniform_(0, BIAS, generator=generator)
    return parameters


def forward(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None = None, how: Products = USUAL
) -> Tensor:
    """Classify images.

    Args:
        parameters: as drawn by ``initialize``.
        images: ``[batch, channels, 28, 28]``, between 0 and 1.
        statistics: what to normalise with, one entry for each block, from ``batch_statistics`` of another batch.
            Without it the images are normalised by their own statistics, so that the classification of one image
            depends on the others in its batch (transductive, if these are query images).
        how: the products are computed.

    Returns:
        Logits ``[batch, ways]``.
    """
    return head(parameters, features(parameters, images, statistics, how), how)


def features(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None = None, how: Products = USUAL
) -> Tensor:
    """What the last layer sees of images.

    Args:
        parameters: as drawn by ``initialize``; those of the last layer aren't looked at.
        images: as for ``forward``.
        statistics: as for ``forward``.
        how: as for ``forward``.

    Returns:
        Features ``[batch, FEATURES]``.
    """
    return _apply(parameters, images, statistics, how, collect=False)[0]


def head(parameters: Parameters, features: Tensor, how: Products = USUAL) -> Tensor:
    """Classify features by the last layer.

    Args:
        parameters: those in ``HEAD``, and any others.
        features: ``[batch, features]``.
        how: the product is computed.

    Returns:
        Logits ``[batch, ways]``.
    """
    operands = how.operands(features, parameters["linear.weight"], parameters["linear.bias"])
    return F.linear(*operands).to(features.dtype)


def batch_statistics(parameters: Parameters, images: Tensor, how: Products = USUAL) -> list[Statistics]:
    """What each block's batch normalisation sees of a batch, to be handed to ``forward`` with another.

    Args:
        parameters: as drawn by ``initialize``.
        images: ``[batch, channels, 28, 28]``, between 0 and 1.
        how: as for ``forward``.

    Returns:
        The statistics of each block.
    """
    return _apply(parameters, images, None, how, collect=True)[1]


def _apply(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None, how: Products, *, collect: bool
) -> tuple[Tensor, list[Statistics]]:
    if images.shape[-2:] != (SIDE, SIDE):
        raise ValueError(
            f"images has shape {list(images.shape)}, but the linear layer fits the features of {SIDE}x{SIDE} pixels "
            f"only; pass images resized to [batch, channels, {SIDE}, {SIDE}]."
        )
    x = images.movedim(1, -1)
    seen: list[Statistics] = []
    for block in range(BLOCKS):
        # The bias of a convolution cancels in the normalisation, so it is not added.
        x = convolve(x, parameters[f"convolution{block}.weight"], how if block else how.first())
        scale, shift = parameters[f"normalization{block}.scale"], parameters[f"normalization{block}.shift"]
        if statistics is None and not collect:
            x = F.relu(normalize(x, scale, shift))
            continue
        own = Statistics(*moments(x)) if statistics is None else statistics[block]
        seen.append(own)
        x = F.relu(torch.addcmul(shift, x - own.mean, scale * torch.rsqrt(own.variance + EPSILON)))
    return x.flatten(1), seen
