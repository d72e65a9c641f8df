"""Regression of sine waves: its network, what it is judged by, and its meta-gradients."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from applications.datasets import Sinusoids
from applications.imaml import networks, perceptron
from applications.imaml.criterion import CLASSIFICATION, REGRESSION
from applications.imaml.episodes import generator_for
from applications.imaml.families import SinusoidSampler
from applications.imaml.train import Limits
from tests.helpers import few_shot
from tests.helpers.few_shot import each, outer, slope_of
from tests.helpers.runs import double_precision
from tests.helpers.waves import WAVES, mean_squared_error, plain

CPU, QUIET = torch.device("cpu"), Limits(quiet=True)


# --- network and criterion ------------------------------------------------------------------------------------


def test_the_network_is_that_of_finn_et_al():
    drawn = networks.initialize(1, *networks.NUMBER, generator_for(0, "it"))
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    assert shapes == {
        **{"hidden0.weight": (40, 1), "hidden0.bias": (40,), "hidden1.weight": (40, 40), "hidden1.bias": (40,)},
        **{"linear.weight": (1, 40), "linear.bias": (1,)},
    }
    for name, value in drawn.items():
        bound = 1.0 if name.startswith("hidden0") else 40**-0.5
        assert 0.9 * bound < value.abs().max() <= bound or value.numel() == 1
    inputs = torch.linspace(-5, 5, 7)[:, None]
    torch.testing.assert_close(networks.forward(drawn, inputs), plain(drawn, inputs))
    again, other = (networks.initialize(1, 1, 1, generator_for(seed, "it")) for seed in (0, 1))
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)
    assert not torch.equal(other["hidden1.weight"], drawn["hidden1.weight"])


def test_lower_errors_and_higher_accuracies_are_better():
    found = [REGRESSION.better(*scores) for scores in ((0.5, 0.6), (0.6, 0.5), (0.5, 0.5))]
    assert found == [True, False, False]
    assert (CLASSIFICATION.better(0.5, 0.6), CLASSIFICATION.better(0.6, 0.5)) == (False, True)
    assert not REGRESSION.better(float("nan"), 0.5)
    outputs, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]])
    assert (REGRESSION.loss(outputs, targets).item(), REGRESSION.scores(outputs, targets).tolist()) == (2.5, [1.0, 4.0])


# --- meta-gradients -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A network of few units in double precision, as a vector and by name, and tasks."""
    monkeypatch.setattr(perceptron, "HIDDEN", (5, 4))
    with double_precision():
        theta = perceptron.initialize(1, generator_for(0, "initialisation"))
        tasks = SinusoidSampler(Sinusoids(), 5, 6, generator_for(0, "training tasks")).sample(3)
    sizes = [value.numel() for value in theta.values()]

    def named(vector):
        parts = zip(theta.items(), vector.split(sizes), strict=True)
        return {name: part.reshape(value.shape) for (name, value), part in parts}

    return torch.cat([value.flatten() for value in theta.values()]), named, tasks


def assert_slope(objective, theta, named, tasks, config):
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
    found = few_shot.evaluate(named(theta), tasks, config)
    assert found.outcome.loss.item() == pytest.approx(objective(theta).item(), rel=1e-9)
    expected = slope_of(objective, theta, direction, 1e-4)
    assert (found.gradient @ direction).item() == pytest.approx(expected.item(), rel=1e-8)
    assert abs(expected) > 0.1


def test_the_meta_gradient_of_imaml_is_the_slope_of_the_whole_outer_objective(tiny, monkeypatch):
    # The minimum of a loss with kinks lies in one as a rule, where there is no slope.
    monkeypatch.setattr(F, "relu", torch.tanh)
    theta, named, tasks = tiny
    config = replace(WAVES, lam=5.0, inner="lbfgs", inner_steps=100, cg_steps=60, curvature="hessian-unguarded")

    def objective(vector):
        return outer(vector, tasks, 5.0, lambda phi, *points: mean_squared_error(named(phi), *points))

    assert_slope(objective, theta, named, tasks, config)


def test_the_meta_gradient_of_maml_is_the_slope_of_the_path(tiny):
    theta, named, tasks = tiny

    def objective(vector):
        losses = []
        for task in each(tasks):
            phi = vector
            for _ in range(3):
                slope = torch.func.grad(lambda p, t=task: mean_squared_error(named(p), *t[:2]))(phi)
                phi = phi - 0.02 * slope
            losses.append(mean_squared_error(named(phi), *task[2:]))
        return torch.stack(losses).mean()

    assert_slope(objective, theta, named, tasks, replace(WAVES, algorithm="maml", lam=0.0))
