"""Where a gradient is wrong: difference quotients along one entry after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from implicitlayers.testing.quotients import Quotients
from implicitlayers.testing.report import Comparison, index

__all__ = ["worst_entry"]

ENTRIES = 24
"""Most entries of a leaf that are looked at."""


NUMBERS = ("expected", "floor", "scale")


def worst_entry(
    comparison: Comparison,
    name: str,
    leaf: Tensor,
    row: Callable[[Tensor], Quotients],
    found_along: Callable[[Tensor], Tensor],
    gradients: Sequence[str],
    tol: float,
) -> Comparison:
    """The same disagreement at the worst single entry that is looked at, or as it was, if none of them disagrees.

    Args:
        comparison: along a random direction.
        name: of the leaf.
        leaf: that the derivatives are taken in.
        row: direction in the leaf -> quotients along it, one of each gradient.
        found_along: direction in the leaf -> what the layer has for these.
        gradients: what each of them is called.
        tol: relative tolerance.
    """
    chosen = torch.linspace(0, leaf.numel() - 1, min(leaf.numel(), ENTRIES)).round().long().tolist()
    units = []
    for j in chosen:
        units.append(torch.zeros_like(leaf))
        units[-1].view(-1)[j] = 1
    rows = [row(unit) for unit in units]
    expected, floor, scale = (torch.stack([getattr(row, key) for row in rows], 1) for key in NUMBERS)
    # A small entry is held to the size of the gradient that it is part of, as in a random direction.
    allowed = (tol * scale.amax(1, keepdim=True)).expand_as(expected)
    found = torch.stack([found_along(unit) for unit in units], 1)
    excess = ((found - expected).abs() / (floor + allowed).clamp_min(1e-300)).nan_to_num(nan=torch.inf)
    excess = torch.where(torch.isfinite(expected), excess, 0.0)
    output, k = divmod(int(excess.argmax()), len(rows))
    if not float(excess[output, k]) > 1:
        return comparison
    numbers = {
        key: float(table[output, k])
        for key, table in {"found": found, "expected": expected, "floor": floor, "allowed": allowed}.items()
    }
    return replace(comparison, entry=f"{name}{index(chosen[k], leaf.shape)} of {gradients[output]}", **numbers)
