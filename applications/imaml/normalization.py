"""Batch normalisation by the statistics of the batch itself, with its derivative in few passes over memory.

With N places a channel, x̂ = (x - mean) r and r = (variance + ε)^(-1/2), the layer is y = scale x̂ + shift. For
cotangents g of y, ĝ of x̂ and ρ of r,

    d scale = Σ g x̂,    d shift = Σ g,    dx = r P(scale g + ĝ) - r² x̂ ρ / N,
    P(v) = v - Σ v / N - x̂ (Σ v x̂) / N,

since dr = -r² Σ x̂ dx / N and dx̂ = r P(dx). x̂ and r are outputs like y, so that the rule, which is made of them, can
be differentiated again, to any order; but not in forward mode twice, where PyTorch has no tangents of what a Function
saves.

F.batch_norm, torch.var_mean and torch.mean all compute parts of this, and under vmap, on a CPU, all take longer: the
first goes channel by channel, the reduction of the second is not vectorised, and the derivative of the third divides a
tensor of the size of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

EPSILON = 1e-5
PLACES = (-4, -3, -2)
"""Of ``[batch, height, width, channels]``, the dimensions that statistics are taken over."""


def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise every channel by its mean and variance over the batch, then scale and shift it.

    Args:
        x: ``[batch, height, width, channels]``.
        scale: ``[channels]``.
        shift: ``[channels]``.

    Returns:
        Like ``x``.
    """
    return _Normalize.apply(x, scale, shift)[0]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel.

    Args:
        x: ``[batch, height, width, channels]``.

    Returns:
        Two tensors ``[channels]``.
    """
    _, mean, variance = _centre(x)
    return mean.flatten(), variance.flatten()


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = 1 / _count(x)
    mean = _sum(x) * weight
    # Centred before it is squared: images are mostly paper, and with a mean far above the standard deviation
    # E[x²] - E[x]² would cancel in float32.
    centred = x - mean
    return centred, mean, _sum(centred.square()) * weight


def _sum(x: Tensor) -> Tensor:
    return x.sum(PLACES, keepdim=True)


def _count(x: Tensor) -> int:
    return x.shape[-4] * x.shape[-3] * x.shape[-2]


def _wide(channels: Tensor) -> Tensor:
    """``[..., channels]`` to ``[..., 1, 1, 1, channels]``."""
    return channels[..., None, None, None, :]


class _Normalize(Function):
    """``(x, scale, shift) -> (y, x̂, r)``."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred, _, variance = _centre(x)
        r = torch.rsqrt(variance + EPSILON)
        standard = centred.mul_(r)
        return torch.addcmul(_wide(shift), standard, _wide(scale)), standard, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[1], *output[1:])
        ctx.save_for_forward(inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_standard: Tensor | None, g_r: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, standard, r = ctx.saved_tensors
        if g is None:
            # The derivative of a first derivative that doesn't depend on y.
            g = torch.zeros_like(standard)
        weight = 1 / _count(standard)
        d_shift, d_scale = _sum(g), _sum(g * standard)
        if g_standard is None:
            # Of v = scale g both sums are known by now.
            v, slope, total, along = g, r * _wide(scale), d_shift, d_scale
        else:
            v = torch.addcmul(g_standard, g, _wide(scale))
            slope, total, along = r, _sum(v), _sum(v * standard)
        along = slope * along if g_r is None else slope * along + r.square() * g_r
        d_x = torch.addcmul(-weight * slope * total, standard, -weight * along)
        return torch.addcmul(d_x, v, slope), d_scale[..., 0, 0, 0, :], d_shift[..., 0, 0, 0, :]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, d_scale: Tensor | None, d_shift: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale, standard, r = ctx.saved_tensors
        d_standard, d_r = torch.zeros_like(standard), torch.zeros_like(r)
        if dx is not None:
            weight = 1 / _count(standard)
            along = weight * _sum(dx * standard)
            d_standard = r * (dx - weight * _sum(dx) - standard * along)
            d_r = -r.square() * along
        dy = _wide(scale) * d_standard
        if d_scale is not None:
            dy = dy + _wide(d_scale) * standard
        return dy if d_shift is None else dy + _wide(d_shift), d_standard, d_r

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        lanes = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        return _Normalize.apply(*lanes), (0, 0, 0)
