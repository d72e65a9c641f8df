"""Directional derivatives by finite differences that know how wrong they are.

A difference quotient has two errors: truncation, which falls with the step, and noise, which rises as the step falls.
Both are measured here. Noise is read off a difference table of equally spaced values, in which a smooth function
vanishes and noise does not (Moré & Wild 2011, "Estimating computational noise"). Truncation is read off a Richardson
table of central differences (Ridders 1982): neighbours in it would agree if there were none. A second table, of the
differences between the slopes ahead and behind, tells whether x is a kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitlayers.testing.vectors import Floating, flat, largest, resolution

__all__ = ["OUTSIDE", "Quotient", "differentiate", "finite_difference", "reach"]

LEVELS = 16
SIDE = 5
CLOSER = 3
"""How often the difference table is tried nearer to x when it has left the domain."""
NOISE_ORDERS = (4, 5, 6)
# How many times the measured scatter an error is allowed to be; chosen on the study in tests/testing.
NOISE_SAFETY = 4.0
TRUNCATION_SAFETY = 2.0
KINK = 10.0
"""How many times its error a jump of the slope must be to count as one."""
OUTSIDE = (Exception,)
"""What a function raises where it is not defined. Solvers have exceptions of their own, with nothing in common."""


BLOCK = 7
"""How many steps are evaluated together where that is possible: most functions need no more."""


class Quotient(NamedTuple):
    """What is known of a function along a line through x.

    Attributes:
        derivative: a float64 tensor for each leaf of f(x).
        error: likewise, its estimate.
        here: f(x).
        largest: of all values that were looked at.
    """

    derivative: list[Tensor]
    error: list[Tensor]
    here: Floating
    largest: float


def finite_difference(
    f: Callable[[Any], Any],
    x: Any,
    direction: Any,
    *,
    ratio: float = 3.0,
    enough: float = 0.0,
    vectorized: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Directional derivative of any function of tensors, with an estimate of its error.

    f'(x) d ≈ Σᵢ wᵢ (f(x + hᵢ d) - f(x - hᵢ d)) / 2hᵢ

    with steps hᵢ that fall by `ratio` and Richardson's weights wᵢ. Every entry of the result is taken where the sum of
    the truncation and of the noise that were measured is smallest. Steps that leave the domain of f (it raises, or
    returns NaN) are left out.

    Use it as the oracle for a derivative that is to be tested. It costs some 25 evaluations, 43 at most unless x is
    next to the edge of the domain.

    Args:
        f: function of one tree of tensors; returns a tensor or a tree.
        x: where; a tensor or a tree, whose floating tensors are moved.
        direction: a tree like `x`; what stands in the place of non-floating leaves is ignored.
        ratio: between one step and the next; another ratio gives another, independent estimate.
        enough: stop where every error estimate has fallen below this fraction of the largest derivative, instead of
            looking for the smallest.
        vectorized: the same function of many points at once, such as ``torch.vmap(f)``: with a leading dimension in all
            floating tensors that go in and come out. The evaluations are then made in one call, or a few. Where it
            raises, the points of that call are evaluated one by one.

    Returns:
        The derivative and the error estimate, both trees like f(x) with float64 tensors. The estimate is infinite where
        no step gave a finite difference. At a kink the derivative is the mean of both sides, and the estimate covers
        both.

    Raises:
        TypeError: x or f(x) holds no floating tensor, or `direction` is no tree like x.

    Examples:
        >>> slope, error = finite_difference(torch.sin, torch.tensor(1.0).double(), torch.tensor(1.0).double())
        >>> bool((slope - math.cos(1.0)).abs() <= error) and bool(error < 1e-10)
        True
    """
    point = Floating.of(x, "x")
    arrow = Floating.of(direction, "direction").leaves
    if [d.shape for d in arrow] != [p.shape for p in point.leaves]:
        raise TypeError(
            f"direction has leaves of shapes {[tuple(d.shape) for d in arrow]}, but x has "
            f"{[tuple(p.shape) for p in point.leaves]}; pass one entry for every entry of x."
        )
    found = differentiate(f, point, arrow, ratio=ratio, enough=enough, vectorized=vectorized)
    return found.here.put(found.derivative), found.here.put(found.error)


