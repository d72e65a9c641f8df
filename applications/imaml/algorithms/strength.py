"""lam, the strength of the pull towards the meta-parameters: given, or learnt with them.

A learnt strength is a meta-parameter beside those of the network: one for all parameters, or one for each layer. It is
kept as its logarithm, so that it stays positive under any step, and starts at the given strength.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from applications.imaml.config import Config
from applications.imaml.networks import HEAD, Parameters

__all__ = ["initial_strengths", "learnt_strengths", "network_of", "strengths"]

_PREFIX = "log_lam."
_ALL = "all"


def initial_strengths(network: Parameters, config: Config) -> Parameters:
    """The meta-parameters of the strength before training.

    Args:
        network: parameters of a new network.
        config: whether the strength is learnt, and what it is at first.

    Returns:
        0-d logarithms by name, of the layers that are adapted; none if the strength is given.
    """
    adapted = HEAD if config.algorithm == "anil" else network
    layers = {"none": [], "scalar": [_ALL], "layer": list(dict.fromkeys(map(_layer, adapted)))}[config.learn_lam]
    like = next(iter(network.values()))
    return {f"{_PREFIX}{layer}": like.new_full((), math.log(config.lam)) for layer in layers}


def network_of(theta: Parameters) -> Parameters:
    """The meta-parameters that the network is made of.

    Args:
        theta: all of them.

    Returns:
        Those that aren't strengths.
    """
    return {name: value for name, value in theta.items() if not name.startswith(_PREFIX)}


def strengths(theta: Parameters, names: Iterable[str], config: Config) -> float | Tensor | Parameters:
    """The strength for parameters of the network, differentiable where it is learnt.

    Args:
        theta: meta-parameters.
        names: the parameters that it is wanted for.
        config: the given strength, and whether it is learnt.

    Returns:
        A number or a 0-d tensor for all of them, or a 0-d tensor for each by name.
    """
    if config.learn_lam == "none":
        return config.lam
    if config.learn_lam == "scalar":
        return theta[f"{_PREFIX}{_ALL}"].exp()
    return {name: theta[f"{_PREFIX}{_layer(name)}"].exp() for name in names}


def learnt_strengths(theta: Parameters) -> dict[str, float]:
    """The learnt strengths, for the record.

    Args:
        theta: meta-parameters.

    Returns:
        Numbers by layer, one called "all" where it is for all; none where nothing is learnt.
    """
    logarithms = {name.removeprefix(_PREFIX): value for name, value in theta.items() if name.startswith(_PREFIX)}
    return {layer: math.exp(value.item()) for layer, value in logarithms.items()}


def _layer(name: str) -> str:
    return name.partition(".")[0]
