"""3x3 convolution with stride 2 as a matrix product, for networks whose weights differ from task to task.

Mapped over tasks, `F.conv2d` becomes a grouped convolution, whose kernels are slow where it matters: on a CPU the
derivative with respect to the input reaches a quarter of the forward's speed, and one input channel a twentieth.
Gathering the windows and multiplying matrices, channels last, takes two thirds of the time in one thread. PyTorch's own
scatter of windows (the derivative of `Tensor.unfold`) would eat that up again, so the gather and the scatter, which are
each other's transposes, are written here as a pair.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from applications.imaml.products import USUAL, Products

KERNEL, STRIDE, PADDING = 3, 2, 1


def convolve(x: Tensor, weight: Tensor, how: Products = USUAL) -> Tensor:
    """Convolve with 3x3 kernels, stride 2 and padding 1.

    Args:
        x: ``[batch, height, width, channels]``.
        weight: ``[3, 3, channels, filters]``.
        how: by gathered windows, unless PyTorch's own convolution is asked for, and in which precision.

    Returns:
        ``[batch, ceil(height / 2), ceil(width / 2), filters]``.
    """
    own = _grouped if how.convolution == "grouped" else _by_windows
    return own(*how.operands(x, weight)).to(x.dtype)


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.movedim(-1, 1), weight.permute(3, 2, 0, 1), stride=STRIDE, padding=PADDING).movedim(1, -1)


def _by_windows(x: Tensor, weight: Tensor) -> Tensor:
    windows = _Gather.apply(x)
    batch, height, width, taps = windows.shape
    product = windows.reshape(batch * height * width, taps) @ weight.reshape(taps, -1)
    return product.reshape(batch, height, width, -1)


class _Gather(Function):
    """``[..., height, width, channels]`` to its windows ``[..., rows, columns, 9 * channels]``; linear."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        *lead, height, width, channels = x.shape
        height, width = height + 2 * PADDING, width + 2 * PADDING
        # F.pad would fill all of it with zeros first.
        padded = x.new_empty(*lead, height, width, channels)
        for edge in (slice(PADDING), slice(-PADDING, None)):
            padded[..., edge, :, :] = 0
            padded[..., edge, :] = 0
        padded[..., PADDING:-PADDING, PADDING:-PADDING, :] = x
        rows, columns = (height - KERNEL) // STRIDE + 1, (width - KERNEL) // STRIDE + 1
        *steps, down, right, one = padded.stride()
        windows = padded.as_strided(
            (*lead, rows, columns, KERNEL, KERNEL, channels),
            (*steps, STRIDE * down, STRIDE * right, down, right, one),
        )
        return windows.reshape(*lead, rows, columns, KERNEL * KERNEL * channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.side = inputs[0].shape[-3:-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Scatter.apply(gradient, *ctx.side)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Gather.apply(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Gather.apply(x.movedim(in_dims[0], 0)), 0


class _Scatter(Function):
    """The transpose of `_Gather`: add every window's entries where they came from."""

    @staticmethod
    def forward(windows: Tensor, height: int, width: int) -> Tensor:
        *lead, rows, columns, taps = windows.shape
        tap = windows.reshape(*lead, rows, columns, KERNEL, KERNEL, taps // KERNEL**2)
        # By the parity of the place: an even row is the middle of one window, an odd one the last of a window and the
        # first of the next. Every place is written once and no padding is made and cut off again.
        out = windows.new_empty(*lead, rows, 2, columns, 2, taps // KERNEL**2)
        out[..., 0, :, 0, :] = tap[..., 1, 1, :]
        out[..., 0, :, 1, :] = tap[..., 1, 2, :]
        out[..., 0, :-1, 1, :] += tap[..., 1:, 1, 0, :]
        out[..., 1, :, 0, :] = tap[..., 2, 1, :]
        out[..., :-1, 1, :, 0, :] += tap[..., 1:, :, 0, 1, :]
        out[..., 1, :, 1, :] = tap[..., 2, 2, :]
        out[..., 1, :-1, 1, :] += tap[..., 1:, 2, 0, :]
        out[..., :-1, 1, :, 1, :] += tap[..., 1:, :, 0, 2, :]
        out[..., :-1, 1, :-1, 1, :] += tap[..., 1:, 1:, 0, 0, :]
        whole = out.reshape(*lead, 2 * rows, 2 * columns, taps // KERNEL**2)
        # An odd side ends at an even place.
        return whole[..., :height, :width, :].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.side = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Gather.apply(gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Scatter.apply(tangent, *ctx.side)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], windows: Tensor, height: int, width: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Scatter.apply(windows.movedim(in_dims[0], 0), height, width), 0
