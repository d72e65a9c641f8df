"""The network of the regression experiments, as pure functions of its parameters.

A number goes through two hidden layers of 40 rectified units each: Finn et al., "Model-Agnostic Meta-Learning" (2017,
section 5.1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from applications.imaml.network import Parameters
from applications.imaml.products import USUAL, Products

HIDDEN = (40, 40)


def initialize(outputs: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a new network: all uniform between -1/sqrt(n) and 1/sqrt(n), with n inputs of the layer.

    So does ``torch.nn.Linear``. Larger weights would make the inner problem too steep for the usual step size.

    Args:
        outputs: how many numbers it gives for one.
        generator: source of randomness, on the CPU, so that the same seed gives the same network on any device.

    Returns:
        float32 parameters by name; 1,761 numbers for one output.
    """
    parameters: Parameters = {}
    names = (*(f"hidden{layer}" for layer in range(len(HIDDEN))), "linear")
    for name, inputs, own in zip(names, (1, *HIDDEN), (*HIDDEN, outputs), strict=True):
        bound = inputs**-0.5
        parameters[f"{name}.weight"] = torch.empty(own, inputs).uniform_(-bound, bound, generator=generator)
        parameters[f"{name}.bias"] = torch.empty(own).uniform_(-bound, bound, generator=generator)
    return parameters


def features(parameters: Parameters, inputs: Tensor, how: Products = USUAL) -> Tensor:
    """What the last layer sees of numbers.

    Args:
        parameters: as drawn by ``initialize``; those of the last layer aren't looked at.
        inputs: ``[batch, 1]``.
        how: the products are computed.

    Returns:
        Features ``[batch, HIDDEN[-1]]``.
    """
    x = inputs
    for layer in range(len(HIDDEN)):
        own = how if layer else how.first()
        operands = own.operands(x, parameters[f"hidden{layer}.weight"], parameters[f"hidden{layer}.bias"])
        x = F.relu(F.linear(*operands).to(x.dtype))
    return x
