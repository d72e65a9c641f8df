"""Defaults that depend on what is learnt and how."""

from __future__ import annotations

from typing import Any

from applications.imaml.config import AlgorithmName, DataName, usual_lam

__all__ = ["usual"]

# Small steps, since the loss is steep where amplitudes and places are large. And a stronger pull than with images: the
# meta-gradient of iMAML is that of a solved inner problem, and such steps are much farther from solving one with lam
# 0.1, which left larger errors.
_SINUSOID: dict[str, Any] = {
    "shots": 10,
    "inner_lr": 0.01,
    "inner_steps": 10,
    "cg_steps": 5,
    "meta_lr": 5e-3,
    "meta_steps": 1000,
    "validate_every": 250,
}
_SINUSOID_LAM = 2.0


def usual(data: DataName, algorithm: AlgorithmName) -> dict[str, Any]:
    """What a dataset and an algorithm are trained with unless somebody says otherwise.

    Args:
        data: name of the dataset.
        algorithm: name of the algorithm.

    Returns:
        Settings that may differ from the defaults of ``Config``.
    """
    if data != "sinusoid":
        return {"lam": usual_lam(algorithm)}
    return _SINUSOID | {"lam": _SINUSOID_LAM if algorithm == "imaml" else usual_lam(algorithm)}
