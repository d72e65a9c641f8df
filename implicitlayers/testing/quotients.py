"""Difference quotients of what a layer returns, and of its contractions with a cotangent, as numbers to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.testing.finite_difference import differentiate, reach
from implicitlayers.testing.vectors import Floating, flat, largest

__all__ = [
    "CERTAIN",
    "Oracle",
    "Quotients",
    "Setting",
    "Vector",
    "contract",
    "contractions",
    "filled",
    "negligible",
    "quotients",
    "stack",
]

NEGLIGIBLE = 1e-3
"""A derivative so much smaller than the natural one is held to the absolute tolerance that goes with this size: it is
what is left of larger numbers that cancelled."""

CERTAIN = 10.0
"""A difference must exceed the measured floor this many times before it counts as one: the error estimate of a finite
difference is too small in a few of a thousand cases, but never by so much in the 10,000 functions of the study."""

CANCELLED = 256
"""Units of the last place that are lost where such numbers cancel."""


def negligible(eps: float, tol: float) -> float:
    """The fraction of the natural size below which a derivative of this precision is negligible."""
    return min(1.0, max(NEGLIGIBLE, CANCELLED * eps / tol))


Vector = list[Tensor]


class Quotients(NamedTuple):
    """Difference quotients of some tensors, of each one's contraction with weights, and last of the sum of these.

    Attributes:
        expected: ``[m]`` numbers.
        floor: their error estimates.
        scale: what a derivative of their kind amounts to: the largest entry of the same tensor; for a contraction the
            length of its summands, which do not cancel in it.
        natural: size of a derivative by which the value would change as much as its own size when the input does. A
            derivative that is zero is told from others by this.
        size: what they amount to without regard to `natural`: where they are negligible beside it, `scale` is more.
        error: their error estimates, without the layer's own error.
        visible: size below which a derivative is not told from zero: by the quotients, or by the layer, of whose value
            it does not change the last place.
    """

    expected: Tensor
    floor: Tensor
    scale: Tensor
    natural: float
    size: Tensor
    error: Tensor
    visible: Tensor

    @classmethod
    def exact(cls, numbers: Tensor, scale: Tensor) -> Quotients:
        """Known numbers, of a scale each, as quotients without an error."""
        zero = torch.zeros_like(numbers)
        return cls(numbers, zero, scale, 0.0, scale, zero, zero)

    def part(self, which: slice) -> Quotients:
        """Some of the numbers."""
        expected, floor, scale, size = (t[which] for t in (self.expected, self.floor, self.scale, self.size))
        return Quotients(expected, floor, scale, self.natural, size, self.error[which], self.visible[which])

    def hidden(self, tol: float) -> Tensor:
        """Which are so much smaller than what is natural that any other number of their size would be tolerated."""
        return (tol * self.scale >= self.size) & (self.size > self.visible)

    def contradicted(self, found: Tensor, tol: float) -> Tensor:
        """Which are hidden, and seen to be other numbers than the layer's."""
        return self.hidden(tol) & ((found - self.expected).abs() > tol * self.size + self.error)

    def missed(self, found: Tensor, tol: float) -> Tensor:
        """Which are hidden, and not seen to agree by their own size."""
        return self.contradicted(found, tol) | (self.hidden(tol) & (self.error > tol * self.size))

    def blurred(self, error: float) -> Quotients:
        """The same for a layer that is itself only good to so much."""
        return self._replace(floor=self.floor + error)


Oracle = Callable[[tuple[float, float]], Quotients]
"""Quotients with steps of a given ratio, and the largest of them relative to the inputs."""


def contract(values: Sequence[Tensor | None], weights: Vector, lanes: int) -> Tensor:
    """⟨values, weights⟩ in each lane ``[lanes]``, in float64; what is None counts as zero."""
    return contractions(values, weights, lanes).sum(1)


def contractions(values: Sequence[Tensor | None], weights: Vector, lanes: int) -> Tensor:
    """The same of every tensor by itself ``[lanes, tensors]``."""
    none = torch.zeros(lanes, dtype=torch.float64)
    pairs = zip(values, weights, strict=True)
    return torch.stack(
        [none if t is None else (t.detach().double() * w.double()).reshape(lanes, -1).sum(1).cpu() for t, w in pairs], 1
    )


class Setting(NamedTuple):
    """What difference quotients depend on beside the function.

    Attributes:
        ratio: between one step and the next.
        near: the largest step, relative to the size of the inputs.
        tol: relative tolerance of the comparison that they are for.
        dtype: the coarsest type of the layer that is compared with them.
    """

    ratio: float
    near: float
    tol: float
    dtype: torch.dtype


def quotients(
    function: Callable[[Vector], Vector],
    vectorized: Callable[[Vector], Vector] | None,
    x: Vector,
    d: Vector,
    weights: Vector,
    setting: Setting,
) -> Quotients:
    """Differences of `function` at `x` along `d`, and of its contractions, a good deal finer than the tolerance."""

    def summed(values: Vector, lanes: int) -> Vector:
        each = contractions(values, [w.expand(lanes, *w.shape) for w in weights], lanes)
        return [each, each.sum(1, keepdim=True)]

    def both(leaves: Vector) -> Vector:
        values = function(leaves)
        return [*values, *(t[0] for t in summed([value[None] for value in values], 1))]

    def many(leaves: Vector) -> Vector:
        assert vectorized is not None
        values = vectorized(leaves)
        return [*values, *summed(values, len(leaves[0]))]

    found = differentiate(
        both, Floating.of(x, "x"), d, ratio=setting.ratio, near=setting.near, enough=setting.tol / 1000,
        vectorized=None if vectorized is None else many,
    )  # fmt: skip
    values = found.derivative[:-2]
    scale = [torch.full_like(value, largest([value.nan_to_num()])) for value in values]
    squares = torch.stack([(v * w.double()).square().sum().cpu() for v, w in zip(values, weights, strict=True)])
    expected, error = flat(found.derivative), flat(found.error)
    size = largest([value.nan_to_num() for value in found.here.leaves])
    if not size and not bool((expected.abs() > CERTAIN * error).any()):
        # At a minimum of zero, x² at 0, neither the value nor the slope says what a slope would amount to.
        size = found.largest
    natural = size / reach(x, d)
    limits = torch.finfo(setting.dtype)
    own = flat([*scale, squares.sqrt(), squares.sum().sqrt()])
    sizes = own.clamp_min(negligible(limits.eps, setting.tol) * natural + limits.tiny / limits.eps / setting.tol)
    # A value that is zero all along the line may be what is left of numbers as large as x.
    nothing = (expected == 0) & (error == 0)
    sizes = torch.where(nothing, sizes.clamp_min(limits.eps * largest(x) / reach(x, d) / setting.tol), sizes)
    last = [limits.eps * largest([value.nan_to_num()]) / reach(x, d) for value in found.here.leaves[:-2]]
    lasts = [torch.full_like(value, place) for value, place in zip(values, last, strict=True)]
    visible = torch.fmax(CERTAIN * error, flat([*lasts, error.new_tensor([*last, max(last)])]))
    return Quotients(expected, error, sizes, natural, own, error, visible)


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """Zeros where there is none."""
    return [torch.zeros_like(leaf) if t is None else t.detach() for t, leaf in zip(found, like, strict=True)]


def stack(rows: Sequence[Sequence[Tensor]]) -> Vector:
    """Lists of tensors, one for each lane, as one list of tensors with a leading lane dimension."""
    return [torch.stack([t.detach() for t in column]) for column in zip(*rows, strict=True)]
