"""The convolutional network of the Mini-ImageNet experiments, as pure functions of its parameters.

Four blocks of 3x3 convolution with stride 1, batch normalisation, ReLU and 2x2 max-pooling, 32 filters each so that it
doesn't overfit, then a linear layer: Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning" (2017), as
used by Finn et al., "Model-Agnostic Meta-Learning" (2017, section 5.2). For square images of 16 pixels or more.
Normalised like the network of the Omniglot experiments: by the batch's own statistics, or by others handed over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from applications.imaml.network import BIAS, BLOCKS, EPSILON, GAIN, Parameters, Statistics
from applications.imaml.products import USUAL, Products

FILTERS = 32
SMALLEST = 2**BLOCKS


def initialize(ways: int, channels: int, side: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a new network: weights Xavier-uniform, biases uniform between 0 and ``BIAS``.

    Args:
        ways: number of classes that it tells apart.
        channels: channels of its images.
        side: height and width of its images, in pixels.
        generator: source of randomness, on the CPU, so that the same seed gives the same network on any device.

    Returns:
        float32 parameters by name; 32,901 numbers for 5 ways, 3 channels and 84 pixels.

    Raises:
        ValueError: if the images are too small to be halved four times.
    """
    if side < SMALLEST:
        raise ValueError(
            f"images of {side}x{side} pixels have no pixel left after {BLOCKS} poolings; pass images of at least "
            f"{SMALLEST}x{SMALLEST}."
        )
    parameters: Parameters = {}
    for block in range(BLOCKS):
        weight = torch.empty(FILTERS, channels if block == 0 else FILTERS, 3, 3)
        parameters[f"convolution{block}.weight"] = init.xavier_uniform_(weight, GAIN, generator)
        parameters[f"convolution{block}.bias"] = torch.empty(FILTERS).uniform_(0, BIAS, generator=generator)
        parameters[f"normalization{block}.scale"] = torch.ones(FILTERS)
        parameters[f"normalization{block}.shift"] = torch.zeros(FILTERS)
    features = FILTERS * (side // SMALLEST) ** 2
    parameters["linear.weight"] = init.xavier_uniform_(torch.empty(ways, features), GAIN, generator)
    parameters["linear.bias"] = torch.empty(ways).uniform_(0, BIAS, generator=generator)
    return parameters


def features(
    parameters: Parameters, images: Tensor, statistics: list[Statistics] | None = None, how: Products = USUAL
) -> tuple[Tensor, list[Statistics]]:
    """What the last layer sees of images, and what each block's batch normalisation saw of them.

    Args:
        parameters: as drawn by ``initialize``.
        images: ``[batch, channels, side, side]``, between 0 and 1.
        statistics: what to normalise with, one entry for each block; the batch's own without.
        how: by PyTorch's own convolution, unless gathered windows are asked for, and in which precision.

    Returns:
        Features ``[batch, features]``, and the statistics used.

    Raises:
        ValueError: if the images have another size than those that the parameters were drawn for.
    """
    expected = parameters["linear.weight"].shape[-1]
    if FILTERS * (images.shape[-2] // SMALLEST) * (images.shape[-1] // SMALLEST) != expected:
        side = SMALLEST * round((expected / FILTERS) ** 0.5)
        raise ValueError(
            f"images has shape {list(images.shape)}, but the linear layer fits the features of sides from {side} to "
            f"{side + SMALLEST - 1} pixels only; pass images of the size that the network was made for."
        )
    x = images
    seen: list[Statistics] = []
    for block in range(BLOCKS):
        weight, bias = parameters[f"convolution{block}.weight"], parameters[f"convolution{block}.bias"]
        x = _convolve(x, weight, bias, how if block else how.first())
        own = _statistics(x) if statistics is None else statistics[block]
        seen.append(own)
        factor = parameters[f"normalization{block}.scale"] * torch.rsqrt(own.variance + EPSILON)
        centred = x - own.mean[:, None, None]
        x = F.relu(
            torch.addcmul(parameters[f"normalization{block}.shift"][:, None, None], centred, factor[:, None, None])
        )
        x = F.max_pool2d(x, 2)
    return x.flatten(1), seen


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, how: Products) -> Tensor:
    own = _by_windows if how.convolution == "windows" else _as_it_is
    return own(*how.operands(x, weight, bias)).to(x.dtype)


def _as_it_is(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def _by_windows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    product = weight.flatten(1) @ F.unfold(x, 3, padding=1)
    return (product + bias[:, None]).unflatten(-1, x.shape[-2:])


def _statistics(x: Tensor) -> Statistics:
    mean = x.mean((0, 2, 3))
    # Centred before it is squared, against cancellation in float32.
    return Statistics(mean, (x - mean[:, None, None]).square().mean((0, 2, 3)))
