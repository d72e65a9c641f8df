"""The convolution by gathered windows, against PyTorch's own, with both derivatives."""

import pytest
import torch
from torch.nn import functional as F

from applications.imaml.convolution import _Gather, _Scatter, convolve
from implicitlayers.testing import assert_gradients_match


def reference(x, weight):
    return F.conv2d(x.movedim(-1, 1), weight.permute(3, 2, 0, 1), stride=2, padding=1).movedim(1, -1)


def inputs(side, channels=2, filters=3):
    generator = torch.Generator().manual_seed(side)
    shapes = (2, side, side, channels), (3, 3, channels, filters)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("side", [2, 4, 7, 8])
def test_value_and_derivatives_of_both_orders_are_those_of_conv2d(side):
    given = inputs(side)
    torch.testing.assert_close(convolve(*given), reference(*given))
    ours, theirs = (torch.autograd.grad(f(*given).sin().sum(), given, create_graph=True) for f in (convolve, reference))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(sum(g.square().sum() for g in first), given) for first in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_forward_mode_and_finite_differences():
    assert_gradients_match(convolve, *inputs(4, 1, 2), order=2, modes=("reverse", "forward"))


def test_gather_and_scatter_are_transposes_of_each_other():
    x = torch.randn(3, 7, 5, 2, dtype=torch.float64)
    windows = _Gather.apply(x)
    other = torch.randn_like(windows)
    torch.testing.assert_close((windows * other).sum(), (x * _Scatter.apply(other, 7, 5)).sum())


@pytest.mark.parametrize("axis", [0, 1])
def test_maps_over_tasks_with_their_own_weights(axis):
    x, weight = (torch.stack([t.detach(), 2 * t.detach(), -t.detach()], axis) for t in inputs(4))
    mapped = torch.vmap(convolve, in_dims=axis)(x, weight)
    each = [reference(*task) for task in zip(*(t.unbind(axis) for t in (x, weight)), strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))
