"""lam, the strength of the pull towards the meta-parameters: given, or learnt with them.

A learnt strength is a meta-parameter beside those of the network, as the logarithm of it, so that it stays positive under any
step: one for all parameters, or one for each layer. It is initialised with the given strength.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from applications.imaml.config import Config
from applications.imaml.networks import Parameters

__all__ = ["initial_strengths", "network_of", "strengths", "strengths_by_layer"]

_LOGARITHM = "log_lam."
_ALL = "all"


def initial_strengths(theta: Parameters, config: Config) -> Parameters:
    """The meta-parameters of the strength before training.

    Args:
        theta: parameters of a new network.
        config: whether the strength is learnt, and what it is at first.

    Returns:
        Logarithms by name; none if it is given.
    """
    layers = {"no": [], "scalar": [_ALL], "layer": sorted({_layer(name) for name in theta})}[config.learn_lam]
    like = next(iter(theta.values()))
    return {f"{_LOGARITHM}{layer}": torch.full((), math.log(config.lam), dtype=like.dtype) for layer in layers}


def network_of(theta: Parameters) -> Parameters:
    """The meta-parameters that the network is made of.

    Args:
        theta: all of them.

    Returns:
        Those that aren't strengths.
    """
    return {name: value for name, value in theta.items() if not name.startswith(_LOGARITHM)}


def strengths(theta: Parameters, config: Config) -> float | Tensor | Parameters:
    """The strength for every parameter of the network.

    Args:
        theta: meta-parameters.
        config: the given strength.

    Returns:
        A number or a 0-d tensor for all of them, or a 0-d tensor for each by name.
    """
    if config.learn_lam == "no":
        return config.lam
    if config.learn_lam == "scalar":
        return theta[f"{_LOGARITHM}{_ALL}"].exp()
    by_layer = strengths_by_layer(theta)
    return {name: by_layer[_layer(name)] for name in network_of(theta)}


def strengths_by_layer(theta: Parameters) -> Parameters:
    """The learnt strengths.

    Args:
        theta: meta-parameters.

    Returns:
        0-d tensors by layer, one called "all" where one is for all; none where nothing is learnt.
    """
    logarithms = {name: value for name, value in theta.items() if name.startswith(_LOGARITHM)}
    return {name.removeprefix(_LOGARITHM): value.exp() for name, value in logarithms.items()}


def _layer(name: str) -> str:
    return name.partition(".")[0]
