"""Sine waves: that they are sine waves, how they are drawn, and that a seed fixes them."""

import math

import pytest
import torch

from applications.datasets import Sinusoids


def draw(tasks=500, shots=5, queries=10, seed=0, **options):
    return Sinusoids(**options).sample(tasks, shots, queries, torch.Generator().manual_seed(seed))


def test_all_points_of_a_task_are_on_one_wave_within_the_ranges():
    tasks = draw()
    assert tasks.support_inputs.shape == tasks.support_targets.shape == (500, 5, 1)
    assert tasks.query_inputs.shape == tasks.query_targets.shape == (500, 10, 1)
    x = torch.cat([tasks.support_inputs, tasks.query_inputs], dim=1).double()
    y = torch.cat([tasks.support_targets, tasks.query_targets], dim=1).double()
    # a sin(x - p) = (a cos p) sin x - (a sin p) cos x, which is linear in two unknowns.
    basis = torch.cat([x.sin(), -x.cos()], dim=-1)
    weights = torch.linalg.lstsq(basis, y).solution
    # Drawn in float32.
    assert (basis @ weights - y).abs().max() < 1e-5
    amplitude, phase = weights.norm(dim=(1, 2)), torch.atan2(weights[:, 1, 0], weights[:, 0, 0])
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        assert low - 1e-4 < values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() < high + 1e-4
        # Five standard deviations of the mean of as many independent draws.
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / (12 * values.numel()) ** 0.5


def test_noise_is_on_the_support_targets_only():
    exact, noisy = draw(), draw(noise=0.5)
    assert noisy.query_targets.equal(exact.query_targets)
    assert noisy.support_inputs.equal(exact.support_inputs)
    errors = noisy.support_targets - exact.support_targets
    # Five standard deviations of the standard deviation of 2,500 normal numbers.
    assert abs(errors.std() - 0.5) < 5 * 0.5 / (2 * errors.numel()) ** 0.5


def test_a_function_of_the_generator_alone():
    torch.manual_seed(1)
    first = draw(seed=3)
    torch.manual_seed(2)
    assert all(a.equal(b) for a, b in zip(first, draw(seed=3), strict=True))
    assert not first.support_inputs.equal(draw(seed=4).support_inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (2.0, 1.0)}, r"amplitude=\(2\.0, 1\.0\) is no range"),
        ({"domain": (0.0, math.inf)}, "domain=.* is no range"),
        ({"noise": -1.0}, r"noise=-1\.0 cannot be"),
        ({"noise": math.nan}, "noise=nan cannot be"),
        ({"shots": 0}, "shots=0 leaves nothing"),
        ({"tasks": 0}, "tasks=0 leaves nothing"),
    ],
)
def test_impossible_waves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)
