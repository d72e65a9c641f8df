"""Difference quotients of what a layer returns, and of its contractions with a cotangent, as numbers to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.testing.finite_difference import differentiate, reach
from implicitlayers.testing.vectors import Floating, flat, largest

__all__ = ["Oracle", "Quotients", "Vector", "contract", "filled", "negligible", "quotients", "stack"]

NEGLIGIBLE = 1e-3
"""A derivative so much smaller than the natural one is held to the absolute tolerance that goes with this size: it is
what is left of larger numbers that cancelled."""

CANCELLED = 256
"""Units of the last place that are lost where such numbers cancel."""


def negligible(eps: float, tol: float) -> float:
    """The fraction of the natural size below which a derivative of this precision is negligible."""
    return min(1.0, max(NEGLIGIBLE, CANCELLED * eps / tol))


Vector = list[Tensor]


class Quotients(NamedTuple):
    """Difference quotients of some tensors and, last, of their contraction with weights.

    Attributes:
        expected: ``[m]`` numbers.
        floor: their error estimates.
        scale: what a derivative of their kind amounts to: the largest entry of the same tensor; for a contraction the
            length of its summands, which do not cancel in it.
        natural: see `judge`.
    """

    expected: Tensor
    floor: Tensor
    scale: Tensor
    natural: float

    def part(self, which: slice) -> Quotients:
        """Some of the numbers."""
        return Quotients(self.expected[which], self.floor[which], self.scale[which], self.natural)


Oracle = Callable[[float], Quotients]
"""Quotients with steps of a given ratio."""


def contract(values: Sequence[Tensor | None], weights: Vector, lanes: int) -> Tensor:
    """⟨values, weights⟩ in each lane ``[lanes]``, in float64; what is None counts as zero."""
    total = torch.zeros(lanes, dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        if value is not None:
            total = total + (value.detach().double() * weight.double()).reshape(lanes, -1).sum(1).cpu()
    return total


def quotients(
    function: Callable[[Vector], Vector],
    vectorized: Callable[[Vector], Vector] | None,
    x: Vector,
    d: Vector,
    weights: Vector,
    ratio: float,
    tol: float,
    eps: float,
) -> Quotients:
    """Differences of `function` at `x` along `d`, and of its contraction, a good deal finer than `tol`.

    `eps` is that of the layer which is held against them.
    """

    def both(leaves: Vector) -> Vector:
        values = function(leaves)
        return [*values, contract(values, weights, 1)]

    def many(leaves: Vector) -> Vector:
        assert vectorized is not None
        values, lanes = vectorized(leaves), len(leaves[0])
        return [*values, contract(values, [w.expand(lanes, *w.shape) for w in weights], lanes)[:, None]]

    point = Floating.of(x, "x")
    found = differentiate(
        both, point, d, ratio=ratio, enough=tol / 1000, vectorized=None if vectorized is None else many
    )  # fmt: skip
    values, rows = found.derivative[:-1], zip(found.derivative[:-1], weights, strict=True)
    scale = [torch.full_like(value, largest([value.nan_to_num()])) for value in values]
    summands = sum((value * w.double()).square().sum().cpu() for value, w in rows)
    assert isinstance(summands, Tensor)
    natural = largest([value.nan_to_num() for value in found.here.leaves]) / reach(x, d)
    sizes = flat([*scale, summands.sqrt()]).clamp_min(negligible(eps, tol) * natural)
    return Quotients(flat(found.derivative), flat(found.error), sizes, natural)


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """Zeros where there is none."""
    return [torch.zeros_like(leaf) if t is None else t.detach() for t, leaf in zip(found, like, strict=True)]


def stack(rows: Sequence[Sequence[Tensor]]) -> Vector:
    """Lists of tensors, one for each lane, as one list of tensors with a leading lane dimension."""
    return [torch.stack([t.detach() for t in column]) for column in zip(*rows, strict=True)]