def differentiate(
    f: Callable[[Any], Any],
    point: Floating,
    arrow: list[Tensor],
    *,
    ratio: float,
    enough: float,
    vectorized: Callable[[Any], Any] | None,
    near: float = 1.0,
) -> Quotient:
    """`finite_difference` of what is taken apart already, with the value; steps are `near` times as long."""
    with torch.no_grad():
        here = Floating.of(f(point.tree), "f(x)")
        line = _Line(f, vectorized, point, arrow, here, near)
        derivative, error = _differentiate(line, ratio, enough)

    def like_here(vector: Tensor) -> list[Tensor]:
        pieces = _split(vector, line.shapes)
        return [piece.to(leaf.device) for piece, leaf in zip(pieces, here.leaves, strict=True)]

    values = torch.stack([*line.known.values()]).nan_to_num(posinf=0.0, neginf=0.0)
    return Quotient(like_here(derivative), like_here(error), here, largest([values]))


def reach(x: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """The largest t for which x + t·direction is still the same problem: x moves by its own size.

    Next to zero the size says nothing about the function, and below 2⁻⁷ the steps would drown in noise first.
    """
    moving = [p for p, d in zip(x, direction, strict=True) if bool((d != 0).any())]
    size = largest(moving) if moving else 0.0
    return (max(size, 2.0**-7) if size else 1.0) / (largest(direction) or 1.0)


class _Line:
    """t ↦ f(x + t d) as one float64 vector; NaN where f is not defined."""

    def __init__(
        self,
        f: Callable[[Any], Any],
        vectorized: Callable[[Any], Any] | None,
        point: Floating,
        arrow: list[Tensor],
        here: Floating,
        near: float,
    ) -> None:
        self.f, self.vectorized, self.point, self.arrow = f, vectorized, point, arrow
        self.center = flat(here.leaves)
        self.shapes = [leaf.shape for leaf in here.leaves]
        self.eps = max(resolution(here.leaves), resolution(point.leaves))
        self.unit = near * reach(point.leaves, arrow)
        self.known = {0.0: self.center}

    def __call__(self, ts: Sequence[float]) -> Tensor:
        """The values at some t, ``[len(ts), m]``."""
        missing = [t for t in ts if t not in self.known]
        if missing:
            self.known.update(zip(missing, self.evaluated(missing), strict=True))
        return torch.stack([self.known[t] for t in ts])

    def evaluated(self, ts: Sequence[float]) -> Sequence[Tensor]:
        """The same anew, together where that is possible."""
        moved = [self.point.moved(t, self.arrow) for t in ts]
        if self.vectorized is not None:
            rows = zip(*(Floating.of(tree, "x").leaves for tree in moved), strict=True)
            try:
                values = Floating.of(self.vectorized(self.point.put([torch.stack(row) for row in rows])), "f(x)").leaves
            except OUTSIDE:
                # One point may have spoilt the others.
                pass
            else:
                return list(torch.cat([value.detach().cpu().double().reshape(len(ts), -1) for value in values], 1))
        return [self.alone(tree) for tree in moved]

    def alone(self, tree: Any) -> Tensor:
        """The values at one point."""
        try:
            return flat(Floating.of(self.f(tree), "f(x)").leaves)
        except OUTSIDE:
            return torch.full_like(self.center, torch.nan)

    def steps(self, ratio: float) -> list[float]:
        """Of the central quotients, each smaller than the one before."""
        return [self.unit / 2 * ratio**-level for level in range(LEVELS)]

    def table(self, spacing: float) -> list[float]:
        """Equally spaced t around 0."""
        return [i * spacing for i in range(-SIDE, SIDE + 1)]

    def fetch(self, ratio: float) -> None:
        """Evaluate together what most functions need."""
        first = self.steps(ratio)[:BLOCK]
        self([*self.table(self.spacing), *first, *(-h for h in first)])

    @property
    def spacing(self) -> float:
        """Of the difference table that shows the noise, at first."""
        return 2 * self.unit * self.eps**0.25

    def sizes(self, derivative: Tensor) -> Tensor:
        """For every entry, the largest one of the same tensor."""
        return flat([torch.full_like(p, largest([p.nan_to_num()])) for p in _split(derivative, self.shapes)])


def _noise(line: _Line) -> Tensor:
    """Standard deviation of the noise in every entry of f near x.

    The k-th differences of m values with independent noise σ have variance σ² (2k)!/(k!)², while those of a smooth
    function fall with the k-th power of the spacing.
    """
    spacing, values = line.spacing, line.center[None]
    for _ in range(CLOSER):
        values = line(line.table(spacing))
        if bool(torch.isfinite(values).all()):
            break
        spacing /= 64
    estimates, differences = [], values
    for order in range(1, max(NOISE_ORDERS) + 1):
        differences = differences[1:] - differences[:-1]
        if order in NOISE_ORDERS:
            estimates.append(
                differences.square().mean(0).sqrt() * math.factorial(order) / math.factorial(2 * order) ** 0.5
            )
    noise = torch.stack(estimates).amin(0)
    # A value is rounded, whatever the scatter says: differences of a linear function may vanish by luck.
    return torch.fmax(noise, line.eps / 2 * line.center.abs())


class _Table:
    """Richardson's table of approximations with errors h^p, h^(p+2), ...: the best entry of it, and its error.

    Args:
        like: how many numbers.
        ratio: between one step and the next.
        power: the lowest, p.
        noise: standard deviation of an approximation, times its step.
    """

    def __init__(self, like: Tensor, ratio: float, power: int, noise: Tensor) -> None:
        self.ratio, self.power, self.noise = ratio, power, noise
        self.best, self.error = torch.full_like(like, torch.nan), torch.full_like(like, torch.inf)
        self.previous: list[tuple[Tensor, list[float]]] = []

    def add(self, approximation: Tensor, h: float) -> None:
        """Take in the approximation with the next step."""
        # Each entry of the table comes with the weights of the noise of all approximations in it.
        row: list[tuple[Tensor, list[float]]] = [(approximation, [0.0] * len(self.previous) + [1 / h])]
        for j, (coarse, coarse_weights) in enumerate(self.previous):
            fine, fine_weights = row[j]
            factor = self.ratio ** (self.power + 2 * j)
            value = fine + (fine - coarse) / (factor - 1)
            weights = [
                (factor * a - b) / (factor - 1) for a, b in zip(fine_weights, [*coarse_weights, 0.0], strict=True)
            ]
            truncation = torch.fmax((value - fine).abs(), (value - coarse).abs())
            amplified = self.noise * math.sqrt(sum(w * w for w in weights))
            error = TRUNCATION_SAFETY * truncation + NOISE_SAFETY * amplified
            better = error < self.error
            self.best, self.error = torch.where(better, value, self.best), torch.where(better, error, self.error)
            row.append((value, weights))
        self.previous = row


def _differentiate(line: _Line, ratio: float, enough: float) -> tuple[Tensor, Tensor]:
    if line.vectorized is not None:
        line.fetch(ratio)
    noise = _noise(line)
    # Standard deviations of the sums of the values that go in, by the number of times that each does.
    slope, jump = _Table(noise, ratio, 2, noise * 0.5**0.5), _Table(noise, ratio, 1, noise * 6**0.5)
    for h in line.steps(ratio):
        ahead, behind = line([h, -h])
        slope.add((ahead - behind) / (2 * h), h)
        jump.add((ahead + behind - 2 * line.center) / h, h)
        # Noise only grows from here: no finer step can do better.
        fine = slope.error < enough * line.sizes(slope.best)
        if bool(((NOISE_SAFETY * noise / h > slope.error) | fine).all()):
            break
    # At a kink the central quotients converge too, to the mean of the slopes on both sides, which is neither.
    kinked = jump.best.abs() > KINK * jump.error
    return slope.best, slope.error + torch.where(kinked, jump.best.abs() / 2, 0)


def _split(vector: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    pieces = vector.split([shape.numel() for shape in shapes])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
