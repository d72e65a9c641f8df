"""Batch normalisation with a derivative of its own, against PyTorch's, to the third order and in both modes."""

import pytest
import torch
from torch.nn import functional as F

from applications.imaml.normalization import EPSILON, _Normalize, moments, normalize
from implicitlayers.testing import assert_gradients_match


def reference(x, scale, shift):
    return F.batch_norm(x.movedim(-1, 1), None, None, scale, shift, training=True, eps=EPSILON).movedim(1, -1)


def inputs(channels=3):
    generator = torch.Generator().manual_seed(channels)
    x = 2 * torch.randn(2, 3, 2, channels, dtype=torch.float64, generator=generator) + 5
    scale, shift = torch.randn(2, channels, dtype=torch.float64, generator=generator)
    return [t.requires_grad_() for t in (x, scale, shift)]


def plain(x, scale, shift):
    variance, mean = torch.var_mean(x, (0, 1, 2), correction=0)
    return (x - mean) / (variance + EPSILON).sqrt() * scale + shift


# PyTorch's batch_norm keeps the statistics constant in its third derivative, which is wrong.
@pytest.mark.parametrize(("truth", "orders"), [(reference, 2), (plain, 3)])
def test_value_and_derivatives_are_those_of_batch_norm(truth, orders):
    given = inputs()
    ours, theirs = normalize(*given), truth(*given)
    for _ in range(orders):
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(ours)
        ours, theirs = (
            torch.cat([g.flatten() for g in torch.autograd.grad((y.sin() * weights).sum(), given, create_graph=True)])
            for y in (ours, theirs)
        )
    torch.testing.assert_close(ours, theirs)


def test_every_output_obeys_finite_differences_in_both_modes():
    assert_gradients_match(_Normalize.apply, *inputs(2))
    # Forward over forward is zero: within a jvp of a Function PyTorch has no tangents of what is saved.
    assert_gradients_match(_Normalize.apply, *inputs(2), order=2, modes=("reverse",))


@pytest.mark.parametrize("axis", [0, 1])
def test_maps_over_tasks_with_their_own_and_with_shared_parameters(axis):
    x, scale, shift = (t.detach() for t in inputs())
    many = torch.stack([x, 2 * x, x.square()], axis)
    scales = torch.stack([scale, -scale, 2 * scale])
    mapped = torch.vmap(normalize, in_dims=(axis, 0, None))(many, scales, shift)
    each = [reference(a, b, shift) for a, b in zip(many.unbind(axis), scales, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))


def test_shared_parameters_gather_the_gradients_of_all_tasks():
    x, scale, shift = inputs()
    many = torch.stack([x.detach(), x.detach().square()])
    together = torch.vmap(normalize, in_dims=(0, None, None))(many, scale, shift).sin().sum()
    apart = sum(reference(one, scale, shift).sin().sum() for one in many)
    torch.testing.assert_close(*(torch.autograd.grad(loss, [scale, shift]) for loss in (together, apart)))


def test_moments_are_those_that_it_normalises_by():
    x, scale, shift = inputs()
    mean, variance = moments(x)
    torch.testing.assert_close(normalize(x, scale, shift), (x - mean) * (variance + EPSILON).rsqrt() * scale + shift)


def test_a_mean_far_above_the_deviation_does_not_cancel():
    x = (inputs()[0].detach() + 1000).float()
    one, none = torch.ones(3), torch.zeros(3)
    exact = reference(x.double(), one.double(), none.double()).float()
    # float32 keeps 1000 ± 2 to 6e-5.
    torch.testing.assert_close(normalize(x, one, none), exact, rtol=0, atol=1e-4)
