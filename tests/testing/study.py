"""How often is the error estimate of a finite difference right, and how close? 10,000 functions with known slopes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.differentiate import derivative
from torch import Tensor

from implicitlayers.testing.finite_difference import finite_difference

F64 = torch.float64
NOISES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)


class Functions:
    """Random smooth functions of one number: sums of three products of elementary functions of random frequency."""

    def __init__(self, count: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.kind = torch.randint(5, (3, 2, count), generator=source)
        # From much flatter to much steeper than the size of x, which is one.
        self.rate = 10 ** (2 * torch.rand(3, 2, count, generator=source, dtype=F64) - 1)
        self.shift = torch.randn(3, 2, count, generator=source, dtype=F64)
        self.weight = torch.randn(3, count, generator=source, dtype=F64)

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        z = self.rate * t + self.shift
        bump, wave = torch.exp(-z * z / 2), 1 / (1 + z * z)
        options = [
            (z.sin(), z.cos()),
            (z.tanh(), 1 - z.tanh() ** 2),
            (bump, -z * bump),
            (wave, -2 * z * wave**2),
            ((1 + z * z).log(), 2 * z * wave),
        ]
        values, slopes = (torch.stack([option[i] for option in options]) for i in (0, 1))
        pick = self.kind[None]
        return values.gather(0, pick)[0], slopes.gather(0, pick)[0] * self.rate

    def value(self, t: Tensor) -> Tensor:
        factors, _ = self._factors(t)
        return (self.weight * factors.prod(1)).sum(0)

    def slope(self, t: Tensor) -> Tensor:
        f, df = self._factors(t)
        return (self.weight * (df[:, 0] * f[:, 1] + f[:, 0] * df[:, 1])).sum(0)


@dataclass(frozen=True)
class Row:
    """One line of the study."""

    method: str
    noise: str
    covered: float
    ratio: float
    error: float
    undecided: float

    def __str__(self) -> str:
        return (
            f"| {self.method} | {self.noise} | {100 * self.covered:.2f} % | {self.ratio:.1f} | {self.error:.1e} "
            f"| {100 * self.undecided:.1f} % |"
        )


def noisy(functions: Functions, level: float, seed: int) -> Callable[[Tensor], Tensor]:
    source = torch.Generator().manual_seed(seed)

    def f(t: Tensor) -> Tensor:
        value = functions.value(t)
        return value + level * torch.randn(value.shape, generator=source, dtype=F64) if level else value

    return f


def quantized(functions: Functions, level: float) -> Callable[[Tensor], Tensor]:
    """A function that is computed to a fixed number of digits only: constant between its jumps."""
    return lambda t: (functions.value(t) / level).round() * level


def summarize(method: str, noise: str, found: Tensor, estimate: Tensor, truth: Tensor) -> Row:
    true_error = (found - truth).abs()
    decided = torch.isfinite(estimate) & torch.isfinite(found)
    covered = (true_error <= estimate)[decided].double().mean()
    ratio = (estimate / true_error)[decided].median()
    useless = ~decided | (estimate > truth.abs())
    return Row(
        method, noise, float(covered), float(ratio), float(true_error[decided].median()), float(useless.double().mean())
    )


def ours(f: Callable[[Tensor], Tensor], t: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    found, estimate = finite_difference(f, t, torch.ones_like(t), ratio=ratio)
    return found, estimate


def scipys(functions: Functions, level: float, t: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """scipy.differentiate.derivative with its defaults, which evaluates one abscissa for each function at once."""
    source = np.random.default_rng(seed)
    count = functions.weight.shape[-1]

    def f(x: np.ndarray, index: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(np.asarray(index)).long()
        part = Functions.__new__(Functions)
        for name in ("kind", "rate", "shift", "weight"):
            setattr(part, name, getattr(functions, name)[..., columns.reshape(-1)])
        value = part.value(torch.from_numpy(np.broadcast_to(x, index.shape).reshape(-1).copy())).numpy()
        value = value.reshape(index.shape)
        return value + level * source.standard_normal(value.shape) if level else value

    def g(x: np.ndarray, index: np.ndarray) -> np.ndarray:
        x, index = np.broadcast_arrays(x, index)
        return f(x, index)

    done = derivative(g, np.full(count, float(t)), args=(np.arange(count, dtype=float),))
    return torch.from_numpy(done.df), torch.from_numpy(done.error)


def study(count: int = 10_000, seed: int = 0) -> Iterator[Row]:
    """Rows of the table, one method and noise after the other."""
    functions, t = Functions(count, seed), torch.tensor(1.0, dtype=F64)
    truth = functions.slope(t)
    for level in NOISES:
        for ratio in (2.0, 3.0, 4.0):
            found, estimate = ours(noisy(functions, level, seed + 1), t, ratio)
            yield summarize(f"Richardson, ratio {ratio:.0f}", f"{level:.0e}", found, estimate, truth)
        found, estimate = scipys(functions, level, t, seed + 1)
        yield summarize("scipy.differentiate", f"{level:.0e}", found, estimate, truth)
    for level in (1e-9, 1e-6):
        for ratio in (2.0, 3.0, 4.0):
            found, estimate = ours(quantized(functions, level), t, ratio)
            yield summarize(f"Richardson, ratio {ratio:.0f}", f"digits {level:.0e}", found, estimate, truth)
